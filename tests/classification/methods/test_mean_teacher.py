import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.losses.cross_entropy import CrossEntropy, CrossEntropyOptions
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.mean_teacher import MeanTeacher, MeanTeacherOptions

VIEWS = MeanTeacher.reads["unlabeled"]


@pytest.fixture
def make(tiny):
    def build(*, seed=0, ema_decay=0.9, **options):
        return MeanTeacher(
            tiny.build(tiny.Net, seed=seed),
            CrossEntropy(tiny.COUNTS, CrossEntropyOptions()),
            MeanTeacherOptions(**options),
            training=Training(10, ema_decay=ema_decay),
        )

    return build


def test_losses_are_their_definition(tiny, make):
    method = make(unsup_loss_weight=3.0)
    batch = tiny.batch(0, views=("weak",), unlabeled=VIEWS)
    images = [batch["labeled"].views["weak"], batch["unlabeled"].views["strong"]]
    logits = method.student(torch.cat(images))
    targets = method.teacher.model(batch["unlabeled"].views["weak"]).softmax(1)
    records = method.losses(batch, 2)
    labels = batch["labeled"].targets
    torch.testing.assert_close(records["loss_labeled"], F.cross_entropy(logits[:6], labels))
    squares = (logits[6:].softmax(1) - targets).square()
    weight = 3 * math.exp(-5 * (1 - 2 / 4) ** 2)
    torch.testing.assert_close(records["loss_unlabeled"], weight * squares.sum() / 18)
    records["loss_unlabeled"].backward()
    assert tiny.without_gradient(method.student) == set()
    assert all(p.grad is None for p in method.teacher.model.parameters())


@pytest.mark.parametrize("rule", ["other", "agree"])
def test_labels_of_another_teacher_are_their_definition_image_by_image(tiny, make, rule):
    method = make(unsup_loss_weight=3.0, rampup_part=0.0)
    method.cross_teach, method.other_teacher = rule, make(seed=5).teacher.model
    with torch.no_grad():  # else both say the same of all images
        for teacher in (method.teacher.model, method.other_teacher):
            teacher.classifier.weight.mul_(8)
    batch = tiny.batch(0, views=("weak",), unlabeled=VIEWS)
    views = batch["unlabeled"].views
    strong = method.student(torch.cat([batch["labeled"].views["weak"], views["strong"]]))[6:]
    own, other = (m(views["weak"]).softmax(1) for m in (method.teacher.model, method.other_teacher))
    expected, learned = 0.0, 0
    for i in range(6):
        if rule == "agree" and own[i].argmax() != other[i].argmax():
            continue
        learned += 1
        target = other[i] if rule == "other" else own[i]
        expected += (strong[i].softmax(0) - target).square().sum() / 18
    assert learned == 6 if rule == "other" else 0 < learned < 6
    torch.testing.assert_close(method.losses(batch, 2)["loss_unlabeled"], 3 * expected)


def test_the_weight_rises_to_its_end(make):
    method = make(unsup_loss_weight=2.0)
    weights = [method.weight(t) for t in range(10)]
    assert weights[0] == pytest.approx(2 * math.exp(-5))
    assert weights == sorted(weights)
    assert weights[4:] == [2.0] * 6
    assert make(unsup_loss_weight=2.0, rampup_part=0.0).weight(0) == 2.0


def test_members_are_averaged_and_resume_bit_for_bit(tiny, make):
    save, members, straight = tiny.SaveAt(4), tiny.Members(), make()
    trainer = tiny.trainer(straight, 4, episodes=2, members=2, hooks=[members])
    trainer.register_hooks([save])
    trainer.train()
    tiny.check_average(straight, members)
    resumed = make(seed=5)
    trainer = tiny.trainer(resumed, 4, episodes=2, members=2)
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))


def test_it_needs_a_teacher(make):
    with pytest.raises(ValueError, match="ema_decay = 0 is not allowed"):
        make(ema_decay=0)
