import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import needs_fork

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.bcl import BalancedContrastive, BCLNetwork, BCLOptions
from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.launch import distribute

VIEWS = BalancedContrastive.reads["labeled"]

LARGE = {"temperature": 0.07, "ce_weight": 1.0, "contrastive_weight": 0.35}


def network(tiny, classifier="cosine"):
    options = BCLOptions(hidden=7, width=5)
    return tiny.build(lambda: BCLNetwork(tiny.Net(classifier), options))


def make_method(tiny, classifier="cosine", *, iterations=4, part="all", ema_decay=0.0, **settings):
    return BalancedContrastive(
        network(tiny, classifier),
        tiny.COUNTS,
        BCLOptions(**settings),
        training=Training(iterations, part, ema_decay),
    )


def in_float64(batch):
    part = batch["labeled"]
    views = {name: view.double() for name, view in part.views.items()}
    return Batch(labeled=replace(part, views=views))


def projected_by_hand(head, rows):
    """Linear, batch norm by the rows, ReLU, linear, and to length 1."""
    first, norm, _, last = [
        {name: p.detach().numpy() for name, p in layer.named_parameters()} for layer in head
    ]
    rows = rows @ first["weight"].T + first["bias"]
    rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * norm["weight"] + norm["bias"]
    rows = np.maximum(rows, 0) @ last["weight"].T + last["bias"]
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def cross_entropy_by_hand(features, weights, labels, *, scale, counts):
    total = 0.0
    for feature, label in zip(features, labels, strict=True):
        logits = []
        for weight, count in zip(weights, counts, strict=True):
            length = math.sqrt(sum(x * x for x in feature) * sum(w * w for w in weight))
            cosine = sum(x * w for x, w in zip(feature, weight, strict=True)) / length
            logits.append(scale * cosine + math.log(count / sum(counts)))
        total += math.log(sum(math.exp(z) for z in logits)) - logits[label]
    return total / len(labels)


def contrastive_by_hand(projections, labels, prototypes, temperature):
    pool = [*projections, *prototypes]
    pool_labels = [*labels, *range(len(prototypes))]
    total = 0.0
    for i, label in enumerate(labels):
        scores = [float(projections[i] @ row) / temperature for row in pool]
        others = [j for j in range(len(pool)) if j != i]
        bottom = 0.0
        for c in range(len(prototypes)):
            of_class = [math.exp(scores[j]) for j in others if pool_labels[j] == c]
            bottom += sum(of_class) / len(of_class)
        positives = [scores[j] for j in others if pool_labels[j] == label]
        total += math.log(bottom) - sum(positives) / len(positives)
    return total / len(labels)


@pytest.mark.parametrize("settings", [{}, LARGE])
def test_losses_are_the_two_of_the_paper(tiny, settings):
    method = make_method(tiny, **settings)
    method.student.double()
    batch = in_float64(tiny.batch(0, views=VIEWS))
    method.set_train_mode()
    records, part = method.losses(batch, 0), batch["labeled"]
    with torch.no_grad():
        views = torch.cat(list(part.views.values()))
        features = method.student.deployed.features(views).numpy()
    labels, size = part.targets.tolist(), len(part)
    weights = method.student.deployed.classifier.weight.detach().numpy()
    settings = {"temperature": 0.1, "ce_weight": 2.0, "contrastive_weight": 0.6, **settings}
    ce = cross_entropy_by_hand(
        features[:size].tolist(), weights.tolist(), labels, scale=5.0, counts=tiny.COUNTS
    )
    contrastive = contrastive_by_hand(
        # The head's batch norm sees the 3B rows of all views, of which the last 2B are contrasted.
        projected_by_hand(method.student.projection, features)[size:],
        labels + labels,
        projected_by_hand(method.student.prototype_projection, weights),
        settings["temperature"],
    )
    expected = {
        "loss_ce": settings["ce_weight"] * ce,
        "loss_contrastive": settings["contrastive_weight"] * contrastive,
    }
    found = {name: value.item() for name, value in records.items() if name.startswith("loss")}
    assert found == pytest.approx(expected, rel=1e-6)  # the prior is kept in float32


def test_every_parameter_gets_a_gradient(tiny):
    method = make_method(tiny)
    records = method.losses(tiny.batch(0, views=VIEWS), 0)
    (records["loss_ce"] + records["loss_contrastive"]).backward()
    assert tiny.without_gradient(method.student) == set()


def test_prototypes_teach_the_classifier(tiny):
    method = make_method(tiny)
    method.losses(tiny.batch(0, views=VIEWS), 0)["loss_contrastive"].backward()
    weights = method.student.deployed.classifier.weight
    assert (weights.grad.abs().sum(1) > 1e-4).all()


def test_a_loss_of_weight_0_still_reaches_every_parameter(tiny):
    method = make_method(tiny, ce_weight=0.0, contrastive_weight=0.0)
    records = method.losses(tiny.batch(0, views=VIEWS), 0)
    (records["loss_ce"] + records["loss_contrastive"]).backward()
    assert tiny.without_gradient(method.student) == set()
    assert not any(p.grad.any() for p in method.student.parameters())


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_evaluation_gives_the_classifiers_logits(tiny, classifier):
    method = make_method(tiny, classifier)
    tiny.trainer(method, 4).train()
    images = tiny.batch(1)["labeled"].views["image"]
    model = method.inference_model(3).eval()
    before = tiny.copied(model.state_dict())
    logits = model(images)
    assert torch.equal(logits, model.deployed.classifier(model.deployed.features(images)))
    assert logits.shape == (len(images), 3)
    assert tiny.same(model.state_dict(), before)


def test_training_lowers_the_loss(tiny):
    method = make_method(tiny, iterations=40)
    batch = tiny.batch(0, views=VIEWS)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9)
    totals = []
    for t in range(40):
        records = method.losses(batch, t)
        total = records["loss_ce"] + records["loss_contrastive"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]


def test_a_frozen_encoder_keeps_weights_and_statistics(tiny):
    method = make_method(tiny, part="classifier")
    before = tiny.copied(method.student.state_dict())
    tiny.trainer(method, 4).train()
    after = method.student.state_dict()
    moved = {name.rpartition(".")[0] for name in after if not tiny.same(after[name], before[name])}
    heads = ("projection", "prototype_projection")
    expected = {f"{head}.{layer}" for head in heads for layer in (0, 1, 3)}
    assert moved == {"deployed.classifier", *expected}


@needs_fork
def test_ranks_train_one_network(tiny, tmp_path):
    def train(rank):
        method = make_method(tiny)
        distribute(method, Ranks.of_run())
        trainer = tiny.trainer(method, 2)
        trainer._batches = lambda start: iter(tiny.batch(rank, t, views=VIEWS) for t in range(2))
        trainer.train()
        return tiny.states(method)

    one, other = tiny.on_two_ranks(train, tmp_path)
    assert tiny.same(one, other)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_imwa_averages_encoder_heads_classifier_and_statistics(tiny, ema_decay):
    method, members = make_method(tiny, ema_decay=ema_decay), tiny.Members()
    tiny.trainer(method, 4, episodes=2, members=2, hooks=[members]).train()
    assert set(method.models()) == ({"student", "teacher"} if ema_decay else {"student"})
    tiny.check_average(method, members)


def test_one_member_in_two_episodes_is_plain_training_bitwise(tiny):
    plain, wrapped = make_method(tiny), make_method(tiny)
    tiny.trainer(plain, 4, imwa=False).train()
    tiny.trainer(wrapped, 4, episodes=2).train()
    assert tiny.same(tiny.states(plain), tiny.states(wrapped))


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_goes_on_from_its_saved_state_bitwise(tiny, step):
    save, straight = tiny.SaveAt(step), make_method(tiny, ema_decay=0.9)
    trainer = tiny.trainer(straight, 4, episodes=2, members=2)
    trainer.register_hooks([save])
    trainer.train()
    resumed = make_method(tiny, ema_decay=0.9)
    trainer = tiny.trainer(resumed, 4, episodes=2, members=2)
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))


def test_half_precision_gives_losses_in_float32(tiny):
    method, batch = make_method(tiny), tiny.batch(0, views=VIEWS)
    exact = method.losses(batch, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        records = method.losses(batch, 0)
    for name in ("loss_ce", "loss_contrastive"):
        assert records[name].dtype == torch.float32
        assert records[name].item() == pytest.approx(exact[name].item(), rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0 is not allowed"),
        ({"ce_weight": -1.0}, "ce_weight = -1.0 is not allowed"),
        ({"contrastive_weight": math.nan}, "contrastive_weight = nan is not allowed"),
        ({"iterations": 0}, "iterations = 0 is not allowed"),
        ({"part": "head"}, "part = 'head' is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        make_method(tiny, **settings)


def test_counts_of_other_classes_are_refused(tiny):
    with pytest.raises(ValueError, match=r"2 counts are not allowed .*the network's 3 classes"):
        BalancedContrastive(network(tiny), [5, 3], BCLOptions(), training=Training(1))


def test_one_class_alone_is_refused():
    alone = BCLNetwork(CifarResNet(1, depth=8), BCLOptions())
    with pytest.raises(ValueError, match=r"1 class is not allowed .*at least 2"):
        BalancedContrastive(alone, [5], BCLOptions(), training=Training(1))
