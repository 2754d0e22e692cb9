import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from ssod_imwa.classification.data.color_augmentation import (
    ORDERS,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    groups,
    jitter,
    make_gray,
)

LIBRARY = {
    adjust_brightness: F.adjust_brightness,
    adjust_contrast: F.adjust_contrast,
    adjust_saturation: F.adjust_saturation,
    adjust_hue: F.adjust_hue,
}
FACTORS = [0.0, 0.1, 0.6, 0.95, 1.0, 1.2, 1.4, 1.9]


def noise(count, size=8, seed=0):
    """Noise, of which some is gray, black or white."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    images[:, :, 0] = images[:, :1, 0]
    images[:, :, 1, :3] = 0
    images[:, :, 1, 3:6] = 255
    return torch.from_numpy(images)


def assert_equal_but_for_rounding(found, expected):
    """A fused multiply-add, which not every processor has, rounds down one value in hundreds."""
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01


@pytest.mark.parametrize("adjust", [adjust_brightness, adjust_contrast, adjust_saturation])
def test_each_image_has_its_own_factor_of_torchvisions_change(adjust):
    images = noise(len(FACTORS), size=32)
    result = adjust(images, torch.tensor(FACTORS, dtype=torch.float64))
    assert result.dtype == torch.uint8
    for image, factor, found in zip(images, FACTORS, result, strict=True):
        assert_equal_but_for_rounding(found, LIBRARY[adjust](image, factor))


@pytest.mark.parametrize("adjust", [adjust_brightness, adjust_contrast, adjust_saturation])
def test_floating_point_images_are_not_rounded(adjust):
    images = noise(len(FACTORS)).float() / 255
    result = adjust(images, torch.tensor(FACTORS))
    for image, factor, found in zip(images, FACTORS, result, strict=True):
        assert torch.allclose(found, LIBRARY[adjust](image, factor), rtol=0, atol=1e-6)


def test_hues_are_turned_as_torchvision_and_the_standard_library_do():
    shifts = [-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.5]
    images = noise(len(shifts)).float() / 255
    result = adjust_hue(images, torch.tensor(shifts))
    for image, shift, found in zip(images, shifts, result, strict=True):
        assert torch.allclose(found, F.adjust_hue(image, shift), rtol=0, atol=2e-6)
        for pixel, other in zip(image.flatten(1).T.tolist(), found.flatten(1).T, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected = torch.tensor(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
            assert torch.allclose(other, expected, rtol=0, atol=1e-5)


def test_hues_of_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"images of torch.uint8 are not allowed"):
        adjust_hue(noise(1), torch.zeros(1))


def test_chosen_images_become_gray():
    images = noise(3).float() / 255
    result = make_gray(images, torch.tensor([True, False, True]))
    assert result[1].equal(images[1])
    for row in (0, 2):
        assert torch.allclose(result[row], F.rgb_to_grayscale(images[row], 3), atol=1e-6)
    assert make_gray(images, torch.zeros(3, dtype=torch.bool)).equal(images)


def test_jitter_applies_torchvisions_changes_in_the_order_of_each_image():
    orders = torch.arange(24).repeat(2)
    images = noise(48).float() / 255
    generator = np.random.default_rng(1)
    amounts = generator.uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (48, 4))
    chosen = torch.arange(48) % 5 != 0
    result = jitter(images, torch.from_numpy(amounts), orders, chosen)
    assert ORDERS.tolist() == [list(order) for order in permutations(range(4))]
    changes = list(LIBRARY.values())
    for b, image in enumerate(images):
        expected = image
        if chosen[b]:
            for operation in list(permutations(range(4)))[b % 24]:
                expected = changes[operation](expected, amounts[b, operation])
        assert torch.allclose(result[b], expected, rtol=0, atol=1e-5)
    # The order is not a matter of rounding.
    assert not torch.allclose(
        *(
            jitter(images[:1], torch.tensor([[1.4, 1.4, 0.6, 0.1]]), x, ~chosen[:1])
            for x in (torch.tensor([0]), torch.tensor([23]))
        ),
        atol=1e-2,
    )


def test_images_are_not_changed():
    images = noise(2).float() / 255
    before = images.clone()
    everything = torch.ones(2, dtype=torch.bool)
    jitter(images, torch.full((2, 4), 0.5), torch.zeros(2).long(), everything)
    make_gray(images, everything)
    for adjust in LIBRARY:
        adjust(images, torch.full((2,), 0.5))
    assert images.equal(before)


def test_groups_hold_every_row_that_has_a_code():
    codes = torch.from_numpy(np.random.default_rng(0).integers(-1, 4, 50))
    found = {code: rows.tolist() for code, rows in groups(codes, torch.device("cpu"))}
    assert found == {c: [i for i, x in enumerate(codes.tolist()) if x == c] for c in range(4)}
    assert list(groups(torch.full((3,), -1), torch.device("cpu"))) == []
