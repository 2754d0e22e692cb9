import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.averaging.weights import average
from ssod_imwa.classification.models.resnet12 import Block, DropBlock, ResNet12


def ramped(part, size):
    block = DropBlock(part, size).train()
    block.num_batches_tracked.fill_(40_000)
    return block


def test_parameters_are_those_counted_by_hand():
    with torch.device("meta"):
        model = ResNet12(351)
    widths = [(3, 64), (64, 160), (160, 320), (320, 640)]
    # Three 3x3 and one 1x1 convolutions, each with batch norm.
    blocks = sum(9 * (c * w + 2 * w * w) + c * w + 8 * w for c, w in widths)
    assert sum(p.numel() for p in model.parameters()) == blocks + 641 * 351
    assert round(blocks / 1e6, 2) == 12.42  # as few-shot papers report


def test_maps_of_84_pixels_end_at_5():
    model = ResNet12(3).eval()
    x, shapes = torch.zeros(1, 3, 84, 84), []
    for group in model.groups:
        x = group(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 42, 42), (160, 21, 21), (320, 10, 10), (640, 5, 5)]


def test_block_is_convolutions_with_batch_norm_beside_a_matrix():
    torch.manual_seed(0)
    block = Block(3, 4, nn.Identity()).train()
    x = torch.randn(5, 3, 7, 7)

    def normalized(maps):
        mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), False, keepdim=True)
        return (maps - mean) / (var + 1e-5).sqrt()

    def activated(maps):
        return torch.where(maps > 0, maps, 0.1 * maps)

    inner = activated(normalized(F.conv2d(x, block.conv1.weight, padding=1)))
    inner = activated(normalized(F.conv2d(inner, block.conv2.weight, padding=1)))
    inner = normalized(F.conv2d(inner, block.conv3.weight, padding=1))
    matrix = block.shortcut[0].weight[:, :, 0, 0]
    shortcut = normalized(torch.einsum("oc,nchw->nohw", matrix, x))
    maps = activated(inner + shortcut)[:, :, :6, :6].unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.allclose(block(x), maps.amax((4, 5)), atol=1e-5)


def test_dropped_squares_have_the_size_and_the_share_asked_for():
    torch.manual_seed(0)
    maps = torch.ones(100, 20, 12, 12)
    out = ramped(0.1, 3)(maps)
    zero = out == 0
    # Where squares do not overlap, a tenth; some do.
    assert 0.085 < zero.float().mean() < 0.1
    whole = zero.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).all(-1)
    covered = torch.zeros_like(zero)
    for y in range(3):
        for x in range(3):
            covered[:, :, y : y + 10, x : x + 10] |= whole
    assert covered.equal(zero)  # every dropped number lies in a dropped square
    assert out.mean().item() == pytest.approx(1, abs=1e-5)  # the rest makes up for it
    assert out.unique().numel() == 2


def test_share_grows_linearly_over_40000_steps():
    torch.manual_seed(0)
    maps = torch.ones(500, 20, 8, 8)
    shares = []
    for step in (0, 10_000, 40_000, 80_000):
        block = DropBlock(0.2, 1).train()
        block.num_batches_tracked.fill_(step)
        shares.append((block(maps) == 0).float().mean().item())
        assert block.num_batches_tracked == step + 1
    # Standard deviation of a share of 640 000 numbers: 0.0005.
    assert shares == pytest.approx([0, 0.05, 0.2, 0.2], abs=0.0025)


def test_half_precision_maps_are_rescaled_without_overflow():
    torch.manual_seed(0)
    out = ramped(0.1, 3)(torch.ones(100, 20, 12, 12, dtype=torch.float16))  # over 65 504 numbers
    assert out.dtype == torch.float16
    assert out.float().mean().item() == pytest.approx(1, abs=1e-3)


def test_nothing_is_dropped_in_eval_mode_or_without_a_part():
    maps = torch.ones(2, 3, 8, 8)
    assert ramped(0.5, 3).eval()(maps) is maps
    assert ramped(0.0, 3)(maps) is maps


def test_squares_are_cut_to_small_maps():
    out = ramped(0.5, 5)(torch.ones(50, 20, 2, 2))
    assert torch.logical_or((out == 0).all((2, 3)), (out > 0).all((2, 3))).all()


def test_counters_of_members_are_not_averaged():
    states = [ramped(0.1, 3).state_dict(), DropBlock(0.1, 3).state_dict()]
    assert average(states)["num_batches_tracked"] == 40_000


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = ResNet12(4)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"), [({"drop": 1.0}, "drop = 1.0"), ({"block_size": 0}, "size = 0")]
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message} is not allowed"):
        ResNet12(4, **arguments)
