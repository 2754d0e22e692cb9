import math

import pytest
import torch

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.labelers.daso import DASO, DASOOptions
from ssod_imwa.classification.labelers.prototypes import Prototypes


def plain(rows):
    return [[float(x) for x in row] for row in rows]


def cosine(a, b):
    lengths = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1] or 1)


def softmax(values):
    powers = [math.exp(x - max(values)) for x in values]
    return [x / sum(powers) for x in powers]


class Reference:
    """DASO with lists: a queue for each class, labels image by image."""

    def __init__(self, classes, size, warmup, window, t_proto, t_dist, threshold):
        self.queues = [[] for _ in range(classes)]
        self.size, self.warmup, self.window = size, warmup, window
        self.t_proto, self.t_dist, self.threshold = t_proto, t_dist, threshold
        self.histogram, self.open = [0] * classes, [0] * classes

    def step(self, features, labels, weak, t):
        for feature, label in zip(plain(features), labels.tolist(), strict=True):
            self.queues[label] = [*self.queues[label], feature][-self.size :]
        means = [
            [sum(column) / len(queue) for column in zip(*queue, strict=True)] if queue else None
            for queue in self.queues
        ]
        results = []
        for logits, feature in zip(plain(weak.logits), plain(weak.features), strict=True):
            p = softmax(logits)
            q = softmax([cosine(feature, c) / self.t_proto if c else 0.0 for c in means])
            if t >= self.warmup:
                shares = [(m / max(self.histogram)) ** (1 / self.t_dist) for m in self.histogram]
                v = shares[p.index(max(p))]
                p = [(1 - v) * a + v * b for a, b in zip(p, q, strict=True)]
            results.append((p, p.index(max(p)), max(p) >= self.threshold))
            self.open[p.index(max(p))] += 1
        if (t + 1) % self.window == 0:
            self.histogram, self.open = self.open, [0] * len(self.open)
        return results


@pytest.mark.parametrize("t_dist", [1.5, 0.3])
def test_labels_are_those_of_a_plain_loop_over_images(small, t_dist):
    options = DASOOptions(
        0.6,
        warmup=3,
        queue=8,
        window=2,
        prototype_temperature=0.5,
        distribution_temperature=t_dist,
    )
    labeler = DASO(small.COUNTS, options, width=small.WIDTH)
    reference = Reference(3, 8, 3, 2, 0.5, t_dist, 0.6)
    changed = 0
    for t in range(9):
        labels = small.advance(labeler, t)
        expected = reference.step(*small.labeled(t)[:2], small.weak(t), t)
        for i, (probabilities, target, sure) in enumerate(expected):
            assert labels.probabilities[i].tolist() == pytest.approx(probabilities, abs=1e-5)
            assert int(labels.targets[i]) == target
            assert bool(labels.mask[i]) == sure
            changed += target != int(small.weak(t).logits[i].argmax())
    assert changed  # the prototypes have had a say


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.5, [1, 0.7098, 0.5042, 0.3578, 0.2540, 0.1794, 0.1284, 0.0878, 0.0635, 0.0464]),
        (0.3, [1, 0.1802, 0.0326, 0.0059, 0.0011, 0.0002, 0, 0, 0, 0]),
    ],
)
def test_semantic_shares_are_the_published_ones(small, temperature, expected):
    options = DASOOptions(distribution_temperature=temperature)
    labeler = DASO(small.TAIL, options, width=2)
    labeler.histogram.copy_(torch.tensor(small.TAIL))
    assert labeler.semantic_shares().tolist() == pytest.approx(expected, abs=1e-4)


def test_before_a_window_is_closed_labels_are_linear(small):
    options = DASOOptions(0.6, warmup=0, queue=8, window=100)
    labeler = DASO(small.COUNTS, options, width=small.WIDTH)
    labels = small.advance(labeler, 0)
    torch.testing.assert_close(labels.probabilities, small.weak(0).logits.softmax(1))


def test_a_fixed_blend_is_half_and_half_for_every_class_but_not_for_the_other_head(small):
    options = DASOOptions(0.6, warmup=0, queue=8, window=100, fixed_blend=0.5)
    labeler = DASO(small.COUNTS, options, width=small.WIDTH)
    weak = small.weak(0)
    labels = small.advance(labeler, 0)
    linear = weak.logits.softmax(1)
    semantic = labeler.prototypes.similarity_logits(weak.features).softmax(1)
    torch.testing.assert_close(labels.probabilities, (linear + semantic) / 2)
    other = weak.tested_logits.softmax(1)
    torch.testing.assert_close(labeler.of_tested_head(other, weak, 0), other)


def test_the_other_head_is_blended_by_its_own_classes(small):
    labeler = small.MAKERS["daso"]()
    for t in range(4):
        small.advance(labeler, t)
    weak = small.weak(9)
    p = weak.tested_logits.softmax(1)
    shares = labeler.semantic_shares()[p.argmax(1)][:, None]
    q = labeler.prototypes.similarity_logits(weak.features).softmax(1)
    found = labeler.of_tested_head(p, weak, 4)
    torch.testing.assert_close(found, (1 - shares) * p + shares * q)
    assert torch.equal(labeler.of_tested_head(p, weak, 2), p)  # still warming up


def test_queues_turn_over_class_by_class():
    prototypes = Prototypes(2, 1, size=3, temperature=1.0)
    prototypes.write_(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1]))
    assert prototypes.means()[:, 0].tolist() == [1.5, 3.0]
    prototypes.write_(torch.tensor([[4.0], [5.0]]), torch.tensor([0, 0]))
    assert prototypes.means()[:, 0].tolist() == pytest.approx([11 / 3, 3.0])  # 2, 4 and 5
    assert prototypes.written.tolist() == [4, 1]


def test_a_batch_longer_than_a_queue_is_refused():
    prototypes = Prototypes(2, 1, size=3, temperature=1.0)
    with pytest.raises(ValueError, match=r"size = 3 is not allowed \(must be at least the 4 label"):
        prototypes.write_(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), Group())


def test_a_class_without_prototype_is_at_a_right_angle_to_everything():
    prototypes = Prototypes(2, 2, size=4, temperature=0.05)
    prototypes.write_(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    logits = prototypes.similarity_logits(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    torch.testing.assert_close(logits, torch.tensor([[20.0, 0.0], [0.0, 0.0]]))
