import math

import pytest
import torch

from ssod_imwa.classification.labelers.acr import (
    ACR,
    ACROptions,
    reversed_by_rank,
    symmetric_divergences,
)
from ssod_imwa.classification.labelers.base import WeakOutputs


def softmax(values):
    powers = [math.exp(x - max(values)) for x in values]
    return [x / sum(powers) for x in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


class Reference:
    """ACR with lists, image by image."""

    def __init__(self, counts, options, also_labeled):
        self.options, self.also_labeled = options, also_labeled
        self.prior = [n / sum(counts) for n in counts]
        self.estimate = [1 / len(counts)] * len(counts)
        self.sums, self.tau = [0.0] * 3, options.tau_max

    def label(self, weak, t):
        options = self.options
        tested = [softmax(row) for row in weak.tested_logits.double().tolist()]
        if t // options.epoch >= options.start_epoch:
            seen = [0.0] * len(self.prior)
            for p, index in zip(tested, weak.indices.tolist(), strict=True):
                if max(p) >= options.threshold and not self.also_labeled[index]:
                    k = p.index(max(p))
                    seen[k] = 1.0 if options.estimate == "presence" else seen[k] + 1
            if sum(seen):
                m = options.momentum
                self.estimate = [
                    m * u + (1 - m) * r / sum(seen)
                    for u, r in zip(self.estimate, seen, strict=True)
                ]
                uniform = [1 / len(seen)] * len(seen)
                for a, anchor in enumerate((self.prior, uniform, self.prior[::-1])):
                    both = divergence(self.estimate, anchor) + divergence(anchor, self.estimate)
                    self.sums[a] += both / 2
        results = []
        for logits, p in zip(weak.logits.double().tolist(), tested, strict=True):
            plain = softmax(logits)
            found = []
            for tau, other in ((self.tau, plain), (options.tau_balanced, p)):
                adjusted = softmax(
                    [z - tau * math.log(share) for z, share in zip(logits, self.prior, strict=True)]
                )
                sure = max(adjusted) >= options.threshold or max(other) >= options.threshold
                found.append((adjusted.index(max(adjusted)), sure))
            results.append(found)
        epoch, rest = divmod(t + 1, options.epoch)
        if rest == 0 and epoch >= options.start_epoch:
            powers = [math.exp(s / options.epoch) for s in self.sums]
            span = options.tau_max - options.tau_min
            self.tau = options.tau_min + span * powers[0] / sum(powers)
            self.sums = [0.0] * 3
        return results


@pytest.mark.parametrize("estimate", ["presence", "count"])
def test_labels_are_those_of_a_plain_loop_over_images(small, estimate):
    options = ACROptions(0.6, estimate=estimate, momentum=0.8, epoch=2, start_epoch=2)
    also_labeled = torch.arange(small.UNLABELED) % 3 == 0
    labeler = ACR(small.COUNTS, small.UNLABELED, options, also_labeled=also_labeled)
    reference = Reference(small.COUNTS, options, also_labeled.tolist())
    taus = []
    for t in range(14):
        weak = small.weak(t)
        labels, balanced = labeler.label(weak, t), labeler.balanced(weak)
        expected = reference.label(weak, t)
        for i, (standard, other) in enumerate(expected):
            assert (int(labels.targets[i]), bool(labels.mask[i])) == standard
            assert (int(balanced.targets[i]), bool(balanced.mask[i])) == other
        labeler.after_step(t)
        assert float(labeler.tau) == pytest.approx(reference.tau, abs=1e-5)
        assert labeler.estimate.tolist() == pytest.approx(reference.estimate, abs=1e-6)
        taus.append(float(labeler.tau))
    # Two epochs of 2, then an epoch with nothing gathered yet, then it adapts.
    assert taus[:3] == [2.0, 2.0, 2.0]
    assert taus[3] == taus[4] == pytest.approx(2 / 3)
    assert len(set(taus[5:])) > 2


@pytest.mark.parametrize(
    ("shape", "apart", "tau"),
    [
        ("labeled", (0, 0.7926, 3.1645), 0.0744),
        ("uniform", (0.7926, 0, 0.7926), 0.8154),
        ("reversed", (3.1645, 0.7926, 0), 1.7613),
    ],
)
def test_tau_at_an_anchor_is_the_published_one(small, shape, apart, tau):
    labeler = ACR(small.TAIL, 100, ACROptions(epoch=1, start_epoch=0))
    anchors = dict(zip(("labeled", "uniform", "reversed"), labeler.anchors, strict=True))
    found = symmetric_divergences(anchors[shape], labeler.anchors)
    assert found.tolist() == pytest.approx(apart, abs=1e-4)
    labeler.divergences.copy_(found)
    labeler.after_step(0)
    assert float(labeler.tau) == pytest.approx(tau, abs=1e-4)


def test_the_log_prior_is_the_published_one(small):
    expected = [-0.905, -1.419, -1.932, -2.447, -2.961, -3.482, -3.984, -4.555, -5.040, -5.510]
    labeler = ACR(small.TAIL, 100, ACROptions())
    assert labeler.log_prior.tolist() == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("reverse", "tau"), [(False, 0.44), (True, 1.26)])
def test_presence_of_classes_in_batches_gives_the_published_steady_state(small, reverse, tau):
    """Section 8: 64 images a batch, drawn from the prior or from the reversed one."""
    prior = torch.tensor(small.TAIL, dtype=torch.float64) / sum(small.TAIL)
    drawn_from = prior.flip(0) if reverse else prior
    labeler = ACR(small.TAIL, 64, ACROptions(epoch=500, start_epoch=0))
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for t in range(3000):
        classes = torch.multinomial(drawn_from, 64, replacement=True, generator=generator)
        logits = 20.0 * torch.nn.functional.one_hot(classes, 10)
        weak = WeakOutputs(logits, torch.zeros(64, 1), torch.arange(64), logits)
        labeler.label(weak, t)
        labeler.after_step(t)
        estimates.append(labeler.estimate.clone())
    steady = torch.stack(estimates[1000:]).mean(0)
    apart = symmetric_divergences(steady, labeler.anchors).softmax(0)
    assert 2 * float(apart[0]) == pytest.approx(tau, abs=0.015)
    assert float(labeler.tau) == pytest.approx(tau, abs=0.04)  # of the last epoch alone
    expected = [0.134, 0.134, 0.134, 0.134, 0.129, 0.113, 0.090, 0.061, 0.042, 0.028]
    assert steady.tolist() == pytest.approx(expected[::-1] if reverse else expected, abs=0.004)


def test_a_batch_without_sure_images_changes_nothing(small):
    labeler = ACR(small.COUNTS, small.UNLABELED, ACROptions(1.0, epoch=2, start_epoch=0))
    before = labeler.estimate.clone()
    labeler.label(small.weak(0, scale=0.1), 0)
    assert torch.equal(labeler.estimate, before)
    assert not labeler.divergences.any()


def test_the_reversed_prior_goes_by_rank_not_by_place():
    prior = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert reversed_by_rank(prior).tolist() == pytest.approx([0.5, 0.1, 0.25, 0.15])
    sorted_prior = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert torch.equal(reversed_by_rank(sorted_prior), sorted_prior.flip(0))
