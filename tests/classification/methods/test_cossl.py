import pytest
import torch
import torch.nn.functional as F
from support import needs_fork

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.losses.cross_entropy import CrossEntropy, CrossEntropyOptions
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.cossl import (
    CoSSL,
    CoSSLNetwork,
    CoSSLOptions,
    enhanced_features,
    mixing_rates,
)
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.launch import distribute


@pytest.fixture
def make(tiny):
    def build(*, seed=0, threshold=0.4, warmup_iters=2, part="all", ema_decay=0.9, **options):
        network = tiny.build(lambda: CoSSLNetwork(tiny.Net()), seed=seed)
        with torch.no_grad():  # else a new head is never sure of anything
            network.deployed.classifier.weight.mul_(8)
        return CoSSL(
            network,
            tiny.COUNTS,
            CrossEntropy(tiny.COUNTS, CrossEntropyOptions()),
            CoSSLOptions(threshold, warmup_iters=warmup_iters, **options),
            training=Training(8, part, ema_decay),
        )

    return build


def of(tiny, *counts):
    batch = tiny.batch(*counts, views=("weak",), unlabeled=CoSSL.reads["unlabeled"])
    balanced = tiny.batch("balanced", *counts, views=("strong",))["labeled"]
    return Batch(**batch, balanced=balanced)


def run(tiny, method, iterations, **settings):
    """The trainer of a run, with batches that have the balanced stream, too."""
    trainer = tiny.trainer(method, iterations, **settings)
    positions = trainer.schedule.position

    def batches(start):
        for position in map(positions, range(start, len(trainer.schedule))):
            yield of(tiny, position.member, position.t)

    trainer._batches = batches
    return trainer


def test_rates_are_the_published_ones():
    counts = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    expected = [0, 0.402, 0.642, 0.786, 0.872, 0.924, 0.954, 0.974, 0.984, 0.990]
    assert mixing_rates(counts).tolist() == pytest.approx(expected, abs=5e-4)


def test_features_are_mixed_one_by_one():
    generator = torch.Generator().manual_seed(0)
    features, others = (torch.randn(n, 3, generator=generator) for n in (50, 20))
    labels, rates = torch.arange(50) % 2, torch.tensor([0.0, 0.8])
    torch.manual_seed(1)
    found = enhanced_features(features, labels, others, rates=rates, least_share=0.6)
    torch.manual_seed(1)
    drawn, uniform = torch.bernoulli(rates[labels]), torch.rand(50, 1)
    for i in range(50):
        share = 0.6 + 0.4 * uniform[i]
        mixed = share * features[i] + (1 - share) * others[i % 20]
        torch.testing.assert_close(found[i], mixed if drawn[i] else features[i])
    assert drawn[labels == 0].sum() == 0
    assert 0 < drawn.sum() < 25


def test_the_head_alone_learns_in_the_warm_up(tiny, make):
    method = make(warmup_iters=3)
    before = tiny.copied(method.student.state_dict())
    run(tiny, method, 3, imwa=False).train()
    after = method.student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"deployed.classifier.weight", "deployed.classifier.bias"}


def test_losses_are_their_definition(tiny, make):
    method = make(threshold=0.49, unsup_loss_weight=0.7)
    batch = of(tiny, 0)
    torch.manual_seed(2)
    records = method.losses(batch, 5)
    torch.manual_seed(2)
    teacher, student = method.teacher.model.deployed, method.student
    views, labels = batch["unlabeled"].views, batch["labeled"].targets
    mixed = enhanced_features(
        teacher.features(batch["balanced"].views["strong"]),
        batch["balanced"].targets,
        teacher.features(views["strong_1"]),
        rates=method.mixing_rates,
        least_share=0.6,
    )
    head = student.deployed.classifier
    expected = F.cross_entropy(head(mixed), batch["balanced"].targets)
    torch.testing.assert_close(records["loss_head"], expected)
    images = [batch["labeled"].views["weak"], views["strong_1"], views["strong_2"]]
    logits = student.base_head(student.deployed.features(torch.cat(images)))
    torch.testing.assert_close(records["loss_labeled"], F.cross_entropy(logits[:6], labels))
    q = head(teacher.features(views["weak"])).softmax(1)
    mask = (q.amax(1) >= 0.49).float()
    assert 0 < mask.sum() < len(mask)
    losses = F.cross_entropy(logits[6:], q.argmax(1).repeat(2), reduction="none")
    torch.testing.assert_close(records["loss_unlabeled"], 0.7 * (losses * mask.repeat(2)).mean())


def test_the_encoder_learns_nothing_from_the_head(tiny, make):
    method = make()
    encoder = list(method.student.deployed.layer1.parameters())
    records = method.losses(of(tiny, 0), 5)
    found = torch.autograd.grad(records["loss_head"], encoder, retain_graph=True, allow_unused=True)
    assert all(x is None or not x.any() for x in found)
    sum(records[name] for name in records if name.startswith("loss")).backward()
    assert tiny.without_gradient(method.student) == set()


def test_the_base_head_is_the_classifier_that_was_trained(tiny):
    net = tiny.build(tiny.Net)
    weight = net.classifier.weight.clone()
    network = CoSSLNetwork(net)
    assert torch.equal(network.base_head.weight, weight)
    assert not torch.equal(network.deployed.classifier.weight, weight)


def test_members_are_averaged_and_resume_bit_for_bit(tiny, make):
    save, members, straight = tiny.SaveAt(4), tiny.Members(), make()
    trainer = run(tiny, straight, 6, episodes=2, members=2, hooks=[members])
    trainer.register_hooks([save])
    trainer.train()
    tiny.check_average(straight, members)
    resumed = make(seed=5)
    trainer = run(tiny, resumed, 6, episodes=2, members=2)
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))


@needs_fork
def test_ranks_train_one_model_but_do_not_warm_up(tiny, make, tmp_path):
    def train(rank):
        method = make(warmup_iters=0)
        distribute(method, Ranks.of_run())
        trainer = tiny.trainer(method, 2)
        trainer._batches = lambda start: (of(tiny, t).split(2)[rank] for t in range(start, 2))
        trainer.train()
        method.options = CoSSLOptions(warmup_iters=5)
        with pytest.raises(ValueError, match="warmup_iters > 0 is not allowed on several"):
            method.losses(of(tiny, 0), 0)
        return tiny.copied(method.student.deployed.classifier.state_dict())

    one, other = tiny.on_two_ranks(train, tmp_path)
    assert tiny.same(one, other)


def test_a_frozen_encoder_keeps_its_weights(tiny, make):
    method = make(part="classifier")
    before = tiny.copied(method.student.state_dict())
    run(tiny, method, 4).train()
    after = method.student.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    heads = ("deployed.classifier", "base_head")
    assert moved == {f"{head}.{name}" for head in heads for name in ("weight", "bias")}


def test_it_needs_a_teacher(make):
    with pytest.raises(ValueError, match="ema_decay = 0 is not allowed"):
        make(ema_decay=0)
