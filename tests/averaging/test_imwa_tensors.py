"""What IMWA does with shared and frozen parameters, buffers and batch norm."""

import copy

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA


def test_layer_shared_by_student_and_teacher_is_averaged_once():
    student = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    teacher = nn.Sequential(student[0], copy.deepcopy(student[1]))
    schedule = EpisodeSchedule(1, members=2)
    imwa = IMWA(schedule, {"student": student, "teacher": teacher})
    for g, value in enumerate((1.0, 4.0)):
        imwa.before_step(g)
        nn.init.constant_(student[0].weight, value)
        imwa.after_step(g)
    assert student[0].weight.item() == 2.5
    assert teacher[0].weight is student[0].weight


def test_frozen_parameters_are_not_stored(loop):
    run = loop.Run()
    run.student[0].weight.requires_grad_(False)
    schedule = EpisodeSchedule(2, members=2)
    imwa = run.imwa(schedule)
    before = run.student[0].weight.clone()
    run.train(schedule, imwa, steps=[0])
    assert not any(name.endswith(".0.weight") for name in imwa.state_dict()["store"]["start"])
    run.train(schedule, imwa, steps=[1, 2, 3])
    assert torch.equal(run.student[0].weight, before)
    assert torch.equal(run.teacher[0].weight, before)


@pytest.mark.parametrize("members", [1, 2])
def test_frozen_parameter_that_changes_is_an_error(loop, members):
    run = loop.Run()
    run.student[0].bias.requires_grad_(False)
    schedule = EpisodeSchedule(1, members=members)
    imwa = run.imwa(schedule)
    imwa.before_step(0)
    nn.init.ones_(run.student[0].bias)
    with pytest.raises(ValueError, match=r"student\.0\.bias has changed although it required no"):
        imwa.after_step(0)


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter or buffer of \['m'\] can be averaged"):
        IMWA(EpisodeSchedule(1), {"m": nn.Linear(1, 1).requires_grad_(False)})


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
        self.register_buffer("ids", torch.tensor([1, 2]))


def test_infinite_mask_is_no_divergence():
    model = Masked()
    schedule = EpisodeSchedule(1, members=2)
    imwa = IMWA(schedule, {"m": model})
    for g in range(2):
        imwa.before_step(g)
        imwa.after_step(g)
    assert model.mask.tolist() == [0.0, float("-inf")]


def test_buffers_of_a_member_do_not_leak_into_the_next():
    model = Masked()
    imwa = IMWA(EpisodeSchedule(1, members=2), {"m": model})
    imwa.before_step(0)
    model.mask[0] = 5.0
    imwa.after_step(0)
    assert model.mask[0] == 0


@pytest.mark.parametrize("store", ["dict", "stream"])
def test_integer_buffers_that_differ_are_an_error_and_change_nothing(store):
    model = Masked()
    imwa = IMWA(EpisodeSchedule(1, members=2), {"m": model}, store=store)
    imwa.before_step(0)
    nn.init.constant_(model.weight, 1.0)
    imwa.after_step(0)
    imwa.before_step(1)
    nn.init.constant_(model.weight, 3.0)
    model.ids[1] = 9
    with pytest.raises(ValueError, match=r"m\.ids .* differs between members: 2 and 9"):
        imwa.after_step(1)
    assert model.weight.item() == 3
    model.ids[1] = 2
    assert imwa.after_step(1)
    assert model.weight.item() == 2


# --------------------------------------------------------------------------------------- batch norm


def batchnorm_run(means, variances=(1.0, 1.0), **options):
    model = nn.BatchNorm1d(1)
    imwa = IMWA(EpisodeSchedule(1, members=len(means)), {"m": model}, **options)
    for g, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        imwa.before_step(g)
        model.running_mean.fill_(mean)
        model.running_var.fill_(variance)
        model.num_batches_tracked.fill_(10 - g)
        imwa.after_step(g)
    return model


def test_statistics_are_averaged_and_counters_take_the_largest():
    model = batchnorm_run((0.0, 1.0), (2.0, 4.0))
    assert (model.running_mean.item(), model.running_var.item()) == (0.5, 3)
    assert model.num_batches_tracked.item() == 10


def test_statistics_of_the_last_member_can_be_kept():
    model = batchnorm_run((0.0, 1.0), (2.0, 4.0), bn="keep")
    assert (model.running_mean.item(), model.running_var.item()) == (1, 4)


def test_statistics_can_be_recomputed_on_the_averaged_modules():
    def recompute(modules):
        assert modules["m"].running_mean.item() == 0.5
        modules["m"].running_mean.fill_(-1.0)

    assert batchnorm_run((0.0, 1.0), bn="recompute", recompute_bn=recompute).running_mean == -1


@pytest.mark.parametrize("store", ["dict", "stream"])
def test_means_far_apart_are_warned_about(caplog, store):
    batchnorm_run((0.0, 4.0), store=store)
    assert "differ by 4.0 running standard deviations (m.running_mean)" in caplog.text


def test_means_close_by_are_not_warned_about(caplog):
    batchnorm_run((0.0, 4.0), (2.0, 2.0))
    assert caplog.text == ""
