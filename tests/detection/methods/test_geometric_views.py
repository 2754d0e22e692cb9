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
from ssod_imwa.detection.detectors.parts import Parts, RegionOutputs, Regions, SampledBoxes
from ssod_imwa.detection.methods.mean_teacher import MeanTeacher, MeanTeacherOptions
from ssod_imwa.detection.methods.soft_teacher import SoftTeacher, SoftTeacherOptions
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
    "colored": WeakView([HEIGHT], WIDTH),
}


def bright_box(image):
    """The bounding box of what is bright."""
    rows, columns = (image[0] > 127).nonzero(as_tuple=True)
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return [float(edge) for edge in edges]


class BrightParts(Parts, Regions):
    """Finds the bright box of an image, refines every box to it, and notes what it is to learn."""

    def __init__(self, detector, images):
        super().__init__(detector.name, images)
        self.weight, self.lessons = detector.weight, detector.lessons
        self.asked = detector.asked
        self.bright = [torch.tensor([bright_box(image)]) for image in images]

    @property
    def regions(self):
        return self

    def learn(self, targets):
        self.lessons += zip(self.images, targets, strict=True)

    def losses(self, targets):
        self.learn(targets)
        return {"loss_cls": self.weight}

    def detections(self):
        label, score = torch.tensor([0]), torch.tensor([0.95])
        return [Detections(box, label, score) for box in self.bright]

    def propose(self, targets):
        self.learn(targets)
        return self.bright, {"loss_rpn_cls": self.weight, "loss_rpn_loc": self.weight}

    def sample(self, proposals, targets):
        """The box as an object and, once more, as background."""
        self.learn(targets)
        return [
            SampledBoxes(box.repeat(2, 1), torch.tensor([0, 1]), box.repeat(2, 1))
            for box in proposals
        ]

    def predict(self, boxes):
        self.asked.append(list(zip(self.images, boxes, strict=True)))
        count = sum(len(item) for item in boxes)
        return RegionOutputs(
            list(boxes), self.weight * torch.ones(count, 2), torch.zeros(count, 1, 4)
        )

    def refine(self, outputs):
        return [
            bright.expand(len(boxes), 1, 4)
            for bright, boxes in zip(self.bright, outputs.boxes, strict=True)
        ]

    def box_loss(self, outputs, sampled):
        return self.weight


class BrightDetector(Detector):
    """`BrightParts` of images; `lessons` are what it is to learn, `asked` what it is to judge."""

    abilities = frozenset({"regions"})

    def __init__(self):
        super().__init__(num_classes=1)
        self.weight = nn.Parameter(torch.ones(()))
        self.lessons, self.asked = [], []

    def parts(self, images):
        return BrightParts(self, images)


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
        # Labeled images once; proposals, classes and boxes of unlabeled ones.
        (SoftTeacher, SoftTeacherOptions(), 16),
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


def test_background_is_judged_where_it_is_on_the_weak_view(batches):
    """The student's background, the bright box of a strong view, is the teacher's bright box."""
    method = SoftTeacher(BrightDetector(), SoftTeacherOptions())
    for t, batch in enumerate(batches(0)):
        losses = method.losses(batch, t)
        weak = [view.image for view in batch["unlabeled"].views["weak"]]
        judged = method.teacher.model.asked[-1]
        assert sum(len(boxes) for _, boxes in judged) == len(weak)
        for image, boxes in judged:
            assert any(image is other for other in weak)
            assert boxes.tolist() == [pytest.approx(bright_box(image), abs=1e-4)]
        assert losses["background_weight"].item() == 0.5
