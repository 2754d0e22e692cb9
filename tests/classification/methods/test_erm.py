import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.losses.build import LOSSES
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.erm import EmpiricalRisk, ERMOptions
from ssod_imwa.classification.mixers import MIXERS
from ssod_imwa.classification.mixing import mfw_strengths
from ssod_imwa.classification.models.heads import ScaledClassifier
from ssod_imwa.classification.models.vit import ViT, layer_decay_groups
from ssod_imwa.engine.hooks import LRHook
from ssod_imwa.engine.solver import lr_multiplier

ENCODER = ("stem", "layer1")


def make_method(
    tiny,
    loss="cross_entropy",
    *,
    student=None,
    mix="none",
    layers=(),
    of=None,
    move_statistics="none",
    **settings,
):
    """A method; `layers` are names of the mixed layers, `of` the criterion's settings."""
    student = student or tiny.build(tiny.Net)
    mixer = MIXERS[mix]
    inside = {"layers": list(layers)} if mixer.mixes_features else {}
    mixing = mixer.options_class(**({} if mix == "none" else {"alpha": 2.0, **inside}))
    return EmpiricalRisk(
        student,
        LOSSES[loss](tiny.COUNTS, LOSSES[loss].options_class(**(of or {}))),
        ERMOptions(move_statistics),
        training=Training(**{"iterations": 10, **settings}),
        mixer=mixer(tiny.COUNTS, mixing, student),
    )


def log_softmax(row):
    return [x - math.log(sum(map(math.exp, row))) for x in row]


def weighted_by_hand(logits, labels, weights):
    logs = [log_softmax(row)[y] for row, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    own = [weights[y] for y in labels.tolist()]
    return -sum(w * p for w, p in zip(own, logs, strict=True)) / sum(own)


def effective_weights(counts, beta=0.9999):
    weights = [(1 - beta) / (1 - beta**n) for n in counts]
    return [w * len(weights) / sum(weights) for w in weights]


def losses(method, batch, t=0, *, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return method.losses(batch, t)


def drawn(method, batch, *, seed=0):
    """The mixing that `losses` draws after the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return method.mixer.draw(batch["labeled"].targets, batch["labeled"].views["image"].shape)


def moved(tiny, module, before):
    after = module.state_dict()
    return {name for name in after if not tiny.same(after[name], before[name])}


def test_plain_training_is_cross_entropy_on_the_view(tiny):
    method, batch = make_method(tiny), tiny.batch(0)
    logits = method.student(batch["labeled"].views["image"])
    records = losses(method, batch)
    expected = weighted_by_hand(logits, batch["labeled"].targets, [1.0, 1.0, 1.0])
    assert records["loss"].item() == pytest.approx(expected, rel=1e-5)
    rows = zip(logits.tolist(), batch["labeled"].targets.tolist(), strict=True)
    right = sum(row.index(max(row)) == y for row, y in rows)
    assert records["train_accuracy"].item() == pytest.approx(100 * right / 6)


@pytest.mark.parametrize(("t", "weighted"), [(0, False), (7, False), (8, True), (9, True)])
def test_drw_weights_classes_in_the_last_fifth_of_the_iterations(tiny, t, weighted):
    method = make_method(tiny, of={"weights": "effective_number", "weights_from": 0.8})
    batch = tiny.batch(0)
    weights = effective_weights(tiny.COUNTS) if weighted else [1.0, 1.0, 1.0]
    expected = weighted_by_hand(
        method.student(batch["labeled"].views["image"]), batch["labeled"].targets, weights
    )
    assert losses(method, batch, t)["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("t", "weighted"), [(7, False), (8, True)])
def test_ldam_drw_takes_cosines_as_logits(tiny, t, weighted):
    student = tiny.build(lambda: tiny.Net("cosine", scale=1.0))
    of = {"weights": "effective_number", "weights_from": 0.8}
    method, batch = make_method(tiny, "ldam", student=student, of=of), tiny.batch(0)
    features = student.features(batch["labeled"].views["image"]).detach().double()
    cosines = F.cosine_similarity(features[:, None], student.classifier.weight.detach().double(), 2)
    margins = [0.5 * (4 / n) ** 0.25 for n in tiny.COUNTS]
    for n, y in enumerate(batch["labeled"].targets.tolist()):
        cosines[n, y] -= margins[y]
    weights = effective_weights(tiny.COUNTS) if weighted else [1.0, 1.0, 1.0]
    expected = weighted_by_hand(30 * cosines, batch["labeled"].targets, weights)
    assert losses(method, batch, t)["loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["mixup", "remix", "mixup_or_cutmix"])
@pytest.mark.parametrize("loss", ["cross_entropy", "balanced_softmax", "balanced_bce"])
def test_mixed_images_are_trained_on_mixed_labels(tiny, kind, loss):
    method, batch = make_method(tiny, loss, mix=kind), tiny.batch(0)
    records, mixing = losses(method, batch), drawn(method, batch)
    logits = method.student(mixing.images(batch["labeled"].views["image"]))
    assert not torch.equal(logits, method.student(batch["labeled"].views["image"]))
    expected = method.criterion(logits, mixing.targets, progress=0.0)
    torch.testing.assert_close(records["loss"], expected)


@pytest.mark.parametrize(("mix", "layer"), [("manifold", "layer1"), ("mfw", "stem")])
def test_features_are_mixed_after_their_layer_and_only_in_the_step(tiny, mix, layer):
    method, batch = make_method(tiny, mix=mix, layers=[layer]), tiny.batch(0)
    student, mixing = method.student, drawn(method, batch)
    clean = student(batch["labeled"].views["image"])
    records = losses(method, batch)
    maps = student.stem(batch["labeled"].views["image"])
    maps = student.layer1(maps) if layer == "layer1" else maps
    own = torch.ones(6) - mixing.shares
    mixed = torch.stack(
        [
            own[n] * maps[n] + mixing.shares.expand(6)[n] * maps[mixing.permutation[n]]
            for n in range(6)
        ]
    )
    mixed = student.layer1(mixed) if layer == "stem" else mixed
    logits = student.classifier(student.pool(mixed))
    logs = F.log_softmax(logits, 1)
    rows = mixing.targets if mix == "manifold" else F.one_hot(batch["labeled"].targets, 3)
    torch.testing.assert_close(records["loss"], -(rows * logs).sum(1).mean())
    assert torch.equal(student(batch["labeled"].views["image"]), clean)
    assert not any(module._forward_hooks for module in student.modules())


def test_mfw_has_the_strengths_of_the_counts(tiny):
    method, batch = make_method(tiny, mix="mfw", layers=["stem"]), tiny.batch(0)
    shares = torch.stack([drawn(method, batch, seed=seed).shares for seed in range(300)])
    strengths = mfw_strengths(tiny.COUNTS)[batch["labeled"].targets]
    expected = strengths / 2  # Beta(2, 2) has the mean 1/2
    torch.testing.assert_close(shares.mean(0), expected, rtol=0.12, atol=0)


@pytest.mark.parametrize("layer", ["input", "stem", "layer1"])
def test_mfw_of_no_strength_is_plain_training_bitwise(tiny, layer):
    plain, weakened = make_method(tiny), make_method(tiny, mix="mfw", layers=[layer])
    full = make_method(tiny, mix="mfw", layers=[layer])
    weakened.mixer._strengths.zero_()
    for method in (plain, weakened, full):
        tiny.trainer(method, 5, imwa=False).train()
    assert tiny.same(tiny.states(plain), tiny.states(weakened))
    assert not tiny.same(tiny.states(plain), tiny.states(full))


@pytest.mark.parametrize("move_statistics", ["none", "all"])
def test_a_frozen_encoder_keeps_its_weights_and_moves_statistics_if_asked(tiny, move_statistics):
    method = make_method(tiny, part="classifier", move_statistics=move_statistics)
    student = method.student
    before = tiny.copied(student.state_dict())
    method.set_train_mode()
    losses(method, tiny.batch(0))["loss"].backward()
    frozen = {name for name, _ in student.named_parameters() if name.startswith(ENCODER)}
    assert tiny.without_gradient(student) == frozen
    tiny.trainer(method, 4, episodes=2, members=2).train()
    classifier = {"classifier.weight", "classifier.bias"}
    statistics = {name for name, _ in student.named_buffers()}
    expected = classifier | statistics if move_statistics == "all" else classifier
    assert moved(tiny, student, before) == expected


def test_a_moving_statistic_is_that_of_the_data(tiny):
    method = make_method(tiny, part="classifier", move_statistics="all")
    batch, norm = tiny.batch(0), method.student.stem[1]
    with torch.no_grad():
        maps = method.student.stem[0](batch["labeled"].views["image"])
    method.set_train_mode()
    losses(method, batch)
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean((0, 2, 3)))


def test_learnable_scales_alone_are_trained(tiny):
    student = tiny.build(tiny.Net)
    student.classifier = ScaledClassifier(student.classifier)
    before = tiny.copied(student.state_dict())
    tiny.trainer(make_method(tiny, student=student, part="scale"), 3).train()
    assert moved(tiny, student, before) == {"classifier.scale"}


def test_the_teacher_is_the_moving_average_and_is_shipped(tiny):
    method = make_method(tiny, ema_decay=0.6, mix="manifold", layers=["stem"])
    students = []
    watch = tiny.Watch(lambda _: students.append(tiny.copied(method.student.state_dict())))
    tiny.trainer(method, 4, hooks=[watch]).train()
    assert method.inference_model(3) is method.teacher.model
    name = "layer1.0.weight"
    expected = students[0][name].double()
    for decay, student in zip((0.5, 0.6, 0.6), students[1:], strict=True):
        expected = decay * expected + (1 - decay) * student[name].double()
    result = method.teacher.model.get_parameter(name).double()
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mix", ["none", "mfw", "manifold"])
def test_imwa_averages_students_and_teachers(tiny, mix):
    layers = [] if mix == "none" else ["stem"]
    method, members = make_method(tiny, mix=mix, layers=layers, ema_decay=0.9), tiny.Members()
    tiny.trainer(method, 4, episodes=2, members=2, hooks=[members]).train()
    tiny.check_average(method, members)


def test_one_member_in_two_episodes_is_plain_training_bitwise(tiny):
    plain, wrapped = (make_method(tiny, mix="manifold", layers=["input", "stem"]) for _ in range(2))
    tiny.trainer(plain, 4, imwa=False).train()
    tiny.trainer(wrapped, 4, episodes=2).train()
    assert tiny.same(tiny.states(plain), tiny.states(wrapped))


def livt(tiny):
    """LiVT's fine-tuning of a tiny transformer, and its optimizer."""
    student = tiny.build(
        lambda: ViT(3, image_size=8, patch_size=2, dim=16, depth=2, heads=2, drop_path=0.1)
    )
    groups = layer_decay_groups(student, lr=5e-3, weight_decay=0.05, layer_decay=0.75)
    method = make_method(
        tiny,
        "balanced_bce",
        student=student,
        mix="mixup_or_cutmix",
        of={"smoothing": [0.1, 0.0]},
    )
    return method, torch.optim.AdamW(groups)


def test_livt_fine_tunes_a_transformer_with_rates_that_decay_by_layer(tiny):
    method, optimizer = livt(tiny)
    student, batch = method.student, tiny.batch(0)
    start = method.criterion(
        student.eval()(batch["labeled"].views["image"]), batch["labeled"].targets, progress=0.0
    ).item()
    # The classifier begins near 0, so every class has its prior: C binary questions.
    priors = [n / sum(tiny.COUNTS) for n in tiny.COUNTS]
    expected = 0.0
    for y in batch["labeled"].targets.tolist():
        for c, prior in enumerate(priors):
            share = 0.9 * (c == y) + 0.1 / 3
            expected -= (share * math.log(prior) + (1 - share) * math.log(1 - prior)) / 6
    assert start == pytest.approx(expected, rel=1e-3)
    trainer = tiny.trainer(method, 30, optimizer=optimizer)
    multiplier = lr_multiplier("WarmupCosineLR", max_iter=30, warmup_iters=3, warmup_factor=0.1)
    trainer.register_hooks([LRHook(multiplier)])
    seen = []
    trainer._batches = lambda start: iter([batch] * 30)
    trainer.register_hooks([tiny.Watch(lambda _: seen.append(optimizer.param_groups[0]["lr"]))])
    trainer.train()
    end = method.criterion(
        student.eval()(batch["labeled"].views["image"]), batch["labeled"].targets, progress=0.0
    ).item()
    assert end < 0.8 * start
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert [rate / rates[-1] for rate in rates] == pytest.approx([0.75**3, 0.75**2, 0.75, 1.0])
    assert max(seen) > 5 * seen[-1]
    assert tiny.without_gradient(student) == set()


def test_imwa_averages_livts_transformers(tiny):
    method, optimizer = livt(tiny)
    members = tiny.Members()
    run = {"episodes": 2, "members": 2, "hooks": [members], "optimizer": optimizer}
    tiny.trainer(method, 4, **run).train()
    tiny.check_average(method, members)


@pytest.mark.parametrize("loss", ["focal", "ldam", "gml", "label_aware_smoothing"])
def test_mixed_labels_are_refused_by_losses_that_cannot_take_them(tiny, loss):
    with pytest.raises(ValueError, match=f"mixup with {loss} is not allowed"):
        make_method(tiny, loss, mix="mixup")


@pytest.mark.parametrize(("t", "weighted"), [(7, False), (8, True)])
def test_remix_drw_weights_mixed_labels_in_the_last_fifth(tiny, t, weighted):
    of = {"weights": "effective_number", "weights_from": 0.8}
    method, batch = make_method(tiny, mix="remix", of=of), tiny.batch(0)
    mixing = drawn(method, batch)
    logits = method.student(mixing.images(batch["labeled"].views["image"])).log_softmax(1).tolist()
    weights = effective_weights(tiny.COUNTS) if weighted else [1.0, 1.0, 1.0]
    top = bottom = 0.0
    for row, shares in zip(logits, mixing.targets.tolist(), strict=True):
        for log_p, share, weight in zip(row, shares, weights, strict=True):
            top -= weight * share * log_p
            bottom += weight * share
    assert losses(method, batch, t)["loss"].item() == pytest.approx(top / bottom, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, r"iterations = 0 is not allowed"),
        ({"ema_decay": 1.0}, r"ema_decay = 1\.0 is not allowed"),
        ({"part": "head"}, r"part = 'head' is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        make_method(tiny, **settings)


def test_mfw_does_not_mix_labels_so_every_loss_goes_with_it(tiny):
    for loss in ("focal", "gml", "label_aware_smoothing", "balanced_bce"):
        method = make_method(tiny, loss, mix="mfw", layers=["stem"])
        assert losses(method, tiny.batch(0))["loss"].isfinite()
    assert isinstance(method.mixer.layer, nn.Sequential)
