import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssod_imwa.classification.data import auto_augment
from ssod_imwa.classification.data.auto_augment import KINDS, POLICIES, STRONGEST, CifarAutoAugment

# What is drawn with a probability of 0 or 1 whatever the policy says.
ALWAYS, NEVER = 0.0, 1 - 1e-12


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


def by_torchvision(image, pair, *, applied, positive, fill, monkeypatch):
    """The library's transform with its draws replaced."""
    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=fill)
    draws = []
    for (operation, _, _), yes, sign in zip(POLICIES[pair], applied, positive, strict=True):
        draws.append(0.0 if yes else 2.0)
        if yes and operation in STRONGEST:
            draws.append(1.0 if sign else 0.0)
    left = iter(draws)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_: torch.tensor(pair))
        patch.setattr(torch, "rand", lambda *_: torch.tensor(next(left)))
        result = transform(image)
    assert not list(left)
    return result


@pytest.mark.parametrize(("size", "fill"), [(32, 128), (13, 0)])
def test_every_operation_is_that_of_torchvisions_transform(size, fill, monkeypatch):
    # Each of the 25 x 2 operations, alone and after the other, with each sign.
    cases = [
        {"pair": pair, "applied": applied, "positive": positive}
        for pair in range(25)
        for applied in ((True, False), (False, True), (True, True), (False, False))
        for positive in ((True, True), (False, False), (True, False))
    ]
    images = photo(len(cases), size)
    before = images.clone()
    everywhere = torch.stack([numbers(**case) for case in cases])
    augment = CifarAutoAugment(size, fill=fill)
    # A probability of 0 would not be applied by any number.
    monkeypatch.setattr(augment, "_probabilities", augment._probabilities.clamp(min=0.05))
    result = augment(images, everywhere)
    assert images.equal(before)
    assert result.dtype == torch.uint8
    for image, case, found in zip(images, cases, result, strict=True):
        expected = by_torchvision(image, **case, fill=fill, monkeypatch=monkeypatch)
        difference = (found.int() - expected.int()).abs()
        # What is rounded down may differ by one level where processors differ.
        assert difference.max() <= 1 + (case["applied"] == (True, True)), case
        assert difference.float().mean() < 0.01, case


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
    assert [strength("Solarize", m, 32) for m in (0, 3, 9)] == pytest.approx([255, 170, 0])
    assert strength("Color", 9, 32) == pytest.approx(0.9)


def test_what_moves_nothing_and_fills_gray_is_seen_in_the_corners():
    image = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    translated = numbers(1, applied=(False, True), positive=(True, True))
    result = CifarAutoAugment(32)(image, translated[None])
    assert result[0, :, :, :14].eq(128).all()
    assert result[0, :, :, 14:].eq(200).all()


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
