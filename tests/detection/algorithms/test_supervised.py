import pytest
import torch
from torch import nn

from ssod_imwa.data.structures import DetectionBatch, ImageRecord, Sample, Targets, View
from ssod_imwa.detection.algorithms.supervised import Supervised, labelled_views
from ssod_imwa.detection.detectors.base import Detector


def view(number, labelled=True):
    targets = Targets(torch.full((1, 4), float(number)), torch.tensor([0])) if labelled else None
    return View(torch.full((3, 2, 2), number, dtype=torch.uint8), torch.eye(3), targets)


def batch(*numbers, labelled=True):
    """Samples whose weak view holds the number and whose strong view the number + 100."""
    samples = [
        Sample(ImageRecord(f"{n}.jpg", n, 2, 2), view(n, labelled), view(100 + n, labelled))
        for n in numbers
    ]
    return DetectionBatch(samples, [])


class Recorder(Detector):
    def __init__(self):
        super().__init__(num_classes=1)
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, images, targets):
        self.calls.append([int(x[0, 0, 0]) for x in images])
        assert [int(t.boxes[0, 0]) for t in targets] == self.calls[-1]
        return {"loss_cls": self.weight * sum(self.calls[-1])}

    def detect(self, images):
        raise NotImplementedError


@pytest.mark.parametrize(("strong", "seen"), [(True, [101, 102, 1, 2]), (False, [1, 2])])
def test_labelled_views_are_trained_on_in_one_forward(strong, seen):
    algorithm = Supervised(Recorder(), strong_labeled=strong)
    losses = algorithm.losses(batch(1, 2), t=0)
    assert algorithm.student.calls == [seen]
    assert losses["loss_cls"].item() == sum(seen)


def test_losses_come_from_the_parallel_student():
    algorithm = Supervised(Recorder())
    algorithm.parallel_student = Recorder()
    algorithm.losses(batch(1), t=0)
    assert algorithm.student.calls == []
    assert algorithm.parallel_student.calls == [[101, 1]]


def test_there_is_no_teacher():
    algorithm = Supervised(Recorder())
    assert algorithm.teacher is None
    assert not algorithm.teacher_ready(10)
    assert algorithm.inference_model(10) is algorithm.student
    assert list(algorithm.models()) == ["student"]
    assert algorithm.state_dict() == {}


def test_unlabelled_samples_are_refused():
    with pytest.raises(ValueError, match="4 of 4 labelled views have no targets"):
        labelled_views(batch(1, 2, labelled=False).labelled, strong=True)
