import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.methods.base import Training, train_accuracy
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork
from ssod_imwa.classification.methods.moco import ExpertContrast, MoCoOptions
from ssod_imwa.classification.methods.ncl import NCL, NCLOptions
from ssod_imwa.classification.models.experts import Experts

VIEWS = NCL.reads["labeled"]

EXPERTS = 3


@pytest.fixture
def ncl(tiny):
    def make(*, contrastive=True, legacy_key_head=False, counts=None, ema_decay=0.0, **settings):
        network = tiny.build(
            lambda: CollaborativeNetwork(Experts(tiny.Net, EXPERTS), width=5 if contrastive else 0)
        )
        contrast = None
        if contrastive:
            contrast = ExpertContrast(
                network, MoCoOptions(queue=16, legacy_key_head=legacy_key_head)
            )
        counts = tiny.COUNTS if counts is None else counts
        training = Training(8, ema_decay=ema_decay)
        return NCL(network, counts, NCLOptions(**settings), training=training, contrast=contrast)

    return make


def cross_entropies(rows, labels):
    return [-math.log(probabilities(row)[y]) for row, y in zip(rows, labels, strict=True)]


def probabilities(row):
    exponentials = [math.exp(x) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def divergence(one, other):
    p, q = probabilities(one), probabilities(other)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_losses_are_those_of_the_method_written_out(tiny, ncl, count):
    method = ncl(hard_categories=count, distillation_weight=0.5, contrastive_weight=0.3)
    batch = tiny.batch(0, views=VIEWS)
    out, labels = method.student(batch["labeled"].views["image"]), batch["labeled"].targets.tolist()
    raw = out.logits.tolist()
    a = [
        [[z + math.log(n) for z, n in zip(row, tiny.COUNTS, strict=True)] for row in expert]
        for expert in raw
    ]
    hard = []
    for i, label in enumerate(labels):
        others = sorted((c for c in range(3) if c != label), key=lambda c: -raw[0][i][c])
        hard.append({label, *others[: count - 1]})
    h = [
        [[x if c in hard[i] else 0.0 for c, x in enumerate(row)] for i, row in enumerate(expert)]
        for expert in a
    ]
    pairs = [(i, j) for i in range(EXPERTS) for j in range(EXPERTS) if i != j]
    images = len(labels)

    def distilled(experts):
        rows = [divergence(experts[j][n], experts[i][n]) for i, j in pairs for n in range(images)]
        return 0.5 * sum(rows) / ((EXPERTS - 1) * images)

    expected = {
        "loss_ce": sum(sum(cross_entropies(expert, labels)) / images for expert in a),
        "loss_ce_hard": sum(sum(cross_entropies(expert, labels)) / images for expert in h),
        "loss_kd": distilled(a),
        "loss_kd_hard": distilled(h),
        "loss_contrastive": 0.0,
    }
    keys = method.contrast.key(batch["labeled"].views["key"])
    for k, queue in enumerate(method.contrast.queues):
        own = (out.queries[k] * keys[k]).sum(1, keepdim=True)
        scores = torch.cat([own, out.queries[k] @ queue.features.T], dim=1) / 0.2
        loss = F.cross_entropy(scores, torch.zeros_like(batch["labeled"].targets))
        expected["loss_contrastive"] += 0.3 * loss.item()
    records = method.losses(batch, 0)
    found = {n: value.item() for n, value in records.items() if n.startswith("loss")}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_one_hard_category_leaves_the_true_class_against_zeros(tiny, ncl):
    method = ncl(hard_categories=1)
    batch = tiny.batch(0, views=VIEWS)
    logits = (
        method.student(batch["labeled"].views["image"]).logits + torch.tensor(tiny.COUNTS).log()
    )
    own = logits.gather(2, batch["labeled"].targets.expand(EXPERTS, -1)[:, :, None])
    expected = (torch.log(own.exp() + 2) - own).mean(1).sum()  # the two others have logit 0
    torch.testing.assert_close(method.losses(batch, 0)["loss_ce_hard"], expected)


def test_the_number_of_images_counts_beside_masked_logits(tiny, ncl):
    """As many times the images of each class: the same prior, another loss of hard categories."""
    batch = tiny.batch(0, views=VIEWS)
    one = ncl(hard_categories=2).losses(batch, 0)
    ten = ncl(hard_categories=2, counts=[10 * n for n in tiny.COUNTS]).losses(batch, 0)
    torch.testing.assert_close(one["loss_ce"], ten["loss_ce"])
    torch.testing.assert_close(one["loss_kd"], ten["loss_kd"])
    assert not torch.allclose(one["loss_ce_hard"], ten["loss_ce_hard"])


def test_all_experts_hide_what_expert_0_does_not_mistake(tiny, ncl):
    batch = tiny.batch(0, views=VIEWS)
    method = ncl(hard_categories=2)
    first = method.losses(batch, 0)["loss_ce_hard"]
    other = method.student.deployed.experts[1].classifier
    with torch.no_grad():  # moves expert 1's ranking, not what expert 0 chose
        other.weight.neg_()
    raw = method.student(batch["labeled"].views["image"]).logits
    mask = torch.zeros(6, 3, dtype=torch.bool)
    for i, label in enumerate(batch["labeled"].targets.tolist()):
        wrong = max((c for c in range(3) if c != label), key=lambda c: raw[0, i, c].item())
        mask[i, [label, wrong]] = True
    hidden = torch.where(mask, raw + torch.tensor(tiny.COUNTS).log(), 0)
    expected = sum(F.cross_entropy(hidden[k], batch["labeled"].targets) for k in range(EXPERTS))
    second = method.losses(batch, 0)["loss_ce_hard"]
    torch.testing.assert_close(second, expected)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("classes", "expected"), [(100, 30), (1000, 300), (3, 1), (8142, 2442)])
def test_three_tenths_of_the_classes_are_hard_by_default(tiny, classes, expected):
    def net():
        model = tiny.Net()
        model.classifier = torch.nn.Linear(6, classes)
        return model

    network = CollaborativeNetwork(Experts(net, 2))
    method = NCL(network, [5] * classes, NCLOptions(), training=Training(1))
    assert method.hard_categories == expected


def test_gradients_reach_both_sides_of_each_pair(tiny, ncl):
    method = ncl()
    records = method.losses(tiny.batch(0, views=VIEWS), 0)
    heads = [expert.classifier.weight for expert in method.student.deployed.experts]
    for gradient in torch.autograd.grad(records["loss_kd"], heads, retain_graph=True):
        assert gradient.any()
    sum(value for name, value in records.items() if name.startswith("loss")).backward()
    assert tiny.without_gradient(method.student) == set()


def test_training_accuracy_is_that_of_the_mean_of_logits():
    one, other = [[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [2.0, 0.0]]
    logits = torch.tensor([one, other])  # the mean predicts 0 for both images
    assert train_accuracy(logits.mean(0), torch.tensor([0, 0])).item() == 100
    assert train_accuracy(logits.mean(0), torch.tensor([0, 1])).item() == 50


def test_without_contrast_it_owns_nothing_and_reads_one_view(tiny, ncl):
    method = ncl(contrastive=False)
    assert (method.reads, method.state_dict()) == ({"labeled": ("image",)}, {})
    method.load_state_dict({})
    assert set(method.models()) == {"student"}
    assert "loss_contrastive" not in method.losses(tiny.batch(0), 0)


@pytest.mark.parametrize("legacy_key_head", [False, True])
def test_members_are_averaged_and_resume_bit_for_bit(tiny, ncl, legacy_key_head):
    def run():
        method = ncl(legacy_key_head=legacy_key_head, ema_decay=0.9)
        members, save = tiny.Members(), tiny.SaveAt(4)
        trainer = tiny.trainer(method, 5, episodes=2, members=2, hooks=[members])
        trainer.register_hooks([save])
        return method, trainer, members, save

    # The random key heads come from the global generator.
    torch.manual_seed(0)
    straight, trainer, members, save = run()
    trainer.train()
    tiny.check_average(straight, members)
    resumed, trainer, _, _ = run()
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard_categories": -1}, "hard_categories = -1 is not allowed"),
        ({"hard_categories": 4}, r"hard_categories = 4 is not allowed \(must be at most C = 3\)"),
        ({"distillation_weight": -1.0}, "distillation_weight = -1.0 is not allowed"),
        ({"contrastive_weight": -1.0}, "contrastive_weight = -1.0 is not allowed"),
    ],
)
def test_arguments_out_of_range_are_refused(ncl, options, message):
    with pytest.raises(ValueError, match=message):
        ncl(**options)


def test_reference_heads_are_refused(tiny):
    network = CollaborativeNetwork(Experts(tiny.Net, 2), reference=True)
    with pytest.raises(ValueError, match="reference heads are not allowed"):
        NCL(network, tiny.COUNTS, NCLOptions(), training=Training(1))
