"""Contrastive losses of class-imbalanced classification, without state.

Features are (n, d) floating point with rows of length 1 (`F.normalize`), labels (n,) int64. A
sample may be there in several views, each a row of its own. All is computed in at least float32,
also under autocast: divided by a temperature, the rounding of a half-precision product would be as
large as the differences that count. The result is a scalar, 0 without anchors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssod_imwa.classification.checks import check_above_0, check_at_least_0
from ssod_imwa.classification.losses.balanced_softmax import adjusted_logits
from ssod_imwa.classification.losses.base import widened


def balanced_contrastive_loss(
    features: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """BCL: SupCon with a prototype of each class (complement) and classes of equal say (averaging).

    The pool is the n features and the C prototypes; anchors are the features alone. The loss is
    the mean over anchors i of −1/|P(i)| Σ_{p in P(i)} log(exp s_ip / Σ_{j≠i} exp(s_ij) / n_j), with
    s_ij = f_i·f_j / T, P(i) the other pool members of i's class, and n_j the number of pool members
    of j's class, the anchor itself not counted.

    Args:
        features: (n, d), rows of length 1: all contrastive views.
        labels: (n,) in 0..C-1.
        prototypes: (C, d), rows of length 1.
        temperature: T, above 0.

    Raises:
        ValueError: temperature out of range, or shapes that do not fit.

    Source: BCL (Zhu et al., arXiv 2207.09052), class averaging and class complement.

    Example:
        >>> features, prototypes = torch.tensor([[1.0, 0.0]]), torch.eye(2)
        >>> balanced_contrastive_loss(features, torch.tensor([0]), prototypes, temperature=1.0)
        tensor(0.3133)
    """
    _check_rows("features", features, labels)
    classes = torch.arange(len(prototypes), device=labels.device)
    pool_labels = torch.cat([labels, classes])
    similarities = _similarities(features, _pool(features, prototypes), temperature)
    itself = _itself(similarities)
    positives = ((labels[:, None] == pool_labels) & ~itself).to(similarities.dtype)
    members = similarities.new_ones(len(prototypes)).index_add(
        0, labels, similarities.new_ones(len(labels))
    )
    # A class of the anchor has at least two members, the anchor and the prototype: no log of 0.
    averaged = similarities - (members[pool_labels] - positives).log()
    return _mean_over_anchors(similarities, _without(averaged, itself).logsumexp(1), positives)


def parametric_contrastive_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    features: torch.Tensor,
    others: torch.Tensor,
    other_labels: torch.Tensor,
    log_prior: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """PaCo and GPaCo: cross-entropy over classes and samples at once.

    Anchor i's row of scores has z_c + log π_c for each class and f_i·f_j / T for each sample but
    itself. The loss is the mean over anchors of −Σ w log p / Σ w, p the softmax of the row, w = 1
    at the anchor's class, α at each sample of that class and 0 elsewhere: the public code's β, γ
    and supt, all 1 there, are left out.

    In PaCo the anchors are the queries, the others the keys of the momentum encoder and the queue;
    in GPaCo the anchors are both views, the others the queue. The public code adds 1e-9 to π,
    which changes log π by less than 3e-4 even in iNaturalist 2018, and is left out.

    Args:
        logits: (n, C) z of the anchors.
        labels: (n,) in 0..C-1.
        features: (n, d) of the anchors, rows of length 1.
        others: (m, d), rows of length 1; m may be 0.
        other_labels: (m,).
        log_prior: (C,) log π of `class_counts.log_prior`.
        alpha: α, 0 or more, the weight of a sample: 0.01 to 0.05 in the paper.
        temperature: T of the samples, above 0.

    Raises:
        ValueError: a number out of range, or shapes that do not fit.

    Source: PaCo (Cui et al., arXiv 2107.12028); GPaCo (arXiv 2209.12400), without its optional
    label smoothing.

    Example:
        >>> loss = parametric_contrastive_loss(
        ...     logits=torch.zeros(1, 2),
        ...     labels=torch.tensor([0]),
        ...     features=torch.tensor([[1.0, 0.0]]),
        ...     others=torch.tensor([[0.0, 1.0]]),
        ...     other_labels=torch.tensor([0]),
        ...     log_prior=torch.zeros(2),
        ...     alpha=0.05,
        ...     temperature=0.2,
        ... )
        >>> loss  # three scores of 0: log 3
        tensor(1.0986)
    """
    check_at_least_0(alpha=alpha)
    _check_rows("logits", logits, labels)
    _check_rows("features", features, labels)
    _check_rows("others", others, other_labels)
    class_scores = adjusted_logits(logits, log_prior, 1.0)
    similarities = _similarities(features, _pool(features, others), temperature)
    itself = _itself(similarities)
    same = (labels[:, None] == torch.cat([labels, other_labels])) & ~itself
    log_denominator = torch.cat([class_scores, _without(similarities, itself)], dim=1).logsumexp(1)
    scores = torch.cat([class_scores, similarities], dim=1)
    weights = torch.cat([F.one_hot(labels, logits.shape[1]), alpha * same], dim=1)
    return _mean_over_anchors(scores, log_denominator, weights.to(scores.dtype))


def _similarities(features: torch.Tensor, pool: torch.Tensor, temperature: float) -> torch.Tensor:
    """Wide f_i·f_j / T."""
    check_above_0(temperature=temperature)
    with torch.autocast(features.device.type, enabled=False):
        return widened(features) @ widened(pool).T / temperature


def _pool(features: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    if more.shape[1:] != features.shape[1:]:
        raise ValueError(
            f"rows of shape {tuple(more.shape)} do not fit features of shape"
            f" {tuple(features.shape)} (must have the same width)"
        )
    return torch.cat([features, more])


def _itself(similarities: torch.Tensor) -> torch.Tensor:
    """Where an anchor meets itself: the first n columns are the n anchors."""
    anchors, pool = similarities.shape
    return torch.eye(anchors, pool, dtype=torch.bool, device=similarities.device)


def _without(scores: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Scores that add nothing to a logsumexp where left out."""
    # Not -inf: a row of nothing else would have the gradient nan.
    return scores.masked_fill(left_out, torch.finfo(scores.dtype).min)


def _mean_over_anchors(
    scores: torch.Tensor, log_denominator: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The mean of log Z − Σ w s / Σ w over anchors with Σ w > 0."""
    total = weights.sum(1)
    anchors = total > 0
    wanted = (weights * scores).sum(1) / torch.where(anchors, total, 1)
    return torch.where(anchors, log_denominator - wanted, 0).sum() / anchors.sum().clamp(min=1)


def _check_rows(name: str, rows: torch.Tensor, labels: torch.Tensor) -> None:
    if rows.dim() != 2 or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} of shape {tuple(rows.shape)} do not fit labels of shape"
            f" {tuple(labels.shape)} (must be (n, width) and (n,))"
        )
