import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional as reference

from ssod_imwa.data.image_files import read_image
from ssod_imwa.data.streams import On
from ssod_imwa.detection.data import views
from ssod_imwa.detection.data.geometry import map_boxes, map_targets
from ssod_imwa.detection.data.records import Annotations, ImageRecord
from ssod_imwa.detection.data.views import (
    StrongOptions,
    StrongView,
    TestView,
    WeakView,
    draw_color_jitter,
    draw_rectangle,
    make_record_views,
    read_record,
)
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError

NOTHING = {"color_jitter": 0, "grayscale": 0, "gaussian_blur": 0, "erasing": [0, 0, 0]}


def photo(height=60, width=80, seed=0):
    """Smooth colors with some texture, uint8 (H, W, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    return np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)


def record(path, width=80, height=60, boxes=None):
    annotations = None
    if boxes is not None:
        n = len(boxes)
        annotations = Annotations(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.arange(n),
            np.zeros(n, bool),
            np.zeros(n, bool),
        )
    return ImageRecord(str(path), 1, width, height, annotations)


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo()).save(path)
    return path


# ------------------------------------------------------------------------------------- reading


def test_png_is_read_as_it_was_written(png):
    image = read_image(str(png))
    assert image.dtype == torch.uint8
    assert torch.equal(image, tensor(photo()))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_color_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    converted = Image.fromarray(photo()).convert(mode)
    converted.save(path)
    assert torch.equal(read_image(str(path)), tensor(np.array(converted.convert("RGB"))))


def test_sixteen_bits_keep_the_high_byte(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    path = tmp_path / "deep.png"
    Image.fromarray(values).save(path)
    image = read_image(str(path))
    assert torch.equal(image[0], torch.from_numpy((values >> 8).astype(np.uint8)))
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.array(Image.fromarray(photo(40, 64)))
    undo = {  # how a camera stores an upright scene under each orientation
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(path, exif=exif)
    assert torch.equal(read_image(str(path)), tensor(upright))


@pytest.mark.parametrize("content", ["missing", "empty", "truncated", "text"])
def test_unreadable_images_are_named(tmp_path, png, content):
    path = tmp_path / "bad.png"
    whole = png.read_bytes()
    if content != "missing":
        path.write_bytes({"empty": b"", "truncated": whole[:500], "text": b"no image"}[content])
    with pytest.raises(DataError, match=r"bad\.png") as caught:
        read_image(str(path))
    assert "\n" not in str(caught.value)


def test_floating_point_pixels_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path)
    with pytest.raises(DataError, match="floating-point"):
        read_image(str(path))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_flipped_bits_give_pixels_or_a_data_error(tmp_path, suffix):
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(photo(30, 40)).save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[generator.integers(min(len(whole), 300))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():  # a flipped size may look like a decompression bomb
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                read_image(str(path))
        except DataError:
            refused += 1
    assert refused > 10


def test_size_must_be_the_records(png):
    assert read_record(record(png)).shape == (3, 60, 80)
    with pytest.raises(DataError, match=r"80 x 60 pixels.*say 60 x 80"):
        read_record(record(png, width=60, height=80))


# ------------------------------------------------------------------------------------ weak view


def test_weak_view_draws_all_sizes_and_flips_half_the_time():
    view = WeakView([40, 50, 60], 200)
    image = tensor(photo(30, 40))
    heights, flips = [], []
    for i in range(300):
        result, matrix = view(image, counted_generator(i))
        heights.append(result.shape[1])
        flips.append(bool(matrix[0, 0] < 0))
        assert result.shape[2] == round(result.shape[1] * 4 / 3)
        # The image's right edge lands on an edge of the view.
        x = float((matrix @ torch.tensor([40.0, 30.0, 1.0], dtype=torch.float64))[0])
        assert x == pytest.approx(0 if flips[-1] else result.shape[2])
    counts = [heights.count(size) for size in (40, 50, 60)]
    assert sum(counts) == 300
    assert min(counts) > 60
    assert 115 < sum(flips) < 185


def test_a_range_of_sizes_has_every_whole_number_between_its_two():
    view = WeakView([40, 44], 200, sampling="range")
    image = tensor(photo(30, 40))
    heights = [view(image, counted_generator(i))[0].shape[1] for i in range(300)]
    counts = [heights.count(size) for size in range(40, 45)]
    assert sum(counts) == 300
    assert min(counts) > 35


def test_weak_view_resizes_as_torchvision_does():
    image = tensor(photo())
    result, _ = WeakView([90], 1000, flip=False)(image, counted_generator(0))
    expected = reference.resize(image.contiguous(), [90, 120], antialias=True)
    # Integer kernels round differently for the two memory layouts, by one step at most.
    assert (result.int() - expected.int()).abs().max() <= 1


def test_flip_mirrors_pixels_and_boxes():
    image = tensor(photo())
    view = WeakView([60], 100)
    seed = next(i for i in range(50) if view(image, counted_generator(i))[1][0, 0] < 0)
    result, matrix = view(image, counted_generator(seed))
    assert torch.equal(result, image.flip(-1))
    box = torch.tensor([[10.0, 20.0, 30.0, 45.0]])
    moved = map_boxes(box, matrix, height=60, width=80)[0]
    assert moved.tolist() == [50, 20, 70, 45]
    x1, y1, x2, y2 = moved.int().tolist()
    assert torch.equal(result[:, y1:y2, x1:x2].flip(-1), image[:, 20:45, 10:30])


def test_test_view_is_the_weak_view_without_chance():
    image = tensor(photo())
    expected, matrix = WeakView([96], 200, flip=False)(image, counted_generator(0))
    result, same = TestView(96, 200)(image)
    assert torch.equal(result, expected)
    assert torch.equal(matrix, same)
    bounded, _ = TestView(96, 100)(image)
    assert bounded.shape == (3, 75, 100)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (lambda: WeakView([], 100), "min_sizes is empty"),
        (lambda: WeakView([64, 128], 100), "min_size = 128 with max_size = 100"),
        (lambda: WeakView([64], 100, sampling="range"), r"\[64\] is not allowed with .* 'range'"),
        (lambda: WeakView([64, 32], 100, sampling="range"), "the smaller one first"),
        (lambda: WeakView([64], 100, sampling="list"), "choice or range"),
        (lambda: TestView(0, 100), "min_size = 0"),
        (lambda: StrongOptions(gaussian_blur=1.5), "gaussian_blur = 1.5"),
        (lambda: StrongOptions(erasing=[0.5, -1, 0]), r"erasing = \[0.5, -1, 0\] is not allowed"),
        (lambda: StrongOptions(erasing=[0.5]), "must be 3 probabilities"),
    ],
)
def test_views_name_what_is_out_of_range(view, words):
    with pytest.raises(ValueError, match=words):
        view()


def test_flip_probability_is_not_an_argument():
    with pytest.raises(TypeError, match=r"flip = 0.5"):
        WeakView([64], 100, flip=0.5)


# ---------------------------------------------------------------------------------- strong view


def strong(image, seed=0, **settings):
    options = StrongOptions(**{**NOTHING, **settings})
    result, matrix = StrongView(options)(image, counted_generator(seed))
    assert torch.equal(matrix, torch.eye(3, dtype=torch.float64))
    assert result.shape == image.shape
    assert result.dtype == torch.uint8
    return result


def test_strong_view_with_all_off_is_an_equal_copy():
    image = tensor(photo())
    result = strong(image)
    assert torch.equal(result, image)
    result.zero_()
    assert image.any()


def test_jitter_agrees_with_torchvisions_operations():
    """Replays the documented draws against torchvision's functions on Pillow images."""
    picture = Image.fromarray(photo())
    orders = set()
    for seed in range(20):
        replay = counted_generator(seed)
        factors = [0.6 + 0.8 * replay.random() for _ in range(3)]
        hue = -0.1 + 0.2 * replay.random()
        order = replay.permutation(4)
        orders.add(tuple(order))
        steps = [
            lambda p, f=factors[0]: reference.adjust_brightness(p, f),
            lambda p, f=factors[1]: reference.adjust_contrast(p, f),
            lambda p, f=factors[2]: reference.adjust_saturation(p, f),
            lambda p, f=hue: reference.adjust_hue(p, f),
        ]
        expected = result = picture
        for i in order:
            expected = steps[i](expected)
        for operation in draw_color_jitter(counted_generator(seed)):
            result = operation(result)
        assert np.array_equal(np.asarray(result), np.asarray(expected))
    assert len(orders) > 5


def test_operations_are_applied_in_the_papers_order(monkeypatch):
    image = tensor(photo())
    calls = []

    def jitter(generator):
        return [lambda picture: calls.append("jitter") or picture]

    def grayscale(picture, channels):
        calls.append("grayscale")
        return picture

    class Blur(ImageFilter.GaussianBlur):
        def filter(self, image):
            calls.append("blur")
            return super().filter(image)

    monkeypatch.setattr(views, "draw_color_jitter", jitter)
    monkeypatch.setattr(views.F, "rgb_to_grayscale", grayscale)
    monkeypatch.setattr(views.ImageFilter, "GaussianBlur", Blur)
    monkeypatch.setattr(views, "erase_", lambda array, **kw: calls.append(kw["area"]))
    strong(image, color_jitter=1, grayscale=1, gaussian_blur=1, erasing=(1, 1, 1))
    assert calls == ["jitter", "grayscale", "blur", (0.05, 0.2), (0.02, 0.2), (0.02, 0.2)]


def test_grayscale_has_equal_channels_with_rec601_luma():
    image = tensor(photo())
    result = strong(image, grayscale=1)
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])
    luma = (image.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    assert (result[0] - luma).abs().max() <= 1


def test_blur_keeps_the_mean_and_takes_away_detail():
    image = tensor(photo())
    radii = []
    for seed in range(40):
        generator = counted_generator(seed)
        generator.random(3)  # whether to jitter, to go gray, to blur
        radii.append(generator.uniform(0.1, 2.0))
        expected = Image.fromarray(photo()).filter(ImageFilter.GaussianBlur(radii[-1]))
        assert torch.equal(strong(image, seed, gaussian_blur=1), tensor(np.array(expected)))
    assert min(radii) < 0.4
    assert max(radii) > 1.7


def test_bgr_as_rgb_runs_color_operations_on_swapped_channels():
    image = tensor(photo())
    settings = {"color_jitter": 1, "grayscale": 1}
    swapped = strong(image.flip(0), 3, **settings).flip(0)
    assert torch.equal(strong(image, 3, bgr_as_rgb=True, **settings), swapped)
    assert not torch.equal(strong(image, 3, **settings), swapped)


@pytest.mark.parametrize("number", range(3))
def test_erased_rectangles_have_the_papers_areas_and_aspects(number):
    height, width = 400, 500
    area, aspect = views.ERASING_AREA[number], views.ERASING_ASPECT[number]
    areas, ratios = [], []
    for seed in range(400):
        drawn = draw_rectangle(
            height, width, area=area, aspect=aspect, generator=counted_generator(seed)
        )
        if drawn is None:
            continue
        top, left, h, w = drawn
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        areas.append(h * w / (height * width))
        ratios.append(h / w)
    # Whole pixels change thin rectangles by a little.
    assert area[0] * 0.97 <= min(areas) < area[0] + 0.02
    assert area[1] - 0.02 < max(areas) <= area[1] * 1.03
    assert aspect[0] * 0.9 <= min(ratios) < aspect[0] * 1.5
    assert aspect[1] / 1.8 < max(ratios) <= aspect[1] * 1.1
    middle = math.sqrt(aspect[0] * aspect[1])  # log-uniform: half lie on each side
    assert 0.3 < np.mean([ratio > middle for ratio in ratios]) < 0.7


def test_a_rectangle_that_cannot_fit_is_left_out():
    generator = counted_generator(0)
    assert draw_rectangle(1, 1, area=(0.1, 0.2), aspect=(0.5, 2), generator=generator) is None


def test_erasing_writes_uniform_noise_in_one_rectangle_and_nothing_else():
    image = torch.full((3, 300, 400), 255, dtype=torch.uint8)
    for number in range(3):
        erasing = [0.0, 0.0, 0.0]
        erasing[number] = 1.0
        result = strong(image, number, erasing=erasing)
        changed = (result != image).any(dim=0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        inside = result[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed.sum() > 0.99 * inside[0].numel()
        shares = torch.bincount(inside.flatten().int() // 64, minlength=4) / inside.numel()
        assert (shares - 0.25).abs().max() < 0.02
        assert not torch.equal(inside[0], inside[1])


def test_operations_come_with_their_probabilities(monkeypatch):
    image = tensor(photo(12, 12))
    counts = {"jitter": 0, "grayscale": 0, "blur": 0, "erased": [0, 0, 0]}

    def count(name):
        counts[name] += 1

    monkeypatch.setattr(views, "draw_color_jitter", lambda generator: count("jitter") or [])
    monkeypatch.setattr(views.F, "rgb_to_grayscale", lambda p, channels: count("grayscale") or p)
    original = ImageFilter.GaussianBlur
    monkeypatch.setattr(
        views.ImageFilter, "GaussianBlur", lambda radius: count("blur") or original(radius)
    )

    def erase(array, *, area, aspect, generator):
        counts["erased"][views.ERASING_ASPECT.index(aspect)] += 1

    monkeypatch.setattr(views, "erase_", erase)
    for seed in range(1000):
        StrongView()(image, counted_generator(seed))
    found = [counts["jitter"], counts["grayscale"], counts["blur"], *counts["erased"]]
    for share, expected in zip(found, (0.8, 0.2, 0.5, 0.7, 0.5, 0.3), strict=True):
        assert share / 1000 == pytest.approx(expected, abs=0.05)


# -------------------------------------------------------------------------------------- samples


def both(weak, strong):
    return {"weak": weak, "strong": On("weak", strong)}


def test_views_are_a_function_of_their_generator_alone(png):
    item = record(png, boxes=[[10, 10, 40, 50]])
    views = both(WeakView([48, 64], 128), StrongView())

    def make(seed):
        return make_record_views(item, views, counted_generator(seed))

    torch.manual_seed(0)
    one = make(5)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state()
    two = make(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in views:
        assert torch.equal(one[name].image, two[name].image)
    assert any(not torch.equal(one["strong"].image, make(seed)["strong"].image) for seed in (1, 2))


def test_strong_view_shares_geometry_and_boxes_with_the_weak_one(png):
    item = record(png, boxes=[[10, 10, 40, 50], [0, 0, 80, 60]])
    views = both(WeakView([48, 64], 128), StrongView())
    for seed in range(10):
        made = make_record_views(item, views, counted_generator(seed))
        assert made["weak"].image.shape == made["strong"].image.shape
        assert torch.equal(made["weak"].matrix, made["strong"].matrix)
        assert made["strong"].targets is made["weak"].targets
        for view in made.values():
            height, width = view.image.shape[-2:]
            expected = map_targets(item.annotations, view.matrix, height=height, width=width)
            assert torch.equal(view.targets.boxes, expected.boxes)
            assert view.targets.boxes[1].tolist() == pytest.approx([0, 0, width, height])
            assert view.targets.labels.tolist() == [0, 1]


def test_a_strong_view_may_move_pixels(png):
    """Soft Teacher's strong views do: the matrices multiply and the boxes follow."""

    def shift(image, generator):
        matrix = torch.eye(3, dtype=torch.float64)
        matrix[0, 2] = 7
        return image.roll(7, dims=-1), matrix

    item = record(png, boxes=[[10, 10, 40, 50]])
    views = both(WeakView([120], 200, flip=False), shift)
    made = make_record_views(item, views, counted_generator(0))
    assert made["strong"].matrix[0].tolist() == [2, 0, 7]
    assert made["weak"].targets.boxes.tolist() == [[20, 20, 80, 100]]
    assert made["strong"].targets.boxes.tolist() == [[27, 20, 87, 100]]


def test_views_may_be_independent_of_one_another(png):
    item = record(png, boxes=[[10, 10, 40, 50]])
    views = {"teacher": WeakView([60], 200), "student": WeakView([120], 200)}
    made = make_record_views(item, views, counted_generator(0))
    assert [view.image.shape for view in made.values()] == [(3, 60, 80), (3, 120, 160)]
    for view in made.values():
        height, width = view.image.shape[-2:]
        expected = map_targets(item.annotations, view.matrix, height=height, width=width)
        assert torch.equal(view.targets.boxes, expected.boxes)


def test_unlabeled_images_have_no_targets(png):
    views = both(WeakView([64], 128), StrongView())
    made = make_record_views(record(png), views, counted_generator(0))
    assert [view.targets for view in made.values()] == [None, None]
