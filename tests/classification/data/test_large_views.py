import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from ssod_imwa.classification.data.augmentation import IMAGENET_STATISTICS, Statistics
from ssod_imwa.classification.data.large_views import large_view
from ssod_imwa.classification.data.randaugment import NUMBERS, randaugment
from ssod_imwa.engine.seeding import seed_everything

# LiVT's of iNaturalist 2018.
INATURALIST_STATISTICS = Statistics((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
STACKS = ["randclsstack", "bcl_randclsstack"]
RANDOM = ["standard", "mae", "randcls", *STACKS, "sim", "bcl_sim", "livt", "weak", "randaugment"]
NAMES = ["test", *RANDOM]


def photo(height=60, width=80):
    """Smooth, so that what is resized differs little between libraries."""
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 5, 6)))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return smooth[0].clamp(0, 255).byte()


def seeded(view, image, seed=0):
    with torch.random.fork_rng():
        seed_everything(seed)
        return view(image)


def denormalized(image, statistics=IMAGENET_STATISTICS):
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return image * std + mean


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (20, 21), (32, 32)])
def test_views_have_the_size_asked_for_whatever_the_image_has(name, shape):
    result = seeded(large_view(name, size=32, jitter=True), photo(*shape))
    assert result.shape == (3, 32, 32)
    assert result.dtype == torch.float32
    assert result.isfinite().all()


@pytest.mark.parametrize("name", RANDOM)
def test_views_are_functions_of_the_global_generators(name):
    view = large_view(name, size=32, jitter=True)
    one, again, two = (seeded(view, photo(), seed) for seed in (1, 1, 2))
    assert one.equal(again)
    assert not one.equal(two)
    copied = pickle.loads(pickle.dumps(view))
    assert seeded(copied, photo(), 1).equal(one)


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_test_images_are_resized_and_cropped_as_the_public_codes_do_in_pillow(resize):
    # 256 and 224 pixels.
    image = photo(300, 400)
    reference = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode(resize)),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(*INATURALIST_STATISTICS),
        ]
    )
    expected = reference(Image.fromarray(image.permute(1, 2, 0).numpy()))
    view = large_view("test", statistics=INATURALIST_STATISTICS, jitter=False, test_resize=resize)
    difference = view(image) - expected
    assert difference.shape == (3, 224, 224)
    # A level of 255 where a value lies between two; bicubic weights below 0 can make it two.
    levels = 1.01 if resize == "bilinear" else 2.01
    assert difference.abs().max() < levels / 255 / min(INATURALIST_STATISTICS.std)
    assert difference.abs().mean() < 0.1 / 255


@pytest.mark.parametrize(
    ("name", "smallest", "mode"), [("standard", 0.08, "bilinear"), ("mae", 0.2, "bicubic")]
)
def test_crops_are_drawn_as_torchvision_does_and_resized(name, smallest, mode):
    image = photo()
    view = large_view(name, size=32, jitter=False, flip=False)
    for seed in range(20):
        with torch.random.fork_rng():
            seed_everything(seed)
            box = transforms.RandomResizedCrop.get_params(image, [smallest, 1.0], [3 / 4, 4 / 3])
        picture = F.resized_crop(
            F.to_pil_image(image), *box, [32, 32], transforms.InterpolationMode(mode)
        )
        found = denormalized(seeded(view, image, seed))
        assert (found - F.to_tensor(picture)).abs().max() < 3 / 255


def test_standard_images_are_jittered_by_up_to_two_fifths_without_hue():
    gray = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    for jitter in (True, False):
        view = large_view("standard", size=8, jitter=jitter)
        found = torch.stack([denormalized(seeded(view, gray, seed)) for seed in range(100)])
        levels = 255 * found[:, 0, 0, 0]
        if jitter:
            assert 59 < levels.min() < 70
            assert 130 < levels.max() < 141
        else:
            assert (levels - 100).abs().max() < 1e-3
    red = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 40, 40)
    view = large_view("standard", size=8, jitter=True)
    for seed in range(20):
        pixel = denormalized(seeded(view, red, seed))[:, 0, 0]
        assert abs(pixel[1] - pixel[2]) < 1e-2  # saturation may move both, hue would move one


@pytest.mark.parametrize(
    ("name", "share"),
    [("sim", 0.2), ("bcl_sim", 0.2), *((name, 0.2) for name in STACKS), ("standard", 0)],
)
def test_a_fifth_of_some_views_is_gray(name, share):
    view = large_view(name, size=8, jitter=True)
    found = torch.stack([denormalized(seeded(view, photo(), seed)) for seed in range(300)])
    gray = (found.var(1).flatten(1).max(1).values < 1e-8).float().mean()
    # Binomial with n = 300, p = 1/5: standard deviation 0.023.
    assert abs(gray - share) <= (5 * 0.023 if share else 0)


def colored(name, image, count=300):
    """What the colors of a view make of an image of 40 x 40, before any RandAugment."""
    view = large_view(name, size=40, jitter=True, flip=False)
    operations = view.transforms
    steps = [x for x in operations if type(x).__name__ in ("ColorJitter", "RandomApply")]
    return torch.stack([seeded(transforms.Compose(steps), image, i) for i in range(count)]).int()


@pytest.mark.parametrize("name", ["sim", "bcl_sim", *STACKS])
def test_jitter_is_that_of_the_release(name):
    """BCL: four fifths of the images, with hue; PaCo, NCL and GPaCo: all images, without."""
    bcl = name.startswith("bcl")
    red = torch.tensor([160, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 40, 40)
    found = colored(name, red)[..., 20, 20]
    untouched = (found == red[:, 0, 0]).all(1).float().mean().item()
    turned = ((found[:, 1] - found[:, 2]).abs() > 2).float().mean().item()
    # Binomial with n = 300, p = 1/5: standard deviation 0.023.
    assert untouched == pytest.approx(0.2, abs=5 * 0.023) if bcl else untouched < 0.01
    assert turned > 0.5 if bcl else turned == 0


@pytest.mark.parametrize("name", ["sim", "bcl_sim", *STACKS])
def test_half_of_the_views_are_blurred_but_none_of_bcls(name):
    halves = torch.zeros(3, 40, 40, dtype=torch.uint8)
    halves[:, :, 20:] = 200
    # A blur makes more of the two values, whatever jitter has made of them.
    blurred = [len(image[0].unique()) > 2 for image in colored(name, halves)]
    # Binomial with n = 300: standard deviation 0.03. Sigmas below 0.2 (1 in 20) change nothing.
    expected, slack = (0, 0) if name.startswith("bcl") else (0.475, 5 * 0.03)
    assert abs(sum(blurred) / 300 - expected) <= slack


@pytest.mark.parametrize("name", ["sim", "bcl_sim", "randcls", *STACKS])
def test_views_of_large_images_are_crops_of_8_percent_and_more(name):
    assert large_view(name, jitter=True).transforms[0].scale == (0.08, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_mirrored_if_flips_are_off(name):
    image = torch.full((3, 60, 60), 60, dtype=torch.uint8)
    image[:, :, :30] = 200
    counts = []
    for flip in (False, True):
        view = large_view(name, size=24, jitter=False, flip=flip)
        found = torch.stack([seeded(view, image, seed) for seed in range(60)])
        difference = found[..., :12].mean((1, 2, 3)) - found[..., 12:].mean((1, 2, 3))
        counts.append(int((difference < -0.05).sum()))
    # RandAugment may invert, solarize or move what is bright.
    may_move = 20 if name in ("randcls", *STACKS, "livt", "randaugment") else 0
    assert counts[0] <= may_move
    assert counts[1] == 0 if name == "test" else counts[1] > counts[0] + 5


def test_random_operations_are_those_of_balanced_contrastive_learning():
    view = large_view("randcls", size=224, statistics=INATURALIST_STATISTICS, jitter=True)
    (augment,) = (x for x in view.transforms if type(x).__name__ == "RandAugment")
    assert augment.num_layers == 2
    assert {op.magnitude for op in augment.ops} == {10}
    hparams = augment.ops[0].hparams
    assert hparams["magnitude_std"] == 0.5
    assert hparams["translate_const"] == 100
    assert hparams["img_mean"] == (119, 120, 97)


def test_livt_is_what_timm_makes_of_the_published_arguments():
    view = large_view("livt", size=32, jitter=True)
    pipeline = view.transforms[1].transforms
    (augment,) = (x for x in pipeline if type(x).__name__ == "RandAugment")
    assert {op.magnitude for op in augment.ops} == {9}
    names = {op.name for op in augment.ops}
    assert "PosterizeIncreasing" in names  # inc1: a larger magnitude is always a stronger change
    (erasing,) = (x for x in pipeline if type(x).__name__ == "RandomErasing")
    assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (0.25, True, 1)
    assert "bicubic" in repr(pipeline[0])


def test_views_that_do_not_exist_are_refused():
    with pytest.raises(
        ValueError, match=r"view 'plain' is not allowed for images in files .*'mae'"
    ):
        large_view("plain", jitter=True)
    with pytest.raises(ValueError, match="size = 0 is not allowed"):
        large_view("test", size=0, jitter=True)
    for name in ("weak", "randaugment"):
        with pytest.raises(ValueError, match=r"padding = 16 with images of 16 x 16 .*reflect"):
            large_view(name, size=16, jitter=True, padding=16)
        assert large_view(name, size=16, jitter=True, padding=15)(photo()).shape == (3, 16, 16)


def test_weak_views_are_windows_of_the_reflected_image():
    image = photo(32, 32)
    view = large_view("weak", size=32, jitter=True, padding=4)
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = {
        turned[:, top : top + 32, left : left + 32].tobytes()
        for turned in (padded, padded[:, :, ::-1])
        for top in range(9)
        for left in range(9)
    }
    drawn = set()
    for seed in range(60):
        pixels = (255 * denormalized(seeded(view, image, seed))).round().byte().numpy().tobytes()
        assert pixels in windows
        drawn.add(pixels)
    assert len(drawn) > 30  # of 162


def test_randaugment_is_pillows_of_the_global_generators_numbers():
    image = photo(32, 32)
    # Without padding and mirroring nothing else is drawn.
    view = large_view("randaugment", size=32, jitter=True, padding=0, flip=False, cutout=8)
    for seed in range(40):
        with torch.random.fork_rng():
            seed_everything(seed)
            numbers = torch.rand(NUMBERS, dtype=torch.float64).tolist()
        expected = randaugment(F.to_pil_image(image), numbers, cutout=8)
        pixels = (255 * denormalized(seeded(view, image, seed))).round().byte()
        assert pixels.equal(F.pil_to_tensor(expected))
