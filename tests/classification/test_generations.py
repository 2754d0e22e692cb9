import math

import pytest
import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.generations import (
    choose_labels,
    keep_rates,
    with_pseudo_labels,
    write_labels,
)
from ssod_imwa.errors import DataError

TAIL = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]


def test_rates_are_the_published_ones():
    """Of counts as DASO's code has them, and of the profile before it is rounded, as CREST's."""
    expected = [0.2154, 0.2520, 0.2962, 0.3583, 0.4236, 0.5040, 0.5981, 0.7101, 0.8425, 1]
    assert keep_rates(TAIL, alpha=3.0).tolist() == pytest.approx(expected, abs=6e-5)
    profile = [round(1e9 * 100 ** (-k / 9)) for k in range(10)]
    expected = [0.2154, 0.2555, 0.3030, 0.3594, 0.4262, 0.5055, 0.5995, 0.7110, 0.8432, 1]
    assert keep_rates(profile, alpha=3.0).tolist() == pytest.approx(expected, abs=6e-5)


def test_rates_go_by_rank_not_by_place():
    order = [3, 0, 9, 7, 1, 2, 8, 6, 5, 4]
    shuffled = keep_rates([TAIL[k] for k in order], alpha=3.0)
    straight = keep_rates(TAIL, alpha=3.0)
    assert shuffled.tolist() == pytest.approx([float(straight[k]) for k in order])


def test_the_surest_labels_of_each_class_are_kept():
    torch.manual_seed(0)
    probabilities = torch.randn(60, 3).mul(2).softmax(1)
    rates = torch.tensor([0.2, 0.5, 1.0])
    positions, labels = choose_labels(probabilities, rates)
    expected = set()
    rows = probabilities.tolist()
    for k in range(3):
        of_class = [i for i, row in enumerate(rows) if row.index(max(row)) == k]
        of_class.sort(key=lambda i: -max(rows[i]))
        expected |= {(i, k) for i in of_class[: math.floor(float(rates[k]) * len(of_class) + 1e-6)]}
    assert set(zip(positions.tolist(), labels.tolist(), strict=True)) == expected
    assert positions.tolist() == sorted(positions.tolist())


def test_equal_labels_are_kept_from_the_first_on_and_shares_are_whole_where_they_should_be():
    probabilities = torch.tensor([[0.7, 0.3]]).repeat(100, 1)
    positions, _ = choose_labels(probabilities, torch.tensor([0.29, 1.0], dtype=torch.float64))
    assert positions.tolist() == list(range(29))


def images(count, *, is_labeled=True):
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2)
    labels = torch.zeros(count, dtype=torch.int64) if is_labeled else -torch.ones(count).long()
    return ClassificationDataset("x", labels, ("a", "b"), images=pixels, is_labeled=is_labeled)


def test_labels_join_the_labeled_images(tmp_path):
    labeled, unlabeled = images(3), images(5, is_labeled=False)
    path = tmp_path / "labels.json"
    write_labels(path, torch.tensor([1, 4]), torch.tensor([1, 0]))
    joined = with_pseudo_labels(labeled, unlabeled, str(path))
    assert joined.is_labeled
    assert joined.labels.tolist() == [0, 0, 0, 1, 0]
    assert joined.images[:, 0, 0, 0].tolist() == [0, 1, 2, 1, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{}", "cannot be read"),
        ('{"positions": [9], "labels": [0]}', "is not of x's 5 images"),
        ('{"positions": [1], "labels": []}', "is not of x's 5 images"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        with_pseudo_labels(images(3), images(5, is_labeled=False), str(path))
    assert "\n" not in str(caught.value)
