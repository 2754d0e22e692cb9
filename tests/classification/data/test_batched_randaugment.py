"""The batch against Pillow, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.classification.data.batched_randaugment import BatchedRandAugment, cut_gray
from ssod_imwa.classification.data.randaugment import (
    LEVELS,
    NUMBERS,
    OPERATIONS,
    draws_of,
    randaugment,
)


def images_of(count, size, seed=0):
    """Noise, narrow ranges of values, few values, flat images and smooth ones in turn."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    for i in range(count):
        low, high = sorted(generator.integers(0, 256, 2).tolist())
        shape = {1: (3, size, size), 2: (3, 1, size), 3: (3, 1, 1), 4: (1, size, size)}.get(i % 5)
        if shape:
            images[i] = generator.integers(low, high + 1, shape)
    return torch.from_numpy(images)


def by_pillow(images, numbers, cutout):
    changed = []
    for image, row in zip(images, numbers.tolist(), strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        changed.append(np.asarray(randaugment(picture, row, cutout=cutout)))
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("size", "cutout"), [(32, 16), (8, 0), (33, 7)])
def test_a_batch_has_pillows_pixels(size, cutout):
    images = images_of(600, size)
    numbers = torch.from_numpy(np.random.default_rng(size).random((600, NUMBERS)))
    before = images.clone()
    result = BatchedRandAugment(size, cutout=cutout)(images, numbers)
    assert images.equal(before)
    assert result.equal(by_pillow(images, numbers, cutout))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_pillows_pixels_at_every_level_and_sign(name):
    levels, signs = torch.meshgrid(torch.arange(LEVELS), torch.arange(2), indexing="ij")
    numbers = torch.zeros(2 * LEVELS, NUMBERS, dtype=torch.float64)
    numbers[:, 0] = (OPERATIONS.index(name) + 0.5) / len(OPERATIONS)
    numbers[:, 2] = (levels.flatten() + 0.5) / LEVELS
    numbers[:, 3] = signs.flatten() / 2
    numbers[:, 5] = 0.99  # no second operation
    drawn = [draws_of(row) for row in numbers.tolist()]
    assert {(draw.operation, draw.level, draw.negative) for (draw,) in drawn} == {
        (name, level, negative) for level in range(1, 10) for negative in (True, False)
    }
    for i in range(5):
        images = images_of(5, 32, seed=i)[i : i + 1].repeat(2 * LEVELS, 1, 1, 1)
        result = BatchedRandAugment(32, cutout=0)(images, numbers)
        assert result.equal(by_pillow(images, numbers, 0))


def test_the_square_is_pillows_wherever_its_center_is():
    steps = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    centers = torch.cartesian_prod(steps, steps)
    images = torch.zeros(len(centers), 3, 10, 10, dtype=torch.uint8)
    numbers = torch.cat([torch.full((len(centers), NUMBERS - 2), 0.99), centers], 1)
    for length in (3, 4):
        result = cut_gray(images, centers, length=length)
        assert result.equal(by_pillow(images, numbers.double(), length))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="size = 0 is not allowed"):
        BatchedRandAugment(0)
    with pytest.raises(ValueError, match="cutout = -1 is not allowed"):
        BatchedRandAugment(8, cutout=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_pixels():
    images = images_of(600, 32)
    numbers = torch.from_numpy(np.random.default_rng(1).random((600, NUMBERS)))
    augment = BatchedRandAugment(32)
    assert augment(images.cuda(), numbers).cpu().equal(augment(images, numbers))
