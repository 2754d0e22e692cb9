import math

import pytest
import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
)
from torch import nn

from ssod_imwa.engine.solver import build_optimizer, gradient_clipper, lr_multiplier


def build(model, name="SGD"):
    return build_optimizer(
        model, name=name, lr=0.1, momentum=0.8, weight_decay=1e-2, weight_decay_norm=1e-3
    )


def decays(optimizer):
    return {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_only_norm_layers_get_the_decay_of_norms(name):
    norms = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.SyncBatchNorm(4)]
    others = [nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Embedding(3, 4)]
    found = decays(build(nn.ModuleList([*norms, *others]), name))
    assert all(found[id(p)] == 1e-3 for layer in norms for p in layer.parameters())
    assert all(found[id(p)] == 1e-2 for layer in others for p in layer.parameters())


def test_frozen_parameters_are_left_out_and_shared_ones_occur_once():
    model = nn.ModuleList(
        [nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)]
    )
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    optimizer = build(model)
    assert [p for g in optimizer.param_groups for p in g["params"]] == [model[0].weight]


def test_groups_remember_the_rate_before_the_schedule():
    sgd, adamw = build(nn.Linear(2, 2)), build(nn.BatchNorm1d(2), "AdamW")
    assert sgd.param_groups[0]["initial_lr"] == sgd.param_groups[0]["lr"] == 0.1
    assert sgd.param_groups[0]["momentum"] == 0.8
    assert adamw.param_groups[0]["betas"] == (0.8, 0.999)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_nesterov_looks_ahead_along_the_new_momentum(momentum):
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    model = nn.ParameterList([weight])
    optimizer = build_optimizer(
        model,
        name="SGD",
        lr=0.1,
        momentum=momentum,
        weight_decay=0.01,
        weight_decay_norm=0.0,
        nesterov=True,
    )
    value, velocity = [1.0, -2.0], [0.0, 0.0]
    for step in range(4):
        gradients = [math.sin(step + 1), 0.3 * step]
        weight.grad = torch.tensor(gradients, dtype=torch.float64)
        optimizer.step()
        for i, gradient in enumerate(gradients):
            gradient += 0.01 * value[i]
            velocity[i] = momentum * velocity[i] + gradient
            value[i] -= 0.1 * (gradient + momentum * velocity[i])
        assert weight.tolist() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("name", "momentum"), [("SGD", 0.0), ("AdamW", 0.9)])
def test_nesterov_needs_sgds_momentum(name, momentum):
    with pytest.raises(ValueError, match="nesterov = True is not allowed with"):
        build_optimizer(
            nn.Linear(2, 2),
            name=name,
            lr=0.1,
            momentum=momentum,
            weight_decay=0.0,
            weight_decay_norm=0.0,
            nesterov=True,
        )


def test_unknown_optimizer_and_nothing_to_train_are_errors():
    with pytest.raises(ValueError, match="'Adam' is not known"):
        build(nn.Linear(2, 2), "Adam")
    with pytest.raises(ValueError, match="nothing to train"):
        build(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("warmup", [0, 10, 50, 100])
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_multiplier_equals_fvcores_schedulers(name, warmup):
    """Composed as detectron2 composes them: the warm-up ends at the schedule's own value."""
    total, steps, factor = 100, (30, 60), 0.01
    if name == "WarmupCosineLR":
        schedule = CosineParamScheduler(1, 0)
    else:
        schedule = MultiStepParamScheduler([1, 0.1, 0.01], milestones=steps, num_updates=total)
    reference = schedule
    if warmup:
        length = warmup / total
        line = LinearParamScheduler(factor * schedule(0.0), schedule(length))
        reference = CompositeParamScheduler(
            [line, schedule], [length, 1 - length], ["rescaled", "fixed"]
        )
    multiplier = lr_multiplier(
        name, max_iter=total, steps=steps, warmup_iters=warmup, warmup_factor=factor
    )
    for t in range(total):
        assert multiplier(t) == pytest.approx(reference(t / total), rel=1e-6, abs=1e-12), t


def test_expected_rates_written_out():
    multiplier = lr_multiplier(
        "WarmupMultiStepLR", max_iter=8, steps=(4, 6), warmup_iters=2, warmup_factor=0.5
    )
    expected = [0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [multiplier(t) for t in range(8)] == pytest.approx(expected)
    cosine = lr_multiplier("WarmupCosineLR", max_iter=4)
    expected = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [cosine(t) for t in range(4)] == pytest.approx(expected)


def test_a_cosine_after_the_warm_up_is_that_of_maes_code():
    total, warmup = 100, 5

    def in_epochs(epoch):  # LiVT and MAE: a line from 0, then half a cosine over what is left
        if epoch < warmup:
            return epoch / warmup
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (total - warmup)))

    for per_epoch in (1, 10):
        multiplier = lr_multiplier(
            "WarmupThenCosineLR",
            max_iter=total * per_epoch,
            warmup_iters=warmup * per_epoch,
            warmup_factor=0.0,
        )
        for t in range(total * per_epoch):
            assert multiplier(t) == pytest.approx(in_epochs(t / per_epoch), abs=1e-12), t
    plain, after = (
        lr_multiplier(name, max_iter=40, warmup_iters=0)
        for name in ("WarmupCosineLR", "WarmupThenCosineLR")
    )
    assert [plain(t) for t in range(40)] == [after(t) for t in range(40)]


@pytest.mark.parametrize("warmup", [10, 30])
def test_a_run_that_is_all_warm_up_rises_to_the_full_rate(warmup):
    multiplier = lr_multiplier(
        "WarmupThenCosineLR", max_iter=10, warmup_iters=warmup, warmup_factor=0.5
    )
    assert [multiplier(t) for t in range(10)] == pytest.approx([0.5 + t / 20 for t in range(10)])


def test_bad_schedules_are_errors():
    with pytest.raises(ValueError, match="ascending"):
        lr_multiplier("WarmupMultiStepLR", max_iter=8, steps=(6, 4))
    with pytest.raises(ValueError, match="'Poly' is not known"):
        lr_multiplier("Poly", max_iter=8)


def parameters_with_gradients():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    return parameters


def test_norm_clipping_bounds_all_gradients_together():
    parameters = parameters_with_gradients()
    gradient_clipper("norm", 1.0)(parameters)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-0.8]))


def test_value_clipping_bounds_each_element():
    parameters = parameters_with_gradients()
    gradient_clipper("value", 2.0)(parameters)
    assert parameters[0].grad.tolist() == [2.0, 0.0]
    assert parameters[1].grad.tolist() == [-2.0]


@pytest.mark.parametrize(("clip_type", "value"), [("norm", 0.0), ("l1", 1.0), ("value", math.nan)])
def test_bad_clipping_is_an_error(clip_type, value):
    with pytest.raises(ValueError, match="clip"):
        gradient_clipper(clip_type, value)


def test_part_of_a_cosine_ends_where_fixmatch_ends():
    multiplier = lr_multiplier("WarmupPartOfCosineLR", max_iter=400)
    expected = [1, 0.9415, 0.7730, 0.5141, 0.1951]  # cos(7 pi x / 16) at quarters
    assert [multiplier(t) for t in range(0, 401, 100)] == pytest.approx(expected, abs=5e-5)
    crest = lr_multiplier("WarmupPartOfCosineLR", max_iter=400, cosine_cycles=1 / 32)
    assert crest(300) == pytest.approx(math.cos(math.pi * 0.75 / 16))
    with pytest.raises(ValueError, match=r"cosine_cycles = 0.5 is not allowed \(must be 0..0.25\)"):
        lr_multiplier("WarmupPartOfCosineLR", max_iter=400, cosine_cycles=0.5)


def test_biases_are_left_out_of_the_decay_when_asked():
    model = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
    settings = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    optimizer = build_optimizer(
        model, **settings, weight_decay=1e-2, weight_decay_norm=1e-3, decay_biases=False
    )
    expected = dict(zip(map(id, model.parameters()), [1e-2, 0.0, 1e-3, 1e-3], strict=True))
    assert decays(optimizer) == expected
    usual = build_optimizer(model, **settings, weight_decay=1e-2, weight_decay_norm=1e-3)
    assert decays(usual)[id(model[0].bias)] == 1e-2
    assert len(usual.param_groups) == 2


@pytest.mark.parametrize("nesterov", [False, True])
def test_parameters_whose_gradients_begin_later_step_as_they_would_alone(nesterov):
    """A part that is frozen at first: the fused kernel wants momenta of all parameters or none."""
    settings = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    early, late, alone = (nn.Linear(2, 1, bias=False) for _ in range(3))
    alone.load_state_dict(late.state_dict())
    settings |= {"weight_decay": 0.01, "weight_decay_norm": 0.0}
    together = build_optimizer(nn.ModuleList([early, late]), **settings)
    reference = build_optimizer(alone, **settings)
    for step in range(4):
        early.weight.grad = torch.full_like(early.weight, 1.0 + step)
        if step >= 2:
            for layer in (late, alone):
                layer.weight.grad = torch.full_like(layer.weight, 0.5 * step)
            reference.step()
        together.step()
    assert torch.equal(late.weight, alone.weight)


def test_a_loss_scale_that_overflows_in_the_first_step_leaves_no_momentum():
    """The fused kernel allocates momenta in its first step, and skips writing them."""
    layer = nn.Linear(400, 400, bias=False)
    before = layer.weight.detach().clone()
    settings = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    optimizer = build_optimizer(layer, **settings, weight_decay=0.0, weight_decay_norm=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0):
        garbage = [torch.full_like(layer.weight, 1e30) for _ in range(20)]
        del garbage  # what is allocated next is likely to hold it
        optimizer.zero_grad()
        scaler.scale(factor * layer.weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1)
