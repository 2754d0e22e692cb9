import numpy as np
import pytest
import torch

from ssod_imwa.engine.label_statistics import BINS, LabelCounts, LabelStatistics


def batches(seed):
    generator = np.random.default_rng(seed)
    for _ in range(4):
        n, m = generator.integers(0, 12), generator.integers(0, 9)
        yield {
            "labels": torch.from_numpy(generator.integers(0, 5, n)),
            "scores": torch.from_numpy(generator.random(n)),
            "used": torch.from_numpy(generator.random(n) < 0.5),
            "images": int(generator.integers(1, 5)),
            "empty": int(generator.integers(0, 2)),
            "judged": torch.from_numpy(generator.random(n) < 0.7),
            "right": torch.from_numpy(generator.random(n) < 0.6),
            "objects": torch.from_numpy(generator.integers(0, 5, m)),
        }


@pytest.mark.parametrize("seed", range(3))
def test_sums_equal_those_of_plain_loops(seed):
    statistics = LabelStatistics(5)
    expected = {name: np.zeros(5, int) for name in ("used", "judged", "right", "objects")}
    expected |= {"scores": np.zeros(BINS, int), "images": 0, "empty": 0}
    for batch in batches(seed):
        labels, scores = batch["labels"], batch["scores"]
        rest = {name: value for name, value in batch.items() if name not in ("labels", "scores")}
        statistics.add(labels, scores, **rest)
        expected["images"] += batch["images"]
        expected["empty"] += batch["empty"]
        for i, label in enumerate(labels.tolist()):
            expected["scores"][min(int(scores[i] * 10), 9)] += 1
            if batch["used"][i]:
                expected["used"][label] += 1
                if batch["judged"][i]:
                    expected["judged"][label] += 1
                    expected["right"][label] += int(batch["right"][i])
        for label in batch["objects"].tolist():
            expected["objects"][label] += 1
    counts = statistics.take()
    for name, value in expected.items():
        assert np.array_equal(getattr(counts, name), value), name
    empty = statistics.take()
    assert (empty.images, empty.used.sum(), empty.scores.sum()) == (0, 0, 0)


def test_counts_survive_a_checkpoint_and_add_up():
    statistics = LabelStatistics(5)
    for batch in batches(7):
        labels, scores = batch.pop("labels"), batch.pop("scores")
        statistics.add(labels, scores, **batch)
    counts = statistics.take()
    twice = counts + LabelCounts.from_rows(counts.rows())
    assert twice.images == 2 * counts.images
    assert np.array_equal(twice.used, 2 * counts.used)
    assert np.array_equal(twice.scores, 2 * counts.scores)


def test_scores_at_the_ends_fall_into_the_outer_bins():
    statistics = LabelStatistics(1)
    statistics.add(
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([0.0, 1.0]),
        used=torch.ones(2, dtype=torch.bool),
        images=1,
        empty=0,
    )
    assert statistics.take().scores.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_objects_that_are_not_known_count_for_no_class():
    statistics = LabelStatistics(2)
    labels, truth = torch.tensor([0, 1, 0]), torch.tensor([0, -1, 1])
    statistics.add(
        *(labels, torch.ones(3)),
        used=torch.ones(3, dtype=torch.bool),
        images=3,
        empty=0,
        right=labels == truth,
        judged=truth >= 0,
        objects=truth,
    )
    counts = statistics.take()
    assert counts.objects.tolist() == [1, 1]
    assert counts.judged.tolist() == [2, 0]
    assert counts.right.tolist() == [1, 0]
