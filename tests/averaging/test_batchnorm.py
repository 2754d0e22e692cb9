import pytest
import torch
from torch import nn

from ssod_imwa.averaging.batchnorm import statistics_names, warn_if_far_apart


class FrozenNorm(nn.Module):
    """As detectors have it: all of it buffers."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(2))


def test_every_kind_of_batch_norm_is_found():
    model = nn.Sequential(
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, track_running_stats=False),
        FrozenNorm(),
        nn.LayerNorm(2),
    )
    names = statistics_names({"m": model, "n": nn.BatchNorm1d(1)})
    assert names == [
        ("m.0.running_mean", "m.0.running_var"),
        ("m.2.running_mean", "m.2.running_var"),
        ("n.running_mean", "n.running_var"),
    ]


@pytest.mark.parametrize(
    ("means", "variances", "gap"),
    [
        ([[0.0, 0.0], [4.0, 0.0]], [[1.0, 1.0]] * 2, 4.0),
        ([[0.0, 1.0], [0.0, -2.0], [0.0, 8.0]], [[1.0, 2.0], [1.0, 4.0], [1.0, 6.0]], 5.0),
        ([[0.0, 0.0], [2.9, 0.0]], [[1.0, 1.0]] * 2, None),
    ],
)
def test_gap_is_in_running_standard_deviations(caplog, means, variances, gap):
    members = [
        {"b.running_mean": torch.tensor(mean), "b.running_var": torch.tensor(variance)}
        for mean, variance in zip(means, variances, strict=True)
    ]
    warn_if_far_apart(members)
    assert (f"differ by {gap} running" in caplog.text) == (gap is not None)
    assert bool(caplog.text) == (gap is not None)


def test_models_without_batch_norm_are_fine(caplog):
    warn_if_far_apart([{}, {}])
    assert caplog.text == ""
