"""Strong views that are turned, mirrored and rescaled are learned with boxes that fit them."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.data.loader import build_train_batches
from ssod_imwa.data.order import BatchStream
from ssod_imwa.data.streams import On, Stream
from ssod_imwa.detection.data.geometry import flip_matrix, scale_matrix
from ssod_imwa.detection.data.images import DetectionImages
from ssod_imwa.detection.data.records import (
    Annotations,
    DetectionDataset,
    Detections,
    ImageRecord,
)
from ssod_imwa.detection.data.views import WeakView
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.methods.mean_teacher import MeanTeacher, MeanTeacherOptions
from ssod_imwa.detection.methods.supervised import Supervised, SupervisedOptions
from ssod_imwa.detection.methods.unbiased_teacher import UnbiasedTeacher, UnbiasedTeacherOptions

WIDTH, HEIGHT = 60, 40
BOXES = [(5, 8, 25, 20), (30, 2, 58, 38), (0, 0, 7, 33), (11, 30, 12, 40)]


def turned_mirrored_and_rescaled(image, generator):
    """A quarter turn, by chance a mirror image, and twice or three times the size."""
    matrix = torch.eye(3, dtype=torch.float64)
    # Pixel (x, y) comes to (y, width - x).
    matrix[:2] = torch.tensor([[0.0, 1, 0], [-1, 0, image.shape[-1]]])
    image = image.rot90(1, (-2, -1))
    if generator.random() < 0.5:
        image, matrix = image.flip(-1), flip_matrix(image.shape[-1]) @ matrix
    factor = 2 + int(generator.integers(2))
    image = image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return image, scale_matrix(factor, factor) @ matrix


VIEWS = {
    "weak": WeakView([HEIGHT], WIDTH),
    "strong": On("weak", turned_mirrored_and_rescaled),
}


def bright_box(image):
    """The bounding box of what is bright."""
    rows, columns = (image[0] > 127).nonzero(as_tuple=True)
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return [float(edge) for edge in edges]


class BrightDetector(Detector):
    """Finds the bright box of an image, and remembers what it is to learn."""

    def __init__(self):
        super().__init__(num_classes=1)
        self.weight = nn.Parameter(torch.ones(()))
        self.lessons = []

    def parts(self, images):
        raise NotImplementedError

    def forward(self, images, objective):
        self.lessons += zip(images, objective.targets, strict=True)
        return {"loss_cls": self.weight}

    def detect(self, images):
        label, score = torch.tensor([0]), torch.tensor([0.9])
        return [Detections(torch.tensor([bright_box(image)]), label, score) for image in images]


@pytest.fixture
def batches(tmp_path):
    nothing = np.zeros(1, dtype=bool)
    records = []
    for number, (x1, y1, x2, y2) in enumerate(BOXES):
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[y1:y2, x1:x2] = 255
        path = str(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(path)
        boxes = np.array([[x1, y1, x2, y2]], dtype=np.float32)
        annotations = Annotations(boxes, np.array([0]), nothing, nothing)
        records.append(ImageRecord(path, number, WIDTH, HEIGHT, annotations))
    dataset = DetectionDataset("boxes", tuple(records), ("bright",))
    images = {
        "labeled": DetectionImages.labeled(dataset),
        "unlabeled": DetectionImages.unlabeled(dataset),
    }
    order = partial(BatchStream, [np.arange(len(BOXES))])
    streams = [Stream(name, x, order, batch_size=4, views=VIEWS) for name, x in images.items()]
    return build_train_batches(streams, EpisodeSchedule(5), seed=1)


@pytest.mark.parametrize(
    ("kind", "options", "lessons"),
    [
        (Supervised, SupervisedOptions(), 8),
        (MeanTeacher, MeanTeacherOptions(), 12),
        (UnbiasedTeacher, UnbiasedTeacherOptions(burn_in_iters=0), 12),
    ],
)
def test_boxes_fit_every_view_that_is_learned(batches, kind, options, lessons):
    method = kind(BrightDetector(), options)
    for t, batch in enumerate(batches(0)):
        method.losses(batch, t)
        assert len(method.student.lessons) == lessons
        shapes = set()
        for image, targets in method.student.lessons:
            assert targets.boxes.tolist() == [pytest.approx(bright_box(image), abs=1e-4)]
            shapes.add(tuple(image.shape[-2:]))
        assert len(shapes) > 1
        method.student.lessons.clear()
