import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from ssod_imwa.classification.data.augmentation import (
    CIFAR_STATISTICS,
    IMAGENET_STATISTICS,
    Boxes,
    Crops,
    boxes_of,
    crop_and_flip,
    crops_of,
    cut_out,
    normalize,
    resize_and_flip,
    standardize,
)


def noise(*shape, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(values)


def drawn_crops(count, **options):
    numbers = np.random.default_rng(0).random((count, 3))
    return crops_of(torch.from_numpy(numbers), **options)


def cropped_one_by_one(images, crops, padding, mode):
    results = []
    for image, top, left, mirrored in zip(images.numpy(), *crops, strict=True):
        height, width = image.shape[1:]
        sides = ((0, 0), (padding, padding), (padding, padding))
        padded = np.pad(image, sides, mode=mode)
        crop = padded[:, int(top) : int(top) + height, int(left) : int(left) + width]
        results.append(crop[:, :, ::-1] if mirrored else crop)
    return torch.from_numpy(np.stack(results))


def every_crop(padding):
    """Each offset of each axis, mirrored and not."""
    offsets = torch.arange(2 * padding + 1)
    top, left, mirrored = torch.meshgrid(offsets, offsets, torch.arange(2), indexing="ij")
    return Crops(top.flatten(), left.flatten(), mirrored.flatten().bool())


@pytest.mark.parametrize(("fill", "mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize(
    ("height", "width", "padding"), [(32, 32, 4), (7, 12, 3), (5, 5, 4), (6, 4, 0)]
)
def test_every_crop_is_that_of_a_plain_loop(height, width, padding, fill, mode):
    crops = every_crop(padding)
    images = noise(len(crops.top), 3, height, width)
    result = crop_and_flip(images, crops, padding=padding, fill=fill)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    assert result.equal(cropped_one_by_one(images, crops, padding, mode))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3)])
def test_zero_padding_may_exceed_the_image(height, width):
    crops = every_crop(4)
    images = noise(len(crops.top), 3, height, width)
    expected = cropped_one_by_one(images, crops, 4, "constant")
    assert crop_and_flip(images, crops, padding=4).equal(expected)


def test_float_images_keep_their_type():
    crops = every_crop(2)
    images = torch.randn(len(crops.top), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    result = crop_and_flip(images, crops, padding=2)
    assert result.dtype == torch.float32
    assert result.equal(cropped_one_by_one(images, crops, 2, "constant"))


def test_images_are_not_changed_and_not_shared():
    images = noise(1, 3, 4, 4)
    before = images.clone()
    center = Crops(torch.tensor([1]), torch.tensor([1]), torch.tensor([False]))
    result = crop_and_flip(images, center, padding=1)
    assert result.equal(images)
    result.zero_()
    assert images.equal(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fill", ["zero", "reflect"])
def test_every_device_makes_the_same_images(fill):
    crops = drawn_crops(64)
    images = noise(64, 3, 32, 32)
    on_gpu = crop_and_flip(images.cuda(), crops, fill=fill)
    assert on_gpu.is_cuda
    assert on_gpu.cpu().equal(crop_and_flip(images, crops, fill=fill))
    assert torch.allclose(normalize(on_gpu).cpu(), normalize(on_gpu.cpu()), atol=1e-6)


# --------------------------------------------------------------------------------------- draws


def test_offsets_are_uniform_and_half_of_the_images_mirrored():
    crops = drawn_crops(18_000)
    for offsets in (crops.top, crops.left):
        times = torch.bincount(offsets, minlength=9)
        # Binomial with n = 18000, p = 1/9: standard deviation 42.2.
        assert len(times) == 9
        assert (times - 2000).abs().max() < 5 * 42.2
    # p = 1/2: 67.1.
    assert abs(int(crops.mirrored.sum()) - 9000) < 5 * 67.1
    correlations = np.corrcoef(np.stack([part.numpy() for part in crops]))
    assert np.abs(correlations - np.eye(3)).max() < 5 / np.sqrt(18_000)


def test_flips_can_be_switched_off_and_on():
    for flip, expected in [(0, 0), (1, 50)]:
        crops = drawn_crops(50, flip=flip)
        assert int(crops.mirrored.sum()) == expected
    assert drawn_crops(50, padding=0).top.max() == 0


# ----------------------------------------------------------------------------------- normalize


@pytest.mark.parametrize("statistics", [CIFAR_STATISTICS, IMAGENET_STATISTICS])
def test_normalized_images_are_those_of_float64(statistics):
    images = noise(4, 3, 5, 6)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in statistics)
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    result = normalize(images, statistics)
    assert result.dtype == torch.float32
    assert np.abs(result.numpy() - expected).max() < 1e-6


def test_images_of_0_to_1_are_standardized_as_those_of_0_to_255():
    images = noise(4, 3, 5, 6)
    result = standardize(images.float() / 255, IMAGENET_STATISTICS)
    assert torch.allclose(result, normalize(images, IMAGENET_STATISTICS), atol=1e-6)


# ----------------------------------------------------------------------------- parts of an image


def box_of_a_plain_loop(numbers, size, scale):
    """torchvision's rule with given numbers."""
    for area_number, ratio_number in numbers[:20].reshape(10, 2):
        area = size * size * (scale[0] + (scale[1] - scale[0]) * area_number)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio_number)
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= size and 0 < height <= size:
            break
    else:
        height = width = size
    top, left = int(numbers[20] * (size - height + 1)), int(numbers[21] * (size - width + 1))
    return [top, left, height, width]


@pytest.mark.parametrize(("size", "scale"), [(32, (0.2, 1.0)), (7, (0.9, 1.0)), (8, (0.99, 1.0))])
def test_boxes_are_those_of_a_plain_loop(size, scale):
    numbers = np.random.default_rng(0).random((500, 22))
    boxes = boxes_of(torch.from_numpy(numbers), size=size, scale=scale)
    expected = [box_of_a_plain_loop(row, size, scale) for row in numbers]
    assert torch.stack(boxes, 1).tolist() == expected


def test_boxes_that_never_fit_are_the_whole_image():
    # Twice the area never fits.
    boxes = boxes_of(torch.full((1, 22), 0.5, dtype=torch.float64), size=9, scale=(2.0, 2.0))
    assert [part.item() for part in boxes] == [0, 0, 9, 9]


def test_boxes_are_distributed_as_torchvisions():
    count, size, scale = 4000, 32, (0.2, 1.0)
    numbers = torch.from_numpy(np.random.default_rng(0).random((count, 22)))
    found = torch.stack(boxes_of(numbers, size=size, scale=scale), 1).double()
    image = torch.zeros(3, size, size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [
            RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)
        ]
    expected = torch.tensor(drawn).double()
    for statistic in (lambda x: x, torch.square):
        a, b = statistic(found), statistic(expected)
        error = ((a.var(0) + b.var(0)) / count).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


def every_box(size):
    sides = [(top, height) for height in range(1, size + 1) for top in range(size - height + 1)]
    boxes = [(top, left, height, width) for top, height in sides for left, width in sides]
    return Boxes(*torch.tensor(boxes).unbind(1))


def test_parts_are_enlarged_as_torchvision_does():
    boxes = every_box(5)
    count = len(boxes.top)
    images = noise(count, 3, 5, 5).float() / 255
    mirrored = torch.arange(count) % 2 == 1
    result = resize_and_flip(images, boxes, mirrored)
    for b in range(count):
        box = [int(part[b]) for part in boxes]
        expected = F.resized_crop(images[b], *box, [5, 5], antialias=True)
        expected = expected.flip(-1) if mirrored[b] else expected
        assert torch.allclose(result[b], expected, rtol=0, atol=1e-5)


def test_the_whole_image_is_left_as_it_is():
    images = noise(2, 3, 32, 32).float() / 255
    whole = Boxes(*(torch.tensor([x, x]) for x in (0, 0, 32, 32)))
    result = resize_and_flip(images, whole, torch.tensor([False, True]))
    assert torch.allclose(result[0], images[0], atol=1e-5)
    assert torch.allclose(result[1], images[1].flip(2), atol=1e-5)


# ------------------------------------------------------------------------------------------ holes


@pytest.mark.parametrize(
    ("height", "width", "length"), [(8, 8, 4), (5, 7, 2), (4, 4, 0), (3, 3, 8)]
)
def test_holes_are_those_of_a_plain_loop(height, width, length):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centers = torch.stack([rows.flatten(), columns.flatten()], 1)
    numbers = (centers + 0.5) / torch.tensor([height, width])
    images = noise(len(centers), 3, height, width)
    expected = images.clone()
    for image, (y, x) in zip(expected, centers.tolist(), strict=True):
        top, left = max(0, y - length // 2), max(0, x - length // 2)
        image[:, top : max(0, y + length // 2), left : max(0, x + length // 2)] = 0
    result = cut_out(images, numbers, length=length)
    assert result.equal(expected)
    assert result.dtype == torch.uint8


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": -1}, "padding = -1 is not allowed"),
        ({"flip": 1.5}, "flip = 1.5 is not allowed"),
    ],
)
def test_draws_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        drawn_crops(2, **arguments)


def test_images_that_do_not_fit_are_refused():
    crops = drawn_crops(2)
    with pytest.raises(ValueError, match="2 crops for 3 images"):
        crop_and_flip(noise(3, 3, 8, 8), crops)
    with pytest.raises(ValueError, match="padding = 4 with images of 8 x 4 is not allowed"):
        crop_and_flip(noise(2, 3, 4, 8), crops, fill="reflect")
    with pytest.raises(ValueError, match=r"fill = 'edge' is not allowed .*'zero', 'reflect'"):
        crop_and_flip(noise(2, 3, 8, 8), crops, fill="edge")
    with pytest.raises(ValueError, match=r"images of torch.float32 are not allowed"):
        normalize(torch.zeros(1, 3, 2, 2))
