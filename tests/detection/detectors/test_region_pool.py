"""The pool of regions with a gradient of its own, against torchvision's."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ssod_imwa.detection.detectors import region_pool
from ssod_imwa.detection.detectors.region_pool import RegionPool, spread

NAMES, LEVELS = ["0", "1", "2"], (2, 3, 4)
SHAPES = [(60, 88), (64, 72)]


def random_boxes(count, generator, edge=90.0):
    """Boxes of all sizes, some of them beyond the image, some without an edge."""
    corner = torch.rand(count, 2, generator=generator) * edge - 12
    size = torch.rand(count, 2, generator=generator) ** 3 * edge
    return torch.cat([corner, corner + size], dim=1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("bins", "samples"), [(7, 2), (3, 1)])
def test_a_map_s_gradient_is_torchvisions(seed, bins, samples):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 5, 12, 9, generator=generator, dtype=torch.float64).requires_grad_()
    images = torch.tensor([0] * 20 + [2] * 30)  # none on the second
    boxes = random_boxes(50, generator, edge=14)
    boxes[:4] = torch.tensor([[0, 0, 9, 12], [-3, -3, -2, -2], [8, 11, 9, 12], [20, 2, 25, 5.0]])
    rois = torch.cat([images[:, None], boxes], dim=1).double()
    pooled = roi_align(maps, rois, bins, 1.0, samples)
    gradients = torch.randn(pooled.shape, generator=generator)
    (theirs,) = torch.autograd.grad(pooled, maps, gradients.double())
    ours = spread(gradients, boxes, images, shape=maps.shape, samples=samples)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)


def pyramid(generator):
    return {
        name: torch.randn(2, 4, 64 // 2**k, 96 // 2**k, generator=generator).requires_grad_()
        for k, name in zip(LEVELS, NAMES, strict=True)
    }


def gradients(pooled, maps):
    weights = torch.linspace(-1, 1, pooled.numel()).view_as(pooled)
    return torch.autograd.grad((pooled * weights).sum(), list(maps.values()))


@pytest.mark.parametrize("counts", [(30, 20), (0, 5), (0, 0)])
def test_features_are_torchvisions_to_the_bit_and_gradients_within_rounding(counts):
    generator = torch.Generator().manual_seed(0)
    maps = pyramid(generator)
    boxes = [random_boxes(count, generator) for count in counts]
    boxes = [torch.cat([x, 4 * x[:2].abs()]) for x in boxes]  # large ones, too
    pooled = RegionPool(LEVELS, 7, 2)(maps, boxes, SHAPES)
    expected = MultiScaleRoIAlign(NAMES, 7, 2)(maps, boxes, SHAPES)
    assert torch.equal(pooled, expected)
    for ours, theirs in zip(gradients(pooled, maps), gradients(expected, maps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_frozen_map_gets_no_gradient():
    generator = torch.Generator().manual_seed(0)
    maps = pyramid(generator)
    maps["0"] = maps["0"].detach()
    boxes = [random_boxes(9, generator) for _ in SHAPES]
    RegionPool(LEVELS, 7, 2)(maps, boxes, SHAPES).sum().backward()
    assert maps["0"].grad is None
    assert maps["1"].grad is not None


def test_small_maps_have_a_gradient_of_their_own(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    boxes = [random_boxes(5, generator) for _ in SHAPES]
    shapes = []

    def recorded(*arguments, shape, **options):
        shapes.append(tuple(shape))
        return spread(*arguments, shape=shape, **options)

    monkeypatch.setattr(region_pool, "spread", recorded)
    maps = pyramid(generator)
    RegionPool(LEVELS, 7, 2)(maps, boxes, SHAPES).sum().backward()
    assert shapes == [tuple(x.shape) for x in maps.values()]


def test_large_maps_and_passes_without_gradient_do_without(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    boxes = [random_boxes(5, generator) for _ in SHAPES]
    monkeypatch.setattr(region_pool, "spread", pytest.fail)
    with torch.no_grad():
        assert not RegionPool(LEVELS, 7, 2)(pyramid(generator), boxes, SHAPES).requires_grad
    monkeypatch.setattr(region_pool, "MOST_PIXELS", 16 * 24 - 1)
    RegionPool(LEVELS, 7, 2)(pyramid(generator), boxes, SHAPES).sum().backward()


def test_under_autocast_types_are_torchvisions():
    generator = torch.Generator().manual_seed(0)
    maps = {name: x.detach().bfloat16().requires_grad_() for name, x in pyramid(generator).items()}
    boxes = [random_boxes(9, generator) for _ in SHAPES]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = RegionPool(LEVELS, 7, 2)(maps, boxes, SHAPES)
        expected = MultiScaleRoIAlign(NAMES, 7, 2)(maps, boxes, SHAPES)
    assert pooled.dtype == expected.dtype
    assert torch.equal(pooled, expected)
    for ours, theirs in zip(gradients(pooled, maps), gradients(expected, maps), strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-6, atol=2**-7)
