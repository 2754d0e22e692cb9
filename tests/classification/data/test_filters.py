import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from ssod_imwa.classification.data.filters import adjust_sharpness, blur


def noise(count, height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def assert_equal_but_for_rounding(found, expected):
    """A fused multiply-add, which not every processor has, rounds down one value in hundreds."""
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01


@pytest.mark.parametrize(("height", "width"), [(32, 32), (5, 3), (3, 9), (2, 8)])
def test_each_image_has_its_own_factor_of_torchvisions_sharpness(height, width):
    factors = [0.0, 0.1, 0.5, 1.0, 1.3, 1.9]
    images = noise(len(factors), height, width)
    before = images.clone()
    result = adjust_sharpness(images, torch.tensor(factors, dtype=torch.float64))
    for image, factor, found in zip(images, factors, result, strict=True):
        assert_equal_but_for_rounding(found, F.adjust_sharpness(image, factor))
    assert images.equal(before)


def test_sharpness_of_floating_point_images_is_refused():
    with pytest.raises(ValueError, match=r"images of torch.float32 are not allowed"):
        adjust_sharpness(torch.zeros(1, 3, 4, 4), torch.ones(1))


@pytest.mark.parametrize(("height", "width", "radius"), [(32, 32, 6), (7, 9, 6), (4, 4, 1)])
def test_each_image_is_blurred_as_torchvision_does(height, width, radius):
    sigmas = [0.1, 0.4, 1.0, 1.7, 2.0]
    images = noise(len(sigmas), height, width).float() / 255
    result = blur(images, torch.tensor(sigmas), radius=radius)
    for image, sigma, found in zip(images, sigmas, result, strict=True):
        expected = F.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
        assert torch.allclose(found, expected, rtol=0, atol=2e-6)


def test_an_image_is_blurred_alike_in_any_batch():
    images = noise(9, 16, 16).float() / 255
    sigmas = torch.linspace(0.1, 2, 9)
    whole = blur(images, sigmas, radius=6)
    for b in range(9):
        assert blur(images[b : b + 1], sigmas[b : b + 1], radius=6).equal(whole[b : b + 1])


def test_a_radius_of_zero_changes_nothing_and_larger_ones_than_the_image_are_refused():
    images = noise(2, 4, 6).float()
    assert blur(images, torch.ones(2), radius=0).equal(images)
    with pytest.raises(ValueError, match=r"radius = 4 is not allowed \(must be 0..3, less"):
        blur(images, torch.ones(2), radius=4)
