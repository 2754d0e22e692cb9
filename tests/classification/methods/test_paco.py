import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import needs_fork

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.paco import (
    GPaCo,
    GPaCoOptions,
    PaCo,
    PaCoOptions,
    ParametricNetwork,
)
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.launch import distribute
from ssod_imwa.errors import ConfigError

VIEWS = PaCo.reads["labeled"]

both = pytest.mark.parametrize("kind", [PaCo, GPaCo])


def make_method(tiny, kind, *, iterations=4, part="all", seed=0, ema_decay=0.0, **settings):
    head, options_class = ("paco", PaCoOptions) if kind is PaCo else ("gpaco", GPaCoOptions)
    defaults = {"queue": 16, "temperature": 0.2, "alpha": 0.05, "width": 5}
    options = options_class(**{**defaults, **settings})
    network = tiny.build(lambda: ParametricNetwork(tiny.Net(), options, head=head))
    training = Training(iterations, part, ema_decay)
    return kind(network, tiny.COUNTS, options, training=training, seed=seed)


def in_float64(batch):
    part = batch["labeled"]
    views = {name: view.double() for name, view in part.views.items()}
    return Batch(labeled=replace(part, views=views))


def projected_by_hand(head, rows):
    """The layers in turn, in NumPy, batch norm by the rows, and to length 1."""
    for layer in head:
        p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
        if isinstance(layer, torch.nn.Linear):
            rows = rows @ p["weight"].T + p["bias"]
        elif isinstance(layer, torch.nn.ReLU):
            rows = np.maximum(rows, 0)
        else:
            rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
            rows = rows * p["weight"] + p["bias"]
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def outputs_by_hand(network, views):
    with torch.no_grad():
        features = network.deployed.features(views).numpy()
    weight, bias = (p.detach().numpy() for p in network.deployed.classifier.parameters())
    return features @ weight.T + bias, projected_by_hand(network.projection, features)


def loss_by_hand(logits, labels, features, others, other_labels, counts, *, alpha, temperature):
    pool, pool_labels = [*features, *others], [*labels, *other_labels]
    total = 0.0
    for i, label in enumerate(labels):
        scores, weights = [], []
        for c, count in enumerate(counts):
            scores.append(logits[i][c] + math.log(count / sum(counts)))
            weights.append(1.0 if c == label else 0.0)
        for j, row in enumerate(pool):
            if j != i:
                scores.append(float(features[i] @ row) / temperature)
                weights.append(alpha if pool_labels[j] == label else 0.0)
        bottom = math.log(sum(math.exp(s) for s in scores))
        logs = [w * (s - bottom) for s, w in zip(scores, weights, strict=True)]
        total -= sum(logs) / sum(weights)
    return total / len(labels)


def filled(tiny, kind, **settings):
    """A method whose queue holds features of classes."""
    method = make_method(tiny, kind, **settings)
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(10, 5, generator=generator), dim=1)
    method.queue.write_(rows, torch.randint(3, (10,), generator=generator))
    return method


def test_pacos_loss_is_that_of_the_queries_with_keys_and_queue(tiny):
    method = filled(tiny, PaCo)
    method.student.double()
    method.slow.model.double()
    with torch.no_grad():  # a slow network that is not the student
        for parameter in method.slow.model.parameters():
            parameter.mul_(1.1)
    batch = in_float64(tiny.batch(0, views=VIEWS))
    loss = method.losses(batch, 0)["loss"].item()
    logits, queries = outputs_by_hand(method.student, batch["labeled"].views["image"])
    _, keys = outputs_by_hand(method.slow.model, batch["labeled"].views["key"])
    labels = batch["labeled"].targets.tolist()
    expected = loss_by_hand(
        logits.tolist(),
        labels,
        queries,
        [*keys, *method.queue.features.double().numpy()],
        [*labels, *method.queue.labels.tolist()],
        tiny.COUNTS,
        alpha=0.05,
        temperature=0.2,
    )
    assert loss == pytest.approx(expected, rel=1e-6)  # prior and queue are kept in float32


def test_gpacos_loss_is_that_of_both_views_with_the_queue(tiny):
    method = filled(tiny, GPaCo)
    method.student.double()
    batch = in_float64(tiny.batch(0, views=VIEWS))
    loss = method.losses(batch, 0)["loss"].item()
    # A pass for each view, whose batch norms see B images.
    passes = [outputs_by_hand(method.student, view) for view in batch["labeled"].views.values()]
    logits, features = (np.concatenate(part) for part in zip(*passes, strict=True))
    expected = loss_by_hand(
        logits.tolist(),
        batch["labeled"].targets.tolist() * 2,
        features,
        method.queue.features.double().numpy(),
        method.queue.labels.tolist(),
        tiny.COUNTS,
        alpha=0.05,
        temperature=0.2,
    )
    assert loss == pytest.approx(expected, rel=1e-6)


@both
def test_the_student_gets_gradients_and_the_slow_network_none(tiny, kind):
    method = make_method(tiny, kind)
    method.losses(tiny.batch(0, views=VIEWS), 0)["loss"].backward()
    assert tiny.without_gradient(method.student) == set()
    if kind is PaCo:
        assert all(p.grad is None for p in method.slow.model.parameters())
    assert not method.queue.features.requires_grad


def test_only_paco_has_a_slow_network(tiny):
    assert set(make_method(tiny, PaCo, ema_decay=0.9).models()) == {
        "student",
        "teacher",
        "momentum",
    }
    assert set(make_method(tiny, GPaCo).models()) == {"student"}


def test_the_slow_network_follows_the_student_after_each_step(tiny):
    method, seen = make_method(tiny, PaCo, momentum=0.75), []
    names = dict(method.student.named_parameters())
    expected = {name: value.detach().double().clone() for name, value in names.items()}
    after_step = method.after_step

    def follow(t):
        after_step(t)
        for name, value in names.items():
            expected[name] = 0.75 * expected[name] + 0.25 * value.detach().double()
        seen.append(t)

    method.after_step = follow
    tiny.trainer(method, 4, imwa=False).train()
    assert seen == [0, 1, 2, 3]
    for name, value in method.slow.model.named_parameters():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-7), name


def test_the_slow_networks_statistics_are_of_its_own_views(tiny):
    method = make_method(tiny, PaCo)
    norm = method.slow.model.deployed.stem[1]
    batch = tiny.batch(0, views=VIEWS)
    with torch.no_grad():
        maps = method.slow.model.deployed.stem[0](batch["labeled"].views["key"])
    method.set_train_mode()
    method.losses(batch, 0)
    method.after_step(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean((0, 2, 3)))


@both
def test_the_queue_takes_second_views_after_the_step(tiny, kind):
    method = make_method(tiny, kind)
    batch = tiny.batch(0, views=VIEWS)
    before = tiny.copied(method.queue.state_dict())
    network = method.slow.model if kind is PaCo else method.student
    _, keys = outputs_by_hand(network, batch["labeled"].views["key"])
    method.losses(batch, 0)
    assert tiny.same(method.queue.state_dict(), before)
    method.after_step(0)
    assert method.queue.filled == 6
    assert torch.equal(method.queue.labels[:6], batch["labeled"].targets)
    np.testing.assert_allclose(method.queue.features[:6].numpy(), keys, rtol=1e-3, atol=1e-5)
    method.after_step(1)  # a step's features are written once
    assert method.queue.filled == 6


@both
def test_what_a_dropped_member_left_is_not_written(tiny, kind):
    method = make_method(tiny, kind)
    state = tiny.copied(method.state_dict())
    method.losses(tiny.batch(0, views=VIEWS), 0)
    method.load_state_dict(state)
    method.after_step(0)
    assert method.queue.filled == 0


@both
def test_the_queue_takes_all_micro_batches_of_a_step(tiny, kind):
    method = make_method(tiny, kind)
    tiny.trainer(method, 2, imwa=False, accumulation=2).train()
    labels = torch.cat([tiny.batch(0, t, views=VIEWS)["labeled"].targets for t in range(2)])
    assert torch.equal(method.queue.labels[:12].sort().values, labels.sort().values)


@needs_fork
@both
def test_ranks_have_one_queue_of_all_their_features(tiny, tmp_path, kind):
    def train(rank):
        method = make_method(tiny, kind)
        distribute(method, Ranks.of_run())
        trainer = tiny.trainer(method, 2)
        trainer._batches = lambda start: (
            tiny.batch(0, t, views=VIEWS).split(2)[rank] for t in range(start, 2)
        )
        trainer.train()
        return tiny.states(method)

    one, other = tiny.on_two_ranks(train, tmp_path)
    assert tiny.same(one, other)
    parts = [
        part["labeled"].targets for t in range(2) for part in tiny.batch(0, t, views=VIEWS).split(2)
    ]
    assert torch.equal(one["own"]["queue"]["labels"][:12], torch.cat(parts))
    assert not torch.equal(parts[0], parts[1])


@both
def test_the_first_queue_is_of_no_class_and_a_function_of_the_seed(tiny, kind):
    queues = [make_method(tiny, kind, seed=seed).queue for seed in (0, 0, 1)]
    assert (queues[0].labels == -1).all()
    assert torch.equal(queues[0].features, queues[1].features)
    assert not torch.equal(queues[0].features, queues[2].features)


@both
def test_evaluation_gives_the_classifiers_logits(tiny, kind):
    method = make_method(tiny, kind)
    tiny.trainer(method, 4).train()
    images = tiny.batch(1)["labeled"].views["image"]
    model = method.inference_model(3).eval()
    logits = model(images)
    assert torch.equal(logits, model.deployed.classifier(model.deployed.features(images)))
    assert logits.shape == (len(images), 3)


@both
def test_training_lowers_the_loss(tiny, kind):
    method, losses = make_method(tiny, kind, iterations=60), []
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.1, momentum=0.9)
    batch = tiny.batch(0, views=VIEWS)
    for t in range(60):
        loss = method.losses(batch, t)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(t)
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@both
def test_every_member_has_a_queue_of_its_own(tiny, kind):
    """Labels of batches are a function of member and own iteration."""
    method, seen = make_method(tiny, kind, queue=24), []

    def look(position):
        batches = [tiny.batch(position.member, t, views=VIEWS) for t in range(position.t + 1)]
        own = torch.cat([batch["labeled"].targets for batch in batches]).tolist()
        assert method.queue.labels.tolist() == own + [-1] * (24 - len(own))
        seen.append((position.member, position.t))

    trainer = tiny.trainer(method, 4, episodes=2, members=2, hooks=[tiny.Watch(look)])
    trainer.train()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


@both
def test_imwa_averages_every_model(tiny, kind):
    method, members = make_method(tiny, kind, ema_decay=0.9), tiny.Members()
    tiny.trainer(method, 4, episodes=2, members=2, hooks=[members]).train()
    tiny.check_average(method, members)


@both
def test_one_member_in_two_episodes_is_plain_training_bitwise(tiny, kind):
    plain, wrapped = make_method(tiny, kind), make_method(tiny, kind)
    tiny.trainer(plain, 4, imwa=False).train()
    tiny.trainer(wrapped, 4, episodes=2).train()
    assert tiny.same(tiny.states(plain), tiny.states(wrapped))


@both
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_run_goes_on_from_its_saved_state_bitwise(tiny, kind, step):
    save, straight = tiny.SaveAt(step), make_method(tiny, kind)
    trainer = tiny.trainer(straight, 4, episodes=2, members=2)
    trainer.register_hooks([save])
    trainer.train()
    resumed = make_method(tiny, kind, seed=5)
    trainer = tiny.trainer(resumed, 4, episodes=2, members=2)
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))


@both
def test_a_frozen_encoder_keeps_weights_and_statistics(tiny, kind):
    method = make_method(tiny, kind, part="classifier")
    models = method.models()
    before = {name: tiny.copied(model.state_dict()) for name, model in models.items()}
    tiny.trainer(method, 4, episodes=2, members=2).train()
    for name, model in models.items():
        after = model.state_dict()
        moved = {key for key in after if not tiny.same(after[key], before[name][key])}
        assert {key.split(".")[0] for key in moved} == {"deployed", "projection"}
        encoder = {key for key in moved if key.startswith("deployed.")}
        assert encoder == {"deployed.classifier.weight", "deployed.classifier.bias"}


@both
def test_half_precision_gives_a_loss_in_float32(tiny, kind):
    method, batch = make_method(tiny, kind), tiny.batch(0, views=VIEWS)
    exact = method.losses(batch, 0)["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method.losses(batch, 0)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.05)


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha = -0.1 is not allowed"),
        ({"temperature": 0.0}, "temperature = 0.0 is not allowed"),
        ({"queue": 0}, "queue = 0 is not allowed"),
        ({"part": "head"}, "part = 'head' is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(tiny, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make_method(tiny, kind, **settings)


def test_pacos_momentum_is_checked(tiny):
    with pytest.raises(ValueError, match=r"momentum = 1\.5 is not allowed"):
        make_method(tiny, PaCo, momentum=1.5)


def test_one_image_has_no_batch_statistics(tiny):
    with pytest.raises(ConfigError, match=r"leave 1 image a pass .*must be at least 2: PaCo's"):
        make_method(tiny, PaCo).losses(tiny.batch(0, views=VIEWS, size=1), 0)
    method = make_method(tiny, GPaCo)
    assert method.losses(tiny.batch(0, views=VIEWS, size=1), 0)["loss"].isfinite()
