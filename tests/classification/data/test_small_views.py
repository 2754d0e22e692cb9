from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from ssod_imwa.classification.data.augmentation import (
    CIFAR_STATISTICS,
    IMAGENET_STATISTICS,
    boxes_of,
    crop_and_flip,
    crops_of,
    cut_out,
    normalize,
    resize_and_flip,
)
from ssod_imwa.classification.data.auto_augment import CifarAutoAugment
from ssod_imwa.classification.data.batched_randaugment import BatchedRandAugment
from ssod_imwa.classification.data.small_views import RESIZING, small_view

NAMES = ["none", "plain", "jittered", "strong", "sim", "weak", "randaugment"]


def noise(count, size=32, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def draw(view, count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((count, view.numbers)))


def denormalized(images, statistics):
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return images * std + mean


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_seen_alike_in_any_batch(name, size):
    view = small_view(name, CIFAR_STATISTICS, size=size)
    images = noise(70, size)
    before, numbers = images.clone(), draw(view, 70)
    whole = view(images, numbers)
    assert images.equal(before)
    assert whole.dtype == torch.float32
    assert whole.shape == images.shape
    for b in range(70):
        assert view(images[b : b + 1], numbers[b : b + 1]).equal(whole[b : b + 1])
    assert view(images[5:40], numbers[5:40]).equal(whole[5:40])


@pytest.mark.parametrize("name", NAMES[1:])
def test_other_numbers_make_another_view(name):
    view = small_view(name, CIFAR_STATISTICS, size=32)
    one, two = (view(noise(8), draw(view, 8, seed=seed)) for seed in (1, 2))
    assert (one != two).flatten(1).any(1).all()


def test_test_images_are_normalized_alone():
    view = small_view("none", IMAGENET_STATISTICS, size=32)
    assert view.numbers == 0
    images = noise(3)
    assert view(images, draw(view, 3)).equal(normalize(images, IMAGENET_STATISTICS))


def test_plain_images_are_cropped_and_mirrored():
    view = small_view("plain", CIFAR_STATISTICS, size=32, padding=2)
    images, numbers = noise(40), draw(view, 40)
    crops = crops_of(numbers, padding=2)
    assert 0 < crops.mirrored.sum() < 40
    expected = normalize(crop_and_flip(images, crops, padding=2), CIFAR_STATISTICS)
    assert view(images, numbers).equal(expected)


@pytest.mark.parametrize(("size", "hole"), [(32, 16), (12, 6)])
def test_strong_images_are_cropped_augmented_and_cut_out(size, hole):
    view = small_view("strong", CIFAR_STATISTICS, size=size)
    images, numbers = noise(60, size), draw(view, 60)
    expected = crop_and_flip(images, crops_of(numbers[:, :3], padding=4), padding=4)
    expected = CifarAutoAugment(size)(expected, numbers[:, 3:8])
    expected = cut_out(expected, numbers[:, 8:], length=hole)
    result = view(images, numbers)
    assert result.equal(normalize(expected, CIFAR_STATISTICS))
    # The hole is black, not of the mean color.
    black = normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), CIFAR_STATISTICS)
    assert (result == black).all(1).flatten(1).sum(1).min() >= (hole // 2) ** 2


# -------------------------------------------------------------------------------------- jittered


def test_jittered_is_torchvisions_jitter_of_a_padded_crop():
    """Each image by itself, its operations in the order that its number says."""
    images = noise(20, 84)
    view = small_view("jittered", CIFAR_STATISTICS, size=84, padding=8)
    numbers = draw(view, 20)
    crops = crops_of(numbers[:, :3], padding=8)
    result = denormalized(view(images, numbers), CIFAR_STATISTICS)
    cropped = crop_and_flip(images, crops, padding=8).float() / 255
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, None)
    for b, image in enumerate(cropped):
        factors = (0.6 + 0.8 * numbers[b, 4:8]).tolist()
        for operation in list(permutations(range(4)))[int(24 * numbers[b, 8])]:
            if adjust[operation] is not None:  # the hue stays
                image = adjust[operation](image, factors[operation])
        assert torch.allclose(result[b], image, atol=1e-4)
    assert max(crops.top) > 8  # beyond CIFAR's padding


# ------------------------------------------------------------------------------------------- sim

# The places of what one image draws.
FLIP, JITTER, AMOUNTS, GRAY, BLUR, SIGMA = 22, 23, slice(24, 28), 29, 30, 31


def sim_numbers(count, **changes):
    """No flip, jitter, gray or blur; a box of each image's own."""
    numbers = torch.from_numpy(np.random.default_rng(0).random((count, 32)))
    numbers[:, [FLIP, JITTER, GRAY, BLUR]] = 0.999
    for place, value in changes.items():
        numbers[:, globals()[place]] = value
    return numbers


def sim(images, numbers, **settings):
    view = small_view("sim", CIFAR_STATISTICS, size=images.shape[-1], **settings)
    assert view.numbers == numbers.shape[1]
    return denormalized(view(images, numbers), CIFAR_STATISTICS)


def test_sim_enlarges_a_fifth_to_all_of_the_image():
    images, numbers = noise(50), sim_numbers(50)
    boxes = boxes_of(numbers[:, :22], size=32, scale=(0.2, 1.0))
    mirrored = torch.zeros(50, dtype=torch.bool)
    expected = resize_and_flip(images.float() / 255, boxes, mirrored)
    assert torch.allclose(sim(images, numbers), expected, atol=1e-5)
    area = boxes.height * boxes.width / 32**2
    assert area.min() < 0.3
    assert area.max() > 0.9


def test_sim_mirrors_below_one_half():
    images = noise(4)
    straight, mirrored = (sim(images, sim_numbers(4, FLIP=x)) for x in (0.5, 0.499))
    assert torch.allclose(straight.flip(3), mirrored, atol=1e-5)


def test_sim_jitters_by_as_much_as_its_numbers_say():
    images = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    numbers = sim_numbers(3, JITTER=0.799, AMOUNTS=0.5)
    assert torch.allclose(sim(images, numbers), torch.tensor(100 / 255), atol=1e-5)
    numbers[:, AMOUNTS.start] = torch.tensor([0.0, 0.75, 1.0])  # brightness times 1 - 0.4 ...
    found = sim(images, numbers)[:, 0, 0, 0]
    assert torch.allclose(found, torch.tensor([60, 120, 140]) / 255, atol=1e-5)
    numbers[:, JITTER] = 0.801
    assert torch.allclose(sim(images, numbers), torch.tensor(100 / 255), atol=1e-5)


def test_sim_turns_hues_by_up_to_a_tenth():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = 255
    numbers = sim_numbers(2, JITTER=0.0, AMOUNTS=0.5)
    numbers[:, AMOUNTS.stop - 1] = torch.tensor([0.0, 1.0])
    # Red turned by 0.1 of six sixths is red with 0.6 of green.
    expected = torch.tensor([[1.0, 0.0, 0.6], [1.0, 0.6, 0.0]])
    assert torch.allclose(sim(images, numbers)[:, :, 0, 0], expected, atol=1e-5)


def test_sim_makes_gray_below_a_fifth_and_blurs_below_a_half():
    images = noise(4)
    colored, gray = (sim(images, sim_numbers(4, GRAY=x)) for x in (0.201, 0.199))
    assert colored.var(1).min(0).values.max() > 0.01
    assert gray.var(1).max() < 1e-10
    sharp, slightly, much = (
        sim(images, sim_numbers(4, BLUR=x, SIGMA=sigma))
        for x, sigma in ((0.501, 1.0), (0.499, 0.0), (0.499, 1.0))
    )
    assert torch.allclose(sharp, slightly, atol=1e-5)  # a sigma of 0.1 pixels
    assert (much.flatten(1).var(1) < 0.5 * sharp.flatten(1).var(1)).all()


# ---------------------------------------------------------------------------------------- general


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_mirrored_if_flips_are_off(name):
    # A left half that is bright stays bright: no other change moves it across.
    images = torch.full((200, 3, 32, 32), 60, dtype=torch.uint8)
    images[:, :, :, :16] = 160
    view = small_view(name, CIFAR_STATISTICS, size=32, flip=False)
    numbers = draw(view, 200)
    if name == "sim":
        numbers[:, :20] = 0.99  # nearly the whole image
    if name == "strong":
        # Neither operation of the policy, and a hole in the lower right corner.
        numbers[:, 3:] = torch.tensor([0.02, 0.99, 0.99, 0, 0, 0.99, 0.99])
    if name == "randaugment":
        numbers[:, 3:] = torch.tensor([0, 0.99, 0, 0] * 2 + [0.5, 0.5])  # a square in the middle
    result = view(images, numbers)
    brighter = result[..., :8].mean((1, 2, 3)) > result[..., -8:].mean((1, 2, 3))
    assert brighter.all()
    mirrored = small_view(name, CIFAR_STATISTICS, size=32)(images, numbers)
    if name != "none":
        brighter = mirrored[..., :8].mean((1, 2, 3)) > mirrored[..., -8:].mean((1, 2, 3))
        assert 60 < (~brighter).sum() < 140


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_every_device_makes_the_same_views_without_waiting(name):
    view = small_view(name, CIFAR_STATISTICS, size=32)
    images, numbers = noise(128), draw(view, 128)
    expected = view(images, numbers)
    images = images.cuda()
    view(images, numbers)  # fills the tables of the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = view(images, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (found.cpu() - expected).abs() * torch.tensor(0.2)  # in units of 0..1
    assert difference.mean() < 1e-3
    assert difference.flatten(1).max(1).values.median() < 2 / 255


def test_views_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"view 'mae' is not allowed .*'none', 'plain', 'jit"):
        small_view("mae", CIFAR_STATISTICS, size=32)
    with pytest.raises(ValueError, match="size = 0 is not allowed"):
        small_view("plain", CIFAR_STATISTICS, size=0)
    with pytest.raises(ValueError, match="padding = -1 is not allowed"):
        small_view("strong", CIFAR_STATISTICS, size=8, padding=-1)


@pytest.mark.parametrize("name", NAMES)
def test_images_and_numbers_that_do_not_fit_are_refused(name):
    view = small_view(name, CIFAR_STATISTICS, size=8)
    with pytest.raises(ValueError, match=r"images of 9 x 8 pixels are not allowed \(must be 8 x 8"):
        view(torch.zeros(1, 3, 8, 9, dtype=torch.uint8), draw(view, 1))
    with pytest.raises(ValueError, match=r"numbers of shape .* are not allowed \(must be 3 images"):
        view(noise(3, 8), draw(view, 2))


def test_weak_views_reflect_and_strong_ones_augment_what_weak_ones_see():
    weak = small_view("weak", CIFAR_STATISTICS, size=8, padding=2)
    strong = small_view("randaugment", CIFAR_STATISTICS, size=8, padding=2, cutout=0)
    images, numbers = noise(50, 8), draw(strong, 50)
    crops = crops_of(numbers[:, :3], padding=2)
    cropped = crop_and_flip(images, crops, padding=2, fill="reflect")
    assert weak(images, numbers[:, :3]).equal(normalize(cropped))
    expected = BatchedRandAugment(8, cutout=0)(cropped, numbers[:, 3:])
    assert strong(images, numbers).equal(normalize(expected))


@pytest.mark.parametrize("name", RESIZING)
def test_larger_images_are_resized_at_the_end_as_pillow_does(name):
    large = small_view(name, CIFAR_STATISTICS, size=48, padding=2)
    small = small_view(name, CIFAR_STATISTICS, size=16, stored=48, padding=2)
    images = noise(20, 48)
    numbers = draw(large, 20)
    before = (denormalized(large(images, numbers), CIFAR_STATISTICS) * 255).round().byte()
    after = (denormalized(small(images, numbers), CIFAR_STATISTICS) * 255).round().int()
    for image, resized in zip(before, after, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR), dtype=int)
        assert abs(resized.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_other_views_do_not_resize():
    with pytest.raises(ValueError, match=r"view 'plain' is not allowed for images of 48 x 48"):
        small_view("plain", CIFAR_STATISTICS, size=16, stored=48)
