import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.detection.data import digits
from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.digits import Bits, class_counts, ensure_digits, make_digits
from ssod_imwa.detection.data.validation import find_problems
from ssod_imwa.errors import DataError, OutputError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    make_digits(folder / "digits", train_scenes=60, test_scenes=20)
    return folder


def pixels(dataset):
    return [np.asarray(Image.open(record.file_name)) for record in dataset.records]


@pytest.mark.parametrize("imbalance", [1, 20, 100])
def test_class_counts_fall_exponentially_and_keep_the_sum(imbalance):
    counts = class_counts(3500, imbalance=imbalance)
    shares = np.float64(imbalance) ** (-np.arange(10) / 9)
    assert sum(counts) == 3500
    assert np.abs(counts - 3500 * shares / shares.sum()).max() < 1
    assert counts == sorted(counts, reverse=True)


def test_class_counts_keep_one_of_each_class():
    assert min(class_counts(12, imbalance=1000)) == 1
    assert sum(class_counts(12, imbalance=1000)) == 12
    with pytest.raises(ValueError, match="must be at least 10"):
        class_counts(9)


def test_bits_are_uniform_and_a_function_of_their_counts():
    bits = Bits("test", 1)
    drawn = np.array([bits.integer(3, 7) for _ in range(5000)])
    assert set(drawn) == {3, 4, 5, 6, 7}
    # Binomial with n = 5000, p = 0.2: standard deviation 28.3.
    assert np.abs(np.bincount(drawn)[3:] - 1000).max() < 5 * 28.3
    assert Bits("test", 2).bytes(4, 5).shape == (4, 5)
    assert 120 < Bits("test", 2).bytes(10000).mean() < 135
    assert sorted(Bits("test", 3).shuffled(50)) == list(range(50))
    assert Bits("test", 3).shuffled(50) == Bits("test", 3).shuffled(50)


def test_spline_agrees_with_scipys_b_spline():
    ndimage = pytest.importorskip("scipy.ndimage")
    lines = Bits("test").bytes(3, 9)
    positions = Bits("test", 1).bytes(3, 20) * 2 - 64
    ours = digits._spline(lines, positions) / digits._SPLINE_SUM
    for line, where, values in zip(lines, positions, ours, strict=True):
        expected = ndimage.map_coordinates(
            line.astype(float), [where / 64], order=3, prefilter=False, mode="constant"
        )
        inside = (where >= 64) & (where <= 7 * 64)  # scipy treats the borders differently
        np.testing.assert_allclose(values[inside], expected[inside], atol=1e-9)


def test_scenes_are_sound_and_as_described(root):
    train = load_dataset("digits_train", root=root)
    test = load_dataset("digits_test", root=root)
    assert (len(train), len(test)) == (60, 20)
    for dataset in (train, test):
        assert dataset.classes == tuple("0123456789")
        assert find_problems(dataset, read_pixels=True) == []
        sizes = [len(record.annotations) for record in dataset.records]
        assert (min(sizes), max(sizes)) == (2, 5)
        boxes = np.concatenate([record.annotations.boxes for record in dataset.records])
        longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        assert 20 <= longer.min() < longer.max() <= 44
    counts = np.bincount(np.concatenate([r.annotations.labels for r in train.records]))
    assert 15 < counts[0] / counts[9] < 25
    counts = np.bincount(np.concatenate([r.annotations.labels for r in test.records]))
    assert counts.max() - counts.min() <= 1


def test_boxes_hardly_overlap(root):
    for record in load_dataset("digits_train", root=root).records:
        boxes = record.annotations.boxes
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                shared = np.prod(
                    np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
                )
                total = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])
                assert shared / (total - shared) <= 0.05


def test_placing_ends_even_for_the_largest_digits():
    for seed in range(50):
        boxes = digits._place(Bits("test", seed), [(44, 44)] * 5)
        assert len(boxes) == 5


def test_digits_stand_out_inside_their_boxes(root):
    dataset = load_dataset("digits_train", root=root)
    spreads = []
    for record, image in zip(dataset.records, pixels(dataset), strict=True):
        gray = image.astype(float).mean(axis=2)
        for x1, y1, x2, y2 in record.annotations.boxes.astype(int):
            spreads.append(gray[y1:y2, x1:x2].std())
    assert min(spreads) > 8
    assert np.median(spreads) > 25


def test_a_seed_gives_the_same_pixels_and_another_seed_others(root, tmp_path):
    make_digits(tmp_path / "again" / "digits", train_scenes=12, test_scenes=20)
    make_digits(tmp_path / "other" / "digits", train_scenes=12, test_scenes=20, seed=2)
    first = pixels(load_dataset("digits_test", root=root))
    again = pixels(load_dataset("digits_test", root=tmp_path / "again"))
    other = pixels(load_dataset("digits_test", root=tmp_path / "other"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    # Written out: with other pixels, published results would no longer be about this data set.
    digest = hashlib.sha256(b"".join(image.tobytes() for image in first)).hexdigest()
    assert digest[:16] == "1ccb5ae44d98f28c"


def test_train_and_test_share_no_handwriting():
    glyphs = digits._handwriting()
    for label in range(10):
        train, test = (glyphs[split][label] for split in ("train", "test"))
        assert 0.18 < len(test) / (len(train) + len(test)) < 0.22
    assert sum(len(g) for split in glyphs.values() for g in split) == 1797


def test_scenes_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(digits, "_write_split", fail)
    with pytest.raises(OutputError, match="no space left"):
        make_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_the_catalog_makes_the_scenes_once(tmp_path, monkeypatch):
    calls = []

    def small(folder):
        calls.append(folder)
        make_digits(folder, train_scenes=10, test_scenes=10)

    monkeypatch.setattr(digits, "make_digits", small)
    for name in ("digits_train", "digits_test", "digits_train"):
        assert len(load_dataset(name, root=tmp_path)) == 10
    assert calls == [tmp_path / "digits"]


def test_folders_of_another_version_or_kind_are_refused(root, tmp_path):
    (tmp_path / "digits").mkdir()
    with pytest.raises(DataError, match="holds no digit scenes"):
        ensure_digits(tmp_path)
    (tmp_path / "digits" / "annotations").mkdir()
    file = tmp_path / "digits" / "annotations" / "test.json"
    file.write_text(json.dumps({"info": {"version": 0}}))
    with pytest.raises(DataError, match="of version 0, this is version"):
        ensure_digits(tmp_path)
    with pytest.raises(DataError, match="exists already"):
        make_digits(root / "digits")


@pytest.mark.parametrize("change", [{"train_scenes": 9}, {"test_scenes": 0}, {"imbalance": 0}])
def test_numbers_out_of_range_are_refused(tmp_path, change):
    with pytest.raises(DataError, match="is not allowed"):
        make_digits(tmp_path / "digits", **change)
