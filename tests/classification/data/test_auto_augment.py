import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as F

from ssod_imwa.classification.data import auto_augment
from ssod_imwa.classification.data.auto_augment import KINDS, POLICIES, CifarAutoAugment

# What is drawn with a probability of 0 or 1 whatever the policy says.
ALWAYS, NEVER = 0.0, 1 - 1e-12

EXACT = ("Invert", "Posterize", "Solarize", "Equalize", "Rotate", "ShearY", "TranslateX")
EXACT += ("TranslateY",)


def photo(count, size, seed=0):
    """Smooth images whose values do not fill 0..255, with noise."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.uniform(30, 200, (count, 3, 4, 4)))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth + torch.from_numpy(generator.normal(0, 8, smooth.shape))).clamp(0, 255).byte()


def numbers(pair, *, applied, positive):
    """What makes an image take a pair of operations, apply those two, with those two signs."""
    return torch.tensor(
        [
            (pair + 0.5) / 25,
            *(ALWAYS if yes else NEVER for yes in applied),
            *(0.9 if yes else 0.1 for yes in positive),
        ],
        dtype=torch.float64,
    )


# The strengths of magnitudes 0 to 9 in the code in Pillow that long-tailed work uses.
IN_PILLOW = {
    "Rotate": np.linspace(0, 30, 10),
    "ShearY": np.linspace(0, 0.3, 10),
    "TranslateX": np.linspace(0, 150 / 331, 10),
    "TranslateY": np.linspace(0, 150 / 331, 10),
    "Solarize": np.linspace(256, 0, 10),
    "Posterize": np.round(np.linspace(8, 4, 10)).astype(int),
    **dict.fromkeys(["Brightness", "Color", "Contrast", "Sharpness"], np.linspace(0, 0.9, 10)),
}


def in_pillow(picture, operation, magnitude, *, positive, fill):
    """One operation on a picture, by the library itself."""
    strength = IN_PILLOW[operation][magnitude or 0] if operation in IN_PILLOW else 0
    signed = strength if positive else -strength
    width, height = picture.size
    affine = {
        "ShearY": (1, 0, 0, signed, 1, 0),
        "TranslateX": (1, 0, -signed * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -signed * height),
    }
    if operation in affine:
        mode = Image.BICUBIC if operation == "ShearY" else Image.NEAREST
        return picture.transform(
            picture.size, Image.AFFINE, affine[operation], mode, fillcolor=(fill,) * 3
        )
    if operation == "Rotate":
        return picture.rotate(signed, Image.NEAREST, fillcolor=(fill,) * 3)
    if operation in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, operation)(picture).enhance(1 + signed)
    change = getattr(ImageOps, operation.lower())
    return change(picture, strength) if operation in ("Solarize", "Posterize") else change(picture)


@pytest.mark.parametrize(("size", "fill"), [(32, 128), (13, 0)])
def test_every_operation_is_that_of_the_code_in_pillow(size, fill, monkeypatch):
    # Each of the 25 x 2 operations, alone and with each sign.
    cases = [
        (pair, place, positive)
        for pair in range(25)
        for place in range(2)
        for positive in (True, False)
    ]
    images = photo(len(cases), size)
    before = images.clone()
    everywhere = torch.stack(
        [
            numbers(pair, applied=(place == 0, place == 1), positive=(positive,) * 2)
            for pair, place, positive in cases
        ]
    )
    augment = CifarAutoAugment(size, fill=fill)
    # A probability of 0 would not be applied by any number.
    monkeypatch.setattr(augment, "_probabilities", augment._probabilities.clamp(min=0.05))
    result = augment(images, everywhere)
    assert images.equal(before)
    assert result.dtype == torch.uint8
    for image, (pair, place, positive), found in zip(images, cases, result, strict=True):
        operation, _, magnitude = POLICIES[pair][place]
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = in_pillow(picture, operation, magnitude, positive=positive, fill=fill)
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        difference = (found.int() - expected.int()).abs()
        case = (operation, magnitude, positive)
        # What is blended may be a level of 255 off, where rounding goes another way.
        assert difference.max() <= (operation not in EXACT), case


def test_both_operations_are_one_after_the_other_and_none_leaves_the_image():
    images, pairs = photo(25, 16), range(25)
    augment = CifarAutoAugment(16)

    def applied(images, *which):
        signs = (True, False)
        draws = [numbers(pair, applied=which, positive=signs) for pair in pairs]
        return augment(images, torch.stack(draws))

    assert applied(images, True, True).equal(applied(applied(images, True, False), False, True))
    assert applied(images, False, False).equal(images)


def test_the_policy_is_that_of_the_paper():
    # Rows 0, 1, 7, 14 and 24 of table 7.
    assert POLICIES[0] == (("Invert", 0.1, None), ("Contrast", 0.2, 6))
    assert POLICIES[1] == (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9))
    assert POLICIES[7] == (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9))
    assert POLICIES[14] == (("Solarize", 0.5, 2), ("Invert", 0.0, None))
    assert POLICIES[24] == (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None))
    assert len(POLICIES) == 25


def test_magnitudes_are_those_of_the_paper():
    strength = auto_augment._strength
    assert strength("Rotate", 9, 32) == 30
    assert strength("ShearY", 3, 32) == pytest.approx(0.1)
    # 150 pixels of ImageNet's 331.
    assert strength("TranslateX", 9, 331) == pytest.approx(150)
    assert [strength("Posterize", m, 32) for m in (0, 7, 9)] == [8, 5, 4]
    assert [strength("Solarize", m, 32) for m in (0, 3, 9)] == pytest.approx([256, 256 * 2 / 3, 0])
    assert strength("Color", 9, 32) == pytest.approx(0.9)


def test_what_moves_nothing_and_fills_gray_is_seen_in_the_corners():
    image = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    translated = numbers(1, applied=(False, True), positive=(True, True))
    result = CifarAutoAugment(32)(image, translated[None])
    # 32 * 150 / 331 = 14.50 pixels.
    assert result[0, :, :, :15].eq(128).all()
    assert result[0, :, :, 15:].eq(200).all()


def test_an_image_is_augmented_alike_in_any_batch():
    images = photo(64, 16)
    draws = torch.from_numpy(np.random.default_rng(3).random((64, 5)))
    augment = CifarAutoAugment(16)
    whole = augment(images, draws)
    for b in range(64):
        assert augment(images[b : b + 1], draws[b : b + 1]).equal(whole[b : b + 1])
    assert augment(images.flip(0), draws.flip(0)).equal(whole.flip(0))


def test_operations_are_drawn_with_the_probabilities_of_the_policy(monkeypatch):
    count = 40_000
    taken = []

    def recording(codes, device):
        taken.append(codes)
        return iter(())

    monkeypatch.setattr(auto_augment, "groups", recording)
    draws = torch.from_numpy(np.random.default_rng(0).random((count, 5)))
    CifarAutoAugment(1)(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), draws)
    for place, codes in enumerate(taken):
        for kind in ("Color", "AutoContrast", "Equalize", "Contrast", "Sharpness"):
            chance = sum(p[place][1] for p in POLICIES if p[place][0] == kind) / 25
            found = (codes == KINDS.index(kind)).float().mean().item()
            assert abs(found - chance) < 5 * (chance * (1 - chance) / count) ** 0.5


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="size = 0 is not allowed"):
        CifarAutoAugment(0)
    with pytest.raises(ValueError, match=r"fill = 256 is not allowed \(must be 0..255\)"):
        CifarAutoAugment(8, fill=256)


def test_equalize_and_autocontrast_are_torchvisions():
    images = photo(2, 16)
    for pair, place, change in ((8, 0, F.equalize), (18, 0, F.autocontrast)):
        applied = tuple(i == place for i in range(2))
        draws = numbers(pair, applied=applied, positive=(True, True)).repeat(2, 1)
        assert CifarAutoAugment(16)(images, draws).equal(torch.stack([*map(change, images)]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_augments_alike():
    images, draws = photo(256, 32), torch.from_numpy(np.random.default_rng(0).random((256, 5)))
    augment = CifarAutoAugment(32)
    here, there = augment(images, draws), augment(images.cuda(), draws)
    assert there.is_cuda
    difference = (here.int() - there.cpu().int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.01
