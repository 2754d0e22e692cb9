import pytest
import torch
from torch import nn

from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Targets, View
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.methods.supervised import Supervised, SupervisedOptions, labeled_views


def view(number, labeled=True):
    targets = Targets(torch.full((1, 4), float(number)), torch.tensor([0])) if labeled else None
    return View(torch.full((3, 2, 2), number, dtype=torch.uint8), torch.eye(3), targets)


def batch(*numbers, labeled=True):
    """Images whose weak view holds the number and whose strong view the number + 100."""
    views = {
        "weak": [view(n, labeled) for n in numbers],
        "strong": [view(100 + n, labeled) for n in numbers],
    }
    return Batch(labeled=Part(views, None, torch.tensor(numbers)))


class Recorder(Detector):
    def __init__(self):
        super().__init__(num_classes=1)
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, images, objective):
        self.calls.append([int(x[0, 0, 0]) for x in images])
        assert [int(t.boxes[0, 0]) for t in objective.targets] == self.calls[-1]
        return {"loss_cls": self.weight * sum(self.calls[-1])}

    def parts(self, images):
        raise NotImplementedError


@pytest.mark.parametrize(("strong", "seen"), [(True, [101, 102, 1, 2]), (False, [1, 2])])
def test_labeled_views_are_trained_on_in_one_forward(strong, seen):
    method = Supervised(Recorder(), SupervisedOptions(strong_labeled=strong))
    assert method.reads == {"labeled": ("weak", "strong") if strong else ("weak",)}
    losses = method.losses(batch(1, 2), t=0)
    assert method.student.calls == [seen]
    assert losses["loss_cls"].item() == sum(seen)


def test_losses_come_from_the_parallel_student():
    method = Supervised(Recorder(), SupervisedOptions())
    method.parallel_student = Recorder()
    method.losses(batch(1), t=0)
    assert method.student.calls == []
    assert method.parallel_student.calls == [[101, 1]]


def test_there_is_no_teacher():
    method = Supervised(Recorder(), SupervisedOptions())
    assert method.teacher is None
    assert list(method.models()) == list(method.evaluated_models(10)) == ["student"]
    assert method.inference_model(10) is method.student
    assert list(method.models()) == ["student"]
    assert method.state_dict() == {}


def test_unlabeled_images_are_refused():
    with pytest.raises(ValueError, match="4 of 4 labeled views have no targets"):
        labeled_views(batch(1, 2, labeled=False)["labeled"], strong=True)


def test_the_average_follows_the_student_from_the_first_step_on():
    method = Supervised(Recorder(), SupervisedOptions(ema_decay=0.75))
    for t, weight in enumerate((3.0, 2.0)):
        with torch.no_grad():
            method.student.weight.fill_(weight)
        method.after_step(t)
    first = 0.75 * 1 + 0.25 * 3
    assert method.teacher.model.weight.item() == 0.75 * first + 0.25 * 2


def test_no_average_is_kept_by_default():
    assert Supervised(Recorder(), SupervisedOptions()).teacher is None
