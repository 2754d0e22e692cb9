"""FixMatch and everything composed on it, with small networks and hand-made batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import needs_fork

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.extras.abc import ABCOptions, BalancedClassifier
from ssod_imwa.classification.extras.balanced_branch import BalancedBranch
from ssod_imwa.classification.extras.semantic import SemanticAlignment
from ssod_imwa.classification.labelers.acr import ACR, ACROptions
from ssod_imwa.classification.labelers.alignment import Alignment, AlignmentOptions
from ssod_imwa.classification.labelers.darp import DARP, DARPOptions
from ssod_imwa.classification.labelers.daso import DASO, DASOOptions
from ssod_imwa.classification.labelers.threshold import Threshold, ThresholdOptions
from ssod_imwa.classification.losses.balanced_softmax import (
    BalancedSoftmax,
    BalancedSoftmaxOptions,
)
from ssod_imwa.classification.losses.cross_entropy import CrossEntropy, CrossEntropyOptions
from ssod_imwa.classification.methods.base import EMAForm, Training
from ssod_imwa.classification.methods.fixmatch import FixMatch, FixMatchOptions
from ssod_imwa.classification.methods.fixmatch_network import FixMatchNetwork
from ssod_imwa.classification.models.wide_resnet import WideResNet
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.label_statistics import LabelStatistics
from ssod_imwa.engine.launch import distribute

T = 8
LABELERS = {
    "threshold": lambda tiny: Threshold(ThresholdOptions(0.4)),
    "alignment": lambda tiny: Alignment(tiny.COUNTS, AlignmentOptions(0.4, batches=3)),
    "darp": lambda tiny: DARP(
        *(tiny.COUNTS, tiny.UNLABELED),
        DARPOptions(0.4, warmup_part=0.25, refine_period=2),
        iterations=T,
    ),
    "daso": lambda tiny: DASO(tiny.COUNTS, DASOOptions(0.4, warmup=2, queue=12, window=2), width=6),
    "acr": lambda tiny: ACR(
        tiny.COUNTS, tiny.UNLABELED, ACROptions(0.4, epoch=2, start_epoch=1, momentum=0.8)
    ),
}
# What a configuration says: labeler, second head, strong views, criterion.
COMPOSITIONS = {
    "fixmatch": ("threshold", "none", 1, "ce"),
    "fixmatch + la": ("threshold", "none", 1, "la"),
    "fixmatch + la + darp": ("darp", "none", 1, "la"),
    "fixmatch + la + alignment": ("alignment", "none", 1, "la"),
    "fixmatch + la + daso": ("daso", "none", 1, "la"),
    "fixmatch + abc": ("threshold", "abc", 2, "ce"),
    "fixmatch + abc + daso": ("daso", "abc", 1, "ce"),
    "acr": ("acr", "balanced", 2, "ce"),
}


def criterion(tiny, name):
    if name == "la":
        return BalancedSoftmax(tiny.COUNTS, BalancedSoftmaxOptions())
    return CrossEntropy(tiny.COUNTS, CrossEntropyOptions())


@pytest.fixture
def make(tiny):
    """A function that makes the method of a composition."""

    def build(
        composition="fixmatch",
        *,
        seed=0,
        ema_decay=0.9,
        ema_form=EMAForm(),
        **settings,
    ):
        name, head, views, loss = COMPOSITIONS[composition]
        network = tiny.build(
            lambda: FixMatchNetwork(tiny.Net(), two_heads=head != "none"), seed=seed
        )
        with torch.no_grad():  # else a new network is never sure of anything
            for head_layer in network.deployed.classifier, network.base_head:
                if head_layer is not None:
                    head_layer.weight.mul_(8)
        labeler = LABELERS[name](tiny)
        extras = []
        if name == "daso":
            extras.append(SemanticAlignment(labeler, weight=1.0))
        if head == "abc":
            extras.append(
                BalancedClassifier(tiny.COUNTS, ABCOptions(0.4, epoch=2), labeler, iterations=T)
            )
        if head == "balanced":
            extras.append(BalancedBranch(labeler))
        options = FixMatchOptions(strong_views=views)
        return FixMatch(
            network,
            criterion(tiny, loss),
            options,
            training=Training(T, ema_decay=ema_decay, ema_form=ema_form),
            labeler=labeler,
            extras=extras,
            **settings,
        )

    return build


@pytest.fixture(params=sorted(COMPOSITIONS))
def composition(request):
    return request.param


def of(tiny, method, *counts):
    return tiny.batch(*counts, views=method.reads["labeled"], unlabeled=method.reads["unlabeled"])


def total(records):
    return sum(value for name, value in records.items() if name.startswith("loss"))


def together(batch, names):
    unlabeled = batch["unlabeled"].views
    return torch.cat([batch["labeled"].views["weak"], *(unlabeled[name] for name in names)])


# ------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("views", [1, 2])
def test_fixmatch_is_its_definition_image_by_image(tiny, make, views):
    method = make()
    names = ["strong"] if views == 1 else ["strong_1", "strong_2"]
    method.options = FixMatchOptions(unsup_loss_weight=0.7, strong_views=views)
    method.strong_names = tuple(names)
    batch = tiny.batch(0, views=("weak",), unlabeled=("weak", *names))
    logits = method.student(together(batch, ["weak", *names])).logits.double()
    labeled, weak = logits[:6], logits[6:12]
    records = method.losses(batch, 0)
    supervised = -sum(
        labeled[i].log_softmax(0)[y] for i, y in enumerate(batch["labeled"].targets.tolist())
    )
    torch.testing.assert_close(records["loss_labeled"].double(), supervised / 6)
    expected = 0.0
    learned = 0
    for i in range(6):
        q = weak[i].detach().softmax(0)
        if q.max() < 0.4:
            continue
        learned += 1
        for v in range(views):
            expected -= logits[12 + 6 * v + i].log_softmax(0)[q.argmax()]
    assert learned > 0
    torch.testing.assert_close(records["loss_unlabeled"].double(), 0.7 * expected / (6 * views))
    assert float(records["labels/mask_rate"]) == pytest.approx(100 * learned / 6)


@pytest.mark.parametrize("rule", ["other", "agree"])
def test_labels_of_another_average_are_their_definition_image_by_image(tiny, make, rule):
    method = make()
    method.cross_teach, method.other_teacher = rule, make(seed=3).teacher.model
    batch = of(tiny, method, 0)
    logits = method.student(together(batch, ["weak", "strong"])).logits.double()
    other = method.other_teacher.deployed(batch["unlabeled"].views["weak"]).double().softmax(1)
    records = method.losses(batch, 0)
    expected, learned = 0.0, []
    for i in range(6):
        own = logits[6 + i].detach().softmax(0)
        q = other[i] if rule == "other" else own
        differs = rule == "agree" and own.argmax() != other[i].argmax()
        if q.max() >= 0.4 and not differs:
            learned.append(i)
            expected -= logits[12 + i].log_softmax(0)[q.argmax()]
    same = logits[6:12].argmax(1) == other.argmax(1)
    assert 0 < same.sum() < 6
    assert len(learned) == 6 if rule == "other" else 0 < len(learned) < 6
    torch.testing.assert_close(records["loss_unlabeled"].double(), expected / 6)
    assert float(records["labels/mask_rate"]) == pytest.approx(100 * len(learned) / 6)


def test_what_another_average_may_label_depends_on_the_composition(make, composition):
    allowed = make(composition).cross_teaches
    if "abc" in composition or composition == "acr":  # two heads
        assert allowed == ()
    else:
        assert allowed == (("agree",) if "daso" in composition else ("other", "agree"))


def test_logit_adjustment_changes_the_labeled_loss_alone(tiny, make):
    plain, adjusted = make("fixmatch"), make("fixmatch + la")
    batch = of(tiny, plain, 0)
    logits = plain.student(together(batch, ["weak", "strong"])).logits[:6]
    prior = torch.tensor(tiny.COUNTS) / sum(tiny.COUNTS)
    first, second = plain.losses(batch, 0), adjusted.losses(batch, 0)
    expected = F.cross_entropy(logits + prior.log(), batch["labeled"].targets)
    torch.testing.assert_close(second["loss_labeled"], expected)
    assert torch.equal(first["loss_unlabeled"], second["loss_unlabeled"])
    assert not torch.equal(first["loss_labeled"], second["loss_labeled"])


def test_semantic_alignment_is_cross_entropy_between_views(tiny, make):
    method = make("fixmatch + la + daso")
    for t in range(2):
        batch = of(tiny, method, t)
        assert method.losses(batch, t)["loss_semantic"].item() == 0  # warming up
        method.after_step(t)
    batch = of(tiny, method, 2)
    outputs = method.student(together(batch, ["weak", "strong"]))
    records = method.losses(batch, 2)
    prototypes = method.labeler.prototypes.means()
    expected = 0.0
    for i in range(6):
        weak, strong = (
            torch.stack(
                [F.cosine_similarity(outputs.features[row], c, dim=0) / 0.05 for c in prototypes]
            )
            for row in (6 + i, 12 + i)
        )
        expected -= (weak.detach().softmax(0) * strong.log_softmax(0)).sum() / 6
    torch.testing.assert_close(records["loss_semantic"], expected, rtol=1e-4, atol=1e-5)


def test_prototypes_are_of_the_teachers_features_and_move_its_statistics(tiny, make):
    method = make("fixmatch + la + daso")
    batch = of(tiny, method, 0)
    network = method.teacher.model.deployed
    before = network.stem[1].running_mean.clone()
    images, labels = batch["labeled"].views["weak"], batch["labeled"].targets
    expected = tiny.copied(network.state_dict())
    network.train()
    features = network.features(images)
    network.load_state_dict(expected)
    network.eval()
    method.losses(batch, 0)
    means = method.labeler.prototypes.means()
    for k in labels.unique():
        torch.testing.assert_close(means[k], features[labels == k].mean(0))
    assert not torch.equal(network.stem[1].running_mean, before)
    assert not network.training
    method.labeler.moves_statistics = False
    before = network.stem[1].running_mean.clone()
    method.losses(batch, 1)
    assert torch.equal(network.stem[1].running_mean, before)


def test_abc_is_its_definition_image_by_image(tiny, make):
    method = make("fixmatch + abc")
    batch = of(tiny, method, 0)
    outputs = method.student(together(batch, ["weak", "strong_1", "strong_2"]))
    h, labels = outputs.tested_logits, batch["labeled"].targets
    t = 5  # the third epoch of two iterations, of four
    torch.manual_seed(3)
    records = method.losses(batch, t)
    torch.manual_seed(3)
    rates = torch.tensor([4 / n for n in tiny.COUNTS])
    drawn = torch.bernoulli(rates[labels])
    supervised = sum(drawn[i] * -h[i].log_softmax(0)[y] for i, y in enumerate(labels.tolist()))
    torch.testing.assert_close(records["loss_abc"], supervised / 6)
    q = h[6:12].detach().softmax(1)
    drawn = torch.bernoulli((1 - 0.5 * (1 - rates))[q.argmax(1)])
    expected = 0.0
    for i in range(6):
        if q[i].max() >= 0.4 and drawn[i]:
            for row in (12 + i, 18 + i):
                expected -= (q[i] * h[row].log_softmax(0)).sum()
    assert drawn.sum() > 0
    torch.testing.assert_close(records["loss_abc_unlabeled"], expected / 6)


def test_abc_rates_are_the_published_ones_and_fall_in_epochs():
    counts = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    labeler = Threshold(ThresholdOptions())
    head = BalancedClassifier(counts, ABCOptions(epoch=500), labeler, iterations=2000)
    expected = [0.01, 0.0167, 0.0279, 0.0467, 0.0781, 0.1316, 0.2174, 0.3846, 0.625, 1]
    assert head.rates.tolist() == pytest.approx(expected, abs=6e-5)
    assert head.unlabeled_rates(499).tolist() == [1] * 10
    for t, done in ((500, 0.25), (1999, 0.75)):
        found = head.unlabeled_rates(t).tolist()
        assert found == pytest.approx([1 - done * (1 - 5 / n) for n in counts])


def test_abc_with_daso_learns_blended_labels(tiny, make):
    method = make("fixmatch + abc + daso")
    for t in range(4):
        method.losses(of(tiny, method, t), t)
        method.after_step(t)
    batch = of(tiny, method, 4)
    outputs = method.student(together(batch, ["weak", "strong"]))
    torch.manual_seed(1)
    records = method.losses(batch, 4)
    h = outputs.tested_logits.detach()
    p = h[6:12].softmax(1)
    shares = method.labeler.semantic_shares()[p.argmax(1)][:, None]
    semantic = method.labeler.prototypes.similarity_logits(outputs.features[6:12].detach())
    blended = (1 - shares) * p + shares * semantic.softmax(1)
    head = next(x for x in method.extras if isinstance(x, BalancedClassifier))
    torch.manual_seed(1)
    torch.bernoulli(head.rates[batch["labeled"].targets])
    drawn = torch.bernoulli(head.unlabeled_rates(4)[blended.argmax(1)])
    mask = drawn * (blended.amax(1) >= 0.4)
    expected = -(mask * (blended * h[12:].log_softmax(1)).sum(1)).mean()
    torch.testing.assert_close(records["loss_abc_unlabeled"].detach(), expected)


def test_acr_is_its_definition_on_both_heads(tiny, make):
    method = make("acr")
    for t in range(6):
        method.losses(of(tiny, method, t), t)
        method.after_step(t)
    tau = float(method.labeler.tau)
    assert 0 < tau < 2
    batch = of(tiny, method, 6)
    outputs = method.student(together(batch, ["weak", "strong_1", "strong_2"]))
    z, balanced, labels = outputs.logits, outputs.tested_logits, batch["labeled"].targets
    log_prior = (torch.tensor(tiny.COUNTS) / sum(tiny.COUNTS)).log()
    records = method.losses(batch, 6)
    torch.testing.assert_close(records["loss_labeled"], F.cross_entropy(z[:6], labels))
    torch.testing.assert_close(
        records["loss_balanced"], F.cross_entropy(balanced[:6] + 2 * log_prior, labels)
    )
    weak, weak_balanced = z[6:12].detach(), balanced[6:12].detach()
    for name, logits, strength, other in (
        ("loss_unlabeled", z, tau, weak),
        ("loss_balanced_unlabeled", balanced, 2.0, weak_balanced),
    ):
        adjusted = (weak - strength * log_prior).softmax(1)
        mask = (adjusted.amax(1) >= 0.4) | (other.softmax(1).amax(1) >= 0.4)
        losses = [
            F.cross_entropy(logits[first : first + 6], adjusted.argmax(1), reduction="none")
            for first in (12, 18)
        ]
        torch.testing.assert_close(records[name], (torch.cat(losses) * mask.repeat(2)).mean())


# ---------------------------------------------------------------- what holds for every composition


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(tiny, make, composition):
    method = make(composition)
    total(method.losses(of(tiny, method, 0), 0)).backward()
    assert tiny.without_gradient(method.student) == set()
    assert all(p.grad is None for p in method.teacher.model.parameters())


def test_no_gradient_goes_through_weak_views(tiny, make, composition):
    method = make(composition)
    for t in range(4):
        method.losses(of(tiny, method, t), t)
        method.after_step(t)
    seen = {}

    class Parallel(torch.nn.Module):
        def forward(self, images):
            outputs = method.student(images)
            kept = (outputs.features, outputs.logits, outputs.tested_logits)
            for x in kept:
                if x is not None:
                    x.retain_grad()
            seen["outputs"] = outputs
            return outputs

    method.parallel_student = Parallel()
    total(method.losses(of(tiny, method, 4), 4)).backward()
    logits = [seen["outputs"].logits, seen["outputs"].tested_logits]
    for x in logits:
        assert x is None or not x.grad[6:12].any()


def test_hidden_truth_is_counted_and_reaches_no_loss(tiny, make, composition):
    records, counts = [], []
    for truth in (0, 2, -1):
        method = make(composition, knows_truth=True)
        method.label_statistics = LabelStatistics(3)
        batch = of(tiny, method, 0)
        hidden = torch.full_like(batch["unlabeled"].targets, truth)
        batch = Batch(
            labeled=batch["labeled"], unlabeled=replace(batch["unlabeled"], targets=hidden)
        )
        torch.manual_seed(0)
        records.append(method.losses(batch, 0))
        counts.append(method.label_statistics.take())
    assert all(tiny.same(records[0], other) for other in records)
    assert [x.objects.tolist() for x in counts] == [[6, 0, 0], [0, 0, 6], [0, 0, 0]]


def test_one_member_in_two_episodes_is_plain_training(tiny, make, composition):
    plain, wrapped = make(composition), make(composition)
    tiny.trainer(plain, 4, imwa=False).train()
    tiny.trainer(wrapped, 4, episodes=2).train()
    assert tiny.same(tiny.states(plain), tiny.states(wrapped))


def test_members_are_averaged_in_every_tensor(tiny, make, composition):
    method, members = make(composition), tiny.Members()
    tiny.trainer(method, 6, episodes=2, members=2, hooks=[members]).train()
    tiny.check_average(method, members)


def test_members_keep_their_estimates(tiny, make, composition):
    """After the last episode the state is member 0's, as it was when that member ended."""
    method, members = make(composition), tiny.Members()
    tiny.trainer(method, 6, episodes=2, members=2, hooks=[members]).train()
    states = [members.states[1, member]["own"] for member in range(2)]
    assert tiny.same(tiny.copied(method.state_dict()), states[0])
    if states[0]:
        assert not tiny.same(*states)


def test_estimates_are_averaged_when_asked(tiny, make, composition):
    method, members = make(composition, averages_statistics=True), tiny.Members()
    tiny.trainer(method, 6, episodes=2, members=2, hooks=[members]).train()
    states = [members.states[1, member]["own"] for member in range(2)]
    for name in method.labeler.averageable:
        key = f"labeler.{name}"
        mean = (states[0][key] + states[1][key]) / 2
        torch.testing.assert_close(method.state_dict()[key], mean)


@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_a_run_goes_on_in_the_middle_of_a_member_bit_for_bit(tiny, make, composition, step):
    save, straight = tiny.SaveAt(step), make(composition)
    trainer = tiny.trainer(straight, T // 2, episodes=2, members=2)
    trainer.register_hooks([save])
    trainer.train()
    resumed = make(composition, seed=5)
    trainer = tiny.trainer(resumed, T // 2, episodes=2, members=2)
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))


def test_micro_batches_are_taken(tiny, make, composition):
    method = make(composition)
    tiny.trainer(method, 4, imwa=False, accumulation=2).train()
    assert all(p.isfinite().all() for p in method.student.parameters())


@needs_fork
def test_ranks_have_one_state_and_one_model(tiny, make, composition, tmp_path):
    def train(rank):
        method = make(composition)
        distribute(method, Ranks.of_run())
        trainer = tiny.trainer(method, 5)
        trainer._batches = lambda start: (
            of(tiny, method, t).split(2)[rank] for t in range(start, 5)
        )
        trainer.train()
        return tiny.states(method)

    one, other = tiny.on_two_ranks(train, tmp_path)
    assert tiny.same(one, other)


def test_what_is_tested_is_the_second_head_where_there_is_one(tiny, make, composition):
    method = make(composition)
    tiny.trainer(method, 3, imwa=False).train()
    model = method.inference_model(2).eval()
    assert model is method.teacher.model
    images = of(tiny, method, 9)["labeled"].views["weak"]
    outputs = model.outputs(images)
    tested = outputs.logits if outputs.tested_logits is None else outputs.tested_logits
    assert torch.equal(model(images), tested)
    assert (model.base_head is not None) == (COMPOSITIONS[composition][1] != "none")


def test_training_lowers_the_loss(tiny, make, composition):
    method = make(composition)
    batch = of(tiny, method, 0)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for t in range(60):
        loss = method.losses(batch, min(t, T - 1))["loss_labeled"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------------------------- its environment


def test_the_ema_is_the_one_of_each_protocol(tiny, make):
    warm = make(ema_decay=0.99)
    constant = make(ema_decay=0.99, ema_form=EMAForm(ema_warmup=False, ema_buffers="copy"))
    for method in (warm, constant):
        before = method.teacher.model.deployed.classifier.weight.clone()
        tiny.trainer(method, 1, imwa=False).train()
        student, teacher = method.student.deployed, method.teacher.model.deployed
        share = 1.0 if method is warm else 0.01
        expected = torch.lerp(before, student.classifier.weight, share)
        torch.testing.assert_close(teacher.classifier.weight, expected)
    assert torch.equal(teacher.stem[1].running_mean, student.stem[1].running_mean)


def test_parts_that_do_not_belong_together_are_refused(tiny, make):
    net = FixMatchNetwork(tiny.Net(), two_heads=True)
    settings = {"training": Training(T), "labeler": LABELERS["threshold"](tiny)}
    with pytest.raises(ValueError, match="give both or neither"):
        FixMatch(net, criterion(tiny, "ce"), FixMatchOptions(), **settings)
    one_head = FixMatchNetwork(tiny.Net())
    settings["labeler"] = LABELERS["acr"](tiny)
    with pytest.raises(ValueError, match="acr labels need a second head that is trained"):
        FixMatch(one_head, criterion(tiny, "ce"), FixMatchOptions(), **settings)
    with pytest.raises(ValueError, match="daso labels need a teacher"):
        make("fixmatch + la + daso", ema_decay=0.0)


def test_labels_are_counted_beside_the_truth(tiny, make):
    method = make(knows_truth=True)
    method.label_statistics = LabelStatistics(3)
    batch = of(tiny, method, 0)
    weak = method.student(together(batch, ["weak", "strong"])).logits[6:12].softmax(1)
    truth = batch["unlabeled"].targets.tolist()
    learned = [bool(row.max() >= 0.4) for row in weak]
    labels = [int(row.argmax()) for row in weak]
    records, counts = method.losses(batch, 0), method.label_statistics.take()
    assert float(records["labels/mask_rate"]) == pytest.approx(100 * sum(learned) / 6)
    torch.testing.assert_close(records["labels/confidence"], 100 * weak.amax(1).mean())
    assert (counts.images, counts.empty) == (6, 6 - sum(learned))
    for k in range(3):
        of_class = [a and b == k for a, b in zip(learned, labels, strict=True)]
        assert counts.used[k] == counts.judged[k] == sum(of_class)
        assert counts.right[k] == sum(a and y == k for a, y in zip(of_class, truth, strict=True))
        assert counts.objects[k] == truth.count(k)


@pytest.mark.parametrize(
    ("width", "classes", "expected"), [(2, 10, 1_468_900), (8, 100, 23_452_312)]
)
def test_two_heads_have_the_parameters_of_acrs_network(width, classes, expected):
    with torch.device("meta"):
        network = FixMatchNetwork(WideResNet(classes, width=width), two_heads=True)
    assert sum(p.numel() for p in network.parameters()) == expected
