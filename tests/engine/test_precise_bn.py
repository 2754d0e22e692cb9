import torch
from torch import nn

from ssod_imwa.engine.precise_bn import build_recomputation


class Rows:
    """A batch of rows."""

    def __init__(self, number):
        self.rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(number)) + number

    def to(self, device):
        return self


def batches(start):
    return map(Rows, range(start, 9))


def make_model():
    return nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()


def recompute(models, **changes):
    settings = {
        "count": 4,
        "set_train_mode": lambda model: model[0].train(),
        "forward": lambda model, batch: model(batch.rows),
    }
    build_recomputation(batches, **{**settings, **changes})(models)


def test_statistics_are_those_of_the_first_batches():
    models = {"student": make_model(), "teacher": make_model()}
    recompute(models)
    rows = torch.stack([Rows(number).rows for number in range(4)])
    for model in models.values():
        torch.testing.assert_close(model[0].running_mean, rows.mean((0, 1)))
        torch.testing.assert_close(model[0].running_var, rows.flatten(0, 1).var(0, correction=0))


def test_only_what_trains_is_estimated_and_all_modes_are_put_back():
    model = make_model()
    before = model[1].running_mean.clone()
    recompute({"student": model})
    assert torch.equal(model[1].running_mean, before)
    assert not any(module.training for module in model.modules())


def test_random_generators_are_left_alone():
    state = torch.get_rng_state()
    recompute({"student": make_model()}, forward=lambda model, batch: model(torch.rand(4, 3)))
    assert torch.equal(torch.get_rng_state(), state)
