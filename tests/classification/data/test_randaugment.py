"""Pillow's side against formulas and plain loops."""

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.classification.data import randaugment as module
from ssod_imwa.classification.data.randaugment import (
    OPERATIONS,
    Draw,
    apply_operation,
    cut_gray,
    draws_of,
    randaugment,
)

LEVELS = range(1, 10)


def noise(size=32, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_strengths_are_the_published_ones():
    assert [round(module.factor(v), 6) for v in LEVELS] == [
        *(0.14, 0.23, 0.32, 0.41, 0.5, 0.59, 0.68, 0.77, 0.86)
    ]
    assert [module.bits(v) for v in LEVELS] == [4, 4, 5, 5, 6, 6, 6, 7, 7]
    assert [module.threshold(v) for v in LEVELS] == [231, 205, 180, 154, 128, 103, 77, 52, 26]
    assert [module.degrees(v) for v in LEVELS] == list(range(3, 28, 3))
    assert [round(module.share(v), 6) for v in LEVELS] == [round(0.03 * v, 6) for v in LEVELS]
    assert [int(module.share(v) * 32) for v in LEVELS] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_draws_are_uniform_over_operations_levels_signs_and_half_are_applied():
    generator = np.random.default_rng(0)
    draws = [draws_of(row) for row in generator.random((20_000, module.NUMBERS)).tolist()]
    number = np.bincount([len(some) for some in draws], minlength=3) / len(draws)
    assert number == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    flat = [draw for some in draws for draw in some]
    for values, choices in (
        ([OPERATIONS.index(draw.operation) for draw in flat], 14),
        ([draw.level - 1 for draw in flat], 9),
        ([int(draw.negative) for draw in flat], 2),
    ):
        shares = np.bincount(values, minlength=choices) / len(flat)
        assert shares == pytest.approx([1 / choices] * choices, abs=0.015)
    pairs = {(a.operation, b.operation) for a, b in (some for some in draws if len(some) == 2)}
    assert len(pairs) == 14**2  # with replacement: also twice the same


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("negative", [False, True])
def test_translations_move_whole_pixels_and_leave_black(level, negative):
    pixels = np.asarray(noise())
    shift = [0, 1, 2, 3, 4, 5, 6, 7, 8][level - 1] * (-1 if negative else 1)
    for axis, name in ((1, "TranslateX"), (0, "TranslateY")):
        expected = np.zeros_like(pixels)
        for to in range(32):
            if 0 <= to + shift < 32:
                source, target = [slice(None)] * 2, [slice(None)] * 2
                source[axis], target[axis] = to + shift, to
                expected[tuple(target)] = pixels[tuple(source)]
        moved = np.asarray(apply_operation(noise(), Draw(name, level, negative)))
        assert np.array_equal(moved, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_shears_and_rotations_take_the_pixel_whose_center_is_nearest(level):
    pixels = np.asarray(noise())
    slope, angle = 0.03 * level, np.radians(3 * level)
    places = np.arange(32) + 0.5
    y, x = np.meshgrid(places, places, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    sources = {
        "ShearX": (y, x + slope * y),
        "ShearY": (y + slope * x, x),
        # Pillow turns counterclockwise, with y downwards.
        "Rotate": (16 + sin * (x - 16) + cos * (y - 16), 16 + cos * (x - 16) - sin * (y - 16)),
    }
    for name, (source_y, source_x) in sources.items():
        rows, columns = (np.floor(source).astype(int) for source in (source_y, source_x))
        inside = (rows >= 0) & (rows < 32) & (columns >= 0) & (columns < 32)
        expected = np.where(
            inside[..., None], pixels[rows.clip(0, 31), columns.clip(0, 31)], np.uint8(0)
        )
        result = np.asarray(apply_operation(noise(), Draw(name, level, negative=False)))
        differing = (result != expected).any(-1)
        # Only where the source lies on the line between two pixels may rounding decide.
        near = np.minimum(abs(source_y - source_y.round()), abs(source_x - source_x.round())) < 1e-3
        assert not (differing & ~near).any()
        assert differing.mean() < 0.05  # a row of 32 may lie on a line


@pytest.mark.parametrize(
    ("place", "first", "last"),
    [
        (0.5, 8, 24),  # 17 pixels inside
        (0.0, 0, 16),  # moved inside
        (0.26, 0, 16),
        (0.97, 23, 31),  # cut off
    ],
)
def test_the_gray_square_is_that_of_the_public_codes(place, first, last):
    image = Image.new("RGB", (32, 32))
    square = np.asarray(cut_gray(image, (place, 0.5), length=16))
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[8:25, first : last + 1] = 127
    assert np.array_equal(square, expected)
    turned = np.asarray(cut_gray(image, (0.5, place), length=16))
    assert np.array_equal(turned, expected.transpose(1, 0, 2))


def test_numbers_decide_over_the_whole_image():
    numbers = [0.99, 0.1, 0.5, 0.9, 0.35, 0.1, 0.99, 0.0, 0.5, 0.5]
    expected = noise()
    for draw in (Draw("TranslateY", 5, False), Draw("Contrast", 9, True)):
        expected = apply_operation(expected, draw)
    expected = cut_gray(expected, (0.5, 0.5), length=16)
    numbers[4] = (OPERATIONS.index("Contrast") + 0.5) / len(OPERATIONS)
    assert np.array_equal(np.asarray(randaugment(noise(), numbers)), np.asarray(expected))
    numbers[1] = numbers[5] = 0.5  # not applied
    assert np.array_equal(np.asarray(randaugment(noise(), numbers, cutout=0)), np.asarray(noise()))
