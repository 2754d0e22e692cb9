import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.losses.cross_entropy import CrossEntropy, CrossEntropyOptions
from ssod_imwa.classification.methods.mean_teacher import MeanTeacher, MeanTeacherOptions

VIEWS = MeanTeacher.reads["unlabeled"]


@pytest.fixture
def make(tiny):
    def build(*, seed=0, ema_decay=0.9, **options):
        return MeanTeacher(
            tiny.build(tiny.Net, seed=seed),
            CrossEntropy(tiny.COUNTS, CrossEntropyOptions()),
            MeanTeacherOptions(**options),
            iterations=10,
            ema_decay=ema_decay,
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
