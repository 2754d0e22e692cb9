"""Views that move pixels: what is drawn how often, what it does, and that boxes follow."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from ssod_imwa.data.streams import On
from ssod_imwa.detection.build import build_views
from ssod_imwa.detection.data import geometric_views
from ssod_imwa.detection.data.geometric_views import (
    COLORS,
    MOVES,
    ColoredView,
    GeometricOptions,
    GeometricView,
    draw_color_change,
    draw_move,
    erase_patches_,
    make_move,
    move_pixels,
)
from ssod_imwa.detection.data.geometry import between, flip_matrix, map_boxes, scale_matrix
from ssod_imwa.detection.data.records import View
from ssod_imwa.detection.data.views import WeakView
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import load_config

LISTS = ("soft_teacher", "mmdetection")
ALL_MOVES = sorted({name for names in MOVES.values() for name in names})
STRAIGHT = ("shift_x", "shift_y")


def photo(height=60, width=80, seed=0):
    """Smooth colors with some texture, uint8 (H, W, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    return np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def tensor(array):
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


# ------------------------------------------------------------------------------- colors


def expected_change(image, name, *, factor, threshold, bits):
    """By torchvision's tensor operations, which share no code with Pillow."""
    if name == "identity":
        return image
    if name == "solarize":
        return torch.where(image < threshold, image, 255 - image)
    enhanced = {
        "saturation": reference.adjust_saturation,
        "contrast": reference.adjust_contrast,
        "brightness": reference.adjust_brightness,
        "sharpness": reference.adjust_sharpness,
    }
    if name in enhanced:
        return enhanced[name](image, factor)
    if name == "posterize":
        return reference.posterize(image, bits)
    return getattr(reference, {"auto_contrast": "autocontrast"}.get(name, name))(image)


@pytest.mark.parametrize("lists", LISTS)
def test_color_changes_are_torchvisions_with_the_published_strengths(lists):
    picture = Image.fromarray(photo())
    names, strengths = Counter(), set()
    for seed in range(120):
        replay = counted_generator(seed)
        name = COLORS[int(replay.integers(9))]
        level = int(replay.integers(1, 10)) if lists == "soft_teacher" else replay.random() * 10
        amounts = {"factor": 0.18 * level + 0.1, "threshold": min(25.6 * level, 255)}
        if lists == "soft_teacher":
            amounts["threshold"] = int(amounts["threshold"])
            amounts["bits"] = 4 - int(0.4 * level)
        else:
            amounts["bits"] = math.ceil(0.4 * level)
        changed = tensor(draw_color_change(counted_generator(seed), lists)(picture))
        expected = expected_change(tensor(picture), name, **amounts)
        # Pillow and torchvision round blends and stretched contrasts differently.
        assert (changed.int() - expected.int()).abs().max() <= 1, name
        names[name] += 1
        strengths.add(level)
    assert set(names) == set(COLORS)
    assert len(strengths) == (9 if lists == "soft_teacher" else 120)


def test_solarize_thresholds_and_bits_are_those_of_the_public_code(monkeypatch):
    amounts = {}
    monkeypatch.setattr(
        geometric_views, "_color_change", lambda name, **x: amounts.update({x["threshold"]: x})
    )
    for seed in range(200):
        draw_color_change(counted_generator(seed), "soft_teacher")
    assert sorted(amounts) == [25, 51, 76, 102, 128, 153, 179, 204, 230]
    assert [amounts[key]["bits"] for key in sorted(amounts)] == [4, 4, 3, 3, 2, 2, 2, 1, 1]
    factors = [amounts[key]["factor"] for key in sorted(amounts)]
    assert factors == pytest.approx([0.28, 0.46, 0.64, 0.82, 1.0, 1.18, 1.36, 1.54, 1.72])


# -------------------------------------------------------------------------------- moves


@pytest.mark.parametrize(
    ("name", "strengths", "point", "moved"),
    [
        ("shift_x", (1, 0), (10, 20), (18, 20)),
        ("shift_y", (-0.5, 0), (10, 20), (10, 17)),
        # Thirty degrees clockwise about (40, 30): the right edge's middle goes down.
        ("rotate", (1, 0), (80, 30), (40 + 40 * math.cos(math.pi / 6), 50)),
        ("shear", (1, 0), (0, 10), (-10 * math.tanh(math.pi / 6), 10)),
        ("shear", (0, 1), (10, 0), (10, 10 * math.tanh(math.pi / 6))),
        # x first, then y with the new x.
        (
            "shear",
            (-1, 1),
            (0, 10),
            (10 * math.tanh(math.pi / 6), 10 + 10 * math.tanh(math.pi / 6) ** 2),
        ),
        ("shear_x", (1, 0), (0, 10), (10 / math.sqrt(3), 10)),
        ("shear_y", (1, 0), (10, 0), (10, 10 / math.sqrt(3))),
    ],
)
def test_moves_take_points_where_they_should(name, strengths, point, moved):
    matrix = make_move(name, strengths, GeometricOptions(), height=60, width=80)
    result = matrix @ torch.tensor([*point, 1.0], dtype=torch.float64)
    assert result.tolist() == pytest.approx([*moved, 1.0])


@pytest.mark.parametrize("lists", LISTS)
def test_each_move_comes_equally_often_with_uniform_strengths(lists, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        geometric_views,
        "make_move",
        lambda name, strengths, *_, **sizes: drawn.append((name, strengths)),
    )
    count = 3000
    for seed in range(count):
        draw_move(counted_generator(seed), GeometricOptions(lists=lists), 60, 80)
    names = Counter(name for name, _ in drawn)
    assert set(names) == set(MOVES[lists])
    for times in names.values():
        assert times / count == pytest.approx(1 / len(MOVES[lists]), abs=0.03)
    strengths = np.array([pair for _, pair in drawn])
    assert strengths.mean(0) == pytest.approx([0, 0], abs=0.05)
    assert strengths.std(0) == pytest.approx([1 / math.sqrt(3)] * 2, abs=0.02)
    assert np.abs(strengths).max() <= 1


@pytest.mark.parametrize("name", ALL_MOVES)
def test_pixels_are_moved_as_by_bilinear_sampling_of_the_inverse(name):
    array = photo(50, 70)
    matrix = make_move(name, (0.7, -0.6), GeometricOptions(), height=50, width=70)
    moved = tensor(move_pixels(Image.fromarray(array), matrix, fill=125)).double()
    y, x = torch.meshgrid(torch.arange(50) + 0.5, torch.arange(70) + 0.5, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)]).flatten(1).double()
    source = (torch.linalg.inv(matrix) @ points)[:2].view(2, 50, 70)
    grid = torch.stack([2 * source[0] / 70 - 1, 2 * source[1] / 50 - 1], dim=-1)
    expected = F.grid_sample(
        tensor(array)[None].double(), grid[None], align_corners=False, padding_mode="border"
    )[0]
    x, y = source
    inside = (x > 1) & (x < 69) & (y > 1) & (y < 49)
    outside = (x < 0) | (x > 70) | (y < 0) | (y > 50)
    assert inside.sum() > 1000
    assert (moved - expected).abs()[:, inside].max() < 1.5
    assert outside.sum() > 50
    assert (moved[:, outside] == 125).all()


# ------------------------------------------------------------------------------ erasing


@pytest.mark.parametrize(
    ("erasing", "shares"),
    [
        ([1.0, 0.75, 0.5, 0.25], {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}),
        ([1.0, 0.8, 0.6, 0.4, 0.2], {1: 0.2, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.2}),
        ([0.0, 0.0, 0.0], {0: 1.0}),
        ([], {0: 1.0}),
    ],
)
def test_the_number_of_patches_has_the_probabilities_of_at_least_so_many(erasing, shares):
    options, count = GeometricOptions(erasing=erasing), 2000
    numbers = Counter()
    for seed in range(count):
        calls = []
        generator = counted_generator(seed)

        class Recorder:
            random = generator.random
            integers = generator.integers

            def uniform(self, low, high, calls=calls):
                calls.append((low, high))
                return 0.0

        erase_patches_(np.zeros((4, 4, 3), np.uint8), options, Recorder())
        assert set(calls) <= {(0, 0.2)}
        numbers[len(calls)] += 1
    assert set(numbers) == set(shares)
    for number, share in shares.items():
        assert numbers[number] / count == pytest.approx(share, abs=0.04)


def test_a_patch_has_the_images_aspect_and_the_fill_value():
    options = GeometricOptions(erasing=[1.0], fill=128)
    edges = []
    for seed in range(300):
        array = np.zeros((100, 200, 3), np.uint8)
        erase_patches_(array, options, counted_generator(seed))
        rows, columns = np.nonzero(array[..., 0])
        if not len(rows):
            continue
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (array == 128).sum() == 3 * height * width
        assert width - 2 * height in (0, 1)  # both rounded down
        edges.append(height)
    assert min(edges) < 3
    assert 17 < max(edges) < 20


# -------------------------------------------------------------------------------- views


def view_of(transform, seed, height=60, width=80):
    return View(*transform(tensor(photo(height, width)), counted_generator(seed)), None)


def test_views_are_a_function_of_their_generator_alone():
    view = GeometricView(WeakView([40, 60], 100, sampling="range"))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, two = view_of(view, 5), view_of(view, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.matrix, two.matrix)
    assert not torch.equal(one.matrix, view_of(view, 6).matrix)


def test_a_colored_view_keeps_the_geometry_and_changes_colors():
    weak = WeakView([60], 100)
    changed = 0
    for seed in range(30):
        plain, colored = view_of(weak, seed), view_of(ColoredView(weak), seed)
        assert torch.equal(plain.matrix, colored.matrix)
        changed += not torch.equal(plain.image, colored.image)
    assert changed > 20


def test_the_order_of_color_and_move_is_random(monkeypatch):
    calls = []
    monkeypatch.setattr(
        geometric_views, "draw_color_change", lambda *_: calls.append("color") or (lambda x: x)
    )
    eye = torch.eye(3, dtype=torch.float64)
    monkeypatch.setattr(geometric_views, "draw_move", lambda *_: calls.append("move") or eye)
    view = GeometricView(WeakView([20], 100))
    for seed in range(200):
        view_of(view, seed, 20, 30)
    firsts = Counter(calls[::2])
    assert sorted(calls) == ["color"] * 200 + ["move"] * 200
    assert 70 < firsts["color"] < 130


def test_size_and_flip_of_a_strong_view_do_not_follow_the_weak_ones():
    """As in training: both from one generator, one after the other."""
    weak = WeakView([40, 80], 200)
    strong = GeometricView(weak, GeometricOptions(max_shift=0, max_angle=0, max_shear=0))
    pairs = Counter()
    image = tensor(photo(20, 30))
    for seed in range(400):
        generator = counted_generator(seed)
        made = [transform(image, generator) for transform in (weak, strong)]
        pairs[tuple((x.shape[1], bool(matrix[0, 0] < 0)) for x, matrix in made)] += 1
    assert len(pairs) == 16
    assert min(pairs.values()) > 10


@pytest.mark.parametrize("name", ALL_MOVES)
@pytest.mark.parametrize("flip", [False, True])
def test_what_is_painted_is_found_where_the_matrix_puts_its_box(name, flip, monkeypatch):
    """Pixels and boxes move alike."""
    monkeypatch.setattr(geometric_views, "draw_color_change", lambda *_: lambda picture: picture)
    monkeypatch.setattr(
        geometric_views,
        "draw_move",
        lambda generator, options, height, width: make_move(
            name, (0.6, 0.5), options, height=height, width=width
        ),
    )
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    image[:, 30:80, 50:110] = 255
    view = GeometricView(WeakView([150], 400), GeometricOptions(erasing=[], fill=0))
    seeds = (
        s for s in itertools.count() if (view(image, counted_generator(s))[1][0, 0] < 0) == flip
    )
    result, matrix = view(image, counted_generator(next(seeds)))
    rows, columns = (result[0] > 100).nonzero(as_tuple=True)
    bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    box = torch.tensor([[50.0, 30.0, 110.0, 80.0]])
    (expected,) = map_boxes(box, matrix, height=result.shape[1], width=result.shape[2]).tolist()
    # The corners of a turned box are thinner than a pixel.
    assert [int(edge) for edge in bright] == pytest.approx(expected, abs=2)


def test_the_configuration_says_whose_strong_views_are_made():
    geometry = ("INPUT.MIN_SIZE_TRAIN", "[400, 1200]", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    kind = ("INPUT.STRONG.KIND", "geometric", "INPUT.STRONG.LISTS", "mmdetection")
    views = build_views(load_config(overrides=[*geometry, *kind, "INPUT.STRONG.FILL", "128"]))
    weak = WeakView([400, 1200], 1333, sampling="range")
    options = GeometricOptions(lists="mmdetection", fill=128)
    assert views == {
        "weak": weak,
        "strong": GeometricView(weak, options),
        "colored": ColoredView(weak, "mmdetection"),
    }
    photometric = build_views(load_config())
    assert isinstance(photometric["strong"], On)
    assert photometric["colored"].lists == "soft_teacher"
    rising = [*kind, "INPUT.STRONG.ERASING", "[0.1, 0.2]"]
    with pytest.raises(ConfigError, match=r"^INPUT.STRONG: .*must not rise"):
        build_views(load_config(overrides=rising))


# ---------------------------------------------------------------- weak -> strong -> weak


def views_of(name, strengths, flips, sizes, shape):
    """A weak and a strong view by their matrices, as the transforms make them."""
    height, width = shape
    views = []
    for flip, size, move in zip(flips, sizes, (None, name), strict=True):
        scale = size / min(shape)
        new = max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))
        matrix = scale_matrix(new[1] / width, new[0] / height)
        if flip:
            matrix = flip_matrix(new[1]) @ matrix
        if move is not None:
            options = GeometricOptions()
            matrix = make_move(move, strengths, options, height=new[0], width=new[1]) @ matrix
        views.append(View(torch.empty(3, *new), matrix, None))
    return views


def moved(boxes, source, target):
    height, width = target.image.shape[-2:]
    return map_boxes(boxes, between(source, target), height=height, width=width)


strength = st.floats(-1, 1)
size = st.integers(30, 1200)
edge = st.floats(0.15, 0.85)


@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("name", ALL_MOVES)
@settings(max_examples=40, deadline=None)
@given(
    strengths=st.tuples(strength, strength),
    sizes=st.tuples(size, size),
    shape=st.tuples(size, size),
    corners=st.tuples(edge, edge, edge, edge),
)
def test_boxes_return_from_a_strong_view(name, flips, strengths, sizes, shape, corners):
    """Exactly where nothing is turned or sheared, else as a hull of what they were."""
    weak, strong = views_of(name, strengths, flips, sizes, shape)
    height, width = weak.image.shape[-2:]
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    # float64: far from the origin float32 has no ten-thousandth of a pixel.
    corners = [[x1 * width, y1 * height, x2 * width + 1, y2 * height + 1]]
    box = torch.tensor(corners, dtype=torch.float64)
    there = moved(box, weak, strong)
    back = moved(there, strong, weak)
    tolerance = 1e-4 * (box[:, 2:] - box[:, :2]).repeat(1, 2)
    if name in STRAIGHT:
        assert ((back - box).abs() <= tolerance).all()
        return
    inside = (there[:, :2] > 0).all() and (
        there[:, 2:] < torch.tensor([strong.image.shape[-1], strong.image.shape[-2]])
    ).all()
    if inside:  # else it was clipped
        assert (back[:, :2] <= box[:, :2] + tolerance[:, :2]).all()
        assert (back[:, 2:] >= box[:, 2:] - tolerance[:, 2:]).all()


@pytest.mark.parametrize("degrees", [-30, -7, 12, 30])
def test_a_turned_box_returns_larger_by_the_sine_of_twice_the_angle(degrees):
    """Of a box w x h turned by a and back, hulls are w + h sin 2a wide and h + w sin 2a high."""
    options = GeometricOptions(max_angle=90)
    turn = make_move("rotate", (degrees / 90, 0), options, height=400, width=400)
    weak, strong = (
        View(torch.empty(3, 400, 400), m, None) for m in (torch.eye(3, dtype=torch.float64), turn)
    )
    box = torch.tensor([[150.0, 180.0, 230.0, 210.0]], dtype=torch.float64)
    back = moved(moved(box, weak, strong), strong, weak)
    sine = abs(math.sin(math.radians(2 * degrees)))
    expected = [[80 + 30 * sine, 30 + 80 * sine]]
    assert (back[:, 2:] - back[:, :2]).tolist() == [pytest.approx(expected[0])]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"erasing": [0.5, 0.7]}, "must not rise"),
        ({"erasing": [1.5]}, "erasing"),
        ({"lists": "other"}, "must be one of 'soft_teacher', 'mmdetection'"),
        ({"max_shear": 90}, "below 90"),
        ({"fill": 256}, "0..255"),
    ],
)
def test_options_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GeometricOptions(**settings)
