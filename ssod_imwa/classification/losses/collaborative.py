"""Losses of experts that learn together (ECL, NCL), and MoCo's loss; without state.

Experts are stacked: logits (K, B, C) and features (K, B, d) are those of K experts for one batch of
B images with labels (B,) int64 in 0..C-1. As in `base`, half precision is widened to float32, and a
scalar is the mean over images, 0 without images.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from ssod_imwa.classification.checks import check_above_0, check_choice
from ssod_imwa.classification.losses.base import widened

BktForm = Literal["cls_over_ref", "ref_over_cls"]


def info_nce_loss(
    queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """MoCo's loss: finding a query's own key among it and the queue, by cosines / T.

    The other keys of the batch are no negatives. Pass keys and queue without gradient.

    Args:
        queries: (B, d), rows of length 1.
        keys: (B, d), rows of length 1: each query's other view, through the momentum encoder.
        queue: (Q, d), rows of length 1: keys of earlier batches.
        temperature: T, above 0: 0.2 in NCL and ECL.

    Raises:
        ValueError: temperature out of range, or shapes that do not fit.

    Source: MoCo (He et al., arXiv 1911.05722), equation 1.

    Example:
        >>> query, queue = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> info_nce_loss(query, query, queue, temperature=1.0)  # log(e + 1) - 1
        tensor(0.3133)
    """
    check_above_0(temperature=temperature)
    if queries.dim() != 2 or keys.shape != queries.shape or queue.shape[1:] != queries.shape[1:]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and queue"
            f" {tuple(queue.shape)} do not fit (must be (B, d), (B, d) and (Q, d))"
        )
    # Divided by T, the rounding of a half-precision product would be as large as what counts.
    with torch.autocast(queries.device.type, enabled=False):
        queries = widened(queries)
        positives = (queries * widened(keys)).sum(1, keepdim=True)
        negatives = queries @ widened(queue).T
        scores = torch.cat([positives, negatives], dim=1) / temperature
    losses = scores.logsumexp(1) - scores[:, 0]
    return losses.sum() / max(len(losses), 1)


def knowledge_distillation_loss(
    logits: torch.Tensor, *, temperature: float = 1.0, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """ECL's distillation: the mean over ordered pairs of experts of w_i τ² KL(p_i^k ‖ p_i^q).

    That is 1/(B K (K−1)) Σ_k Σ_{q≠k} Σ_i, with p = softmax(z / τ). Gradients flow to both experts
    of a pair. On features the softmax runs over channels (equation 8, to which the 1/B is added).

    Args:
        logits: (K, B, C), or features (K, B, d); of one expert, which has no other, the loss is 0.
        temperature: τ, above 0.
        weights: (K, B) w, expert k's own for its images, as of `bkt_weights`; None is 1.

    Raises:
        ValueError: temperature out of range, or shapes that do not fit.

    Source: ECL, equations 7 and 8.

    Example:
        >>> certain, even = [[math.log(3), 0.0]], [[0.0, 0.0]]
        >>> knowledge_distillation_loss(torch.tensor([certain, even]))  # log(3) / 8
        tensor(0.1373)
    """
    divergences = _divergences_to_others(logits, temperature)
    if weights is not None:
        if weights.shape != divergences.shape:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not fit logits of shape"
                f" {tuple(logits.shape)} (must be {tuple(divergences.shape)})"
            )
        divergences = weights * divergences
    experts, images = divergences.shape
    pairs = max(experts * (experts - 1), 1)
    return temperature**2 * divergences.sum() / (pairs * max(images, 1))


def nested_distillation_loss(logits: torch.Tensor) -> torch.Tensor:
    """NCL's distillation D: 1/(K−1) Σ_{i≠j} KL(p^j ‖ p^i), the mean over images.

    It is K times ECL's form at τ = 1 without weights: a sum over experts, not a mean.

    Args:
        logits: (K, B, C); NCL gives prior-compensated ones, all classes in one call and the hard
            categories in another. Of one expert the loss is 0.

    Raises:
        ValueError: shapes that do not fit.

    Source: NCL (Li et al., arXiv 2203.15359), in its public code's form.

    Example:
        >>> certain, even = [[math.log(3), 0.0]], [[0.0, 0.0]]
        >>> nested_distillation_loss(torch.tensor([certain, even]))  # log(3) / 4
        tensor(0.2747)
    """
    return len(logits) * knowledge_distillation_loss(logits)


@torch.no_grad()
def bkt_weights(
    cls_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    form: BktForm = "cls_over_ref",
    clip: float | None = None,
    floor: float = 1e-6,
) -> torch.Tensor:
    """ECL's weights of balanced knowledge transfer, (K, B), without gradient.

    With ŷ = softmax(z / σ), σ the standard deviation of that expert's C logits for that image, and
    ℓ = −log ŷ_y of either head, w = ℓ_cls / ℓ_ref: above 1 where the cls head is less sure of the
    label than the ref head. The two sides of equation 6 are reciprocals of each other; this is the
    right one, which the paper's words describe, and `ref_over_cls` is the other.

    Args:
        cls_logits: (K, B, C) z of the classification heads.
        ref_logits: (K, B, C) z of the reference heads.
        labels: (B,).
        form: cls_over_ref, or its reciprocal ref_over_cls.
        clip: largest weight, above 0; None for no limit.
        floor: least ℓ of either head, above 0.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Source: ECL, equations 5 and 6. Taken here, since the paper does not say: σ is the population's,
    of each image by itself.

    Example:
        >>> even, right = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]])
        >>> bkt_weights(even, right, torch.tensor([0]))  # log(2) / log(1 + exp(-2))
        tensor([[5.4609]])
    """
    check_choice("form", form, get_args(BktForm))
    if clip is not None:
        check_above_0(clip=clip)
    check_above_0(floor=floor)
    if ref_logits.shape != cls_logits.shape:
        raise ValueError(
            f"ref_logits of shape {tuple(ref_logits.shape)} do not fit cls_logits of shape"
            f" {tuple(cls_logits.shape)} (must be equal)"
        )
    cls_losses = _standardized_losses(cls_logits, labels).clamp(min=floor)
    ref_losses = _standardized_losses(ref_logits, labels).clamp(min=floor)
    ratio = cls_losses / ref_losses if form == "cls_over_ref" else ref_losses / cls_losses
    return ratio if clip is None else ratio.clamp(max=clip)


@torch.no_grad()
def hard_category_mask(
    raw_logits: torch.Tensor, labels: torch.Tensor, *, count: int
) -> torch.Tensor:
    """NCL's hard categories, (B, C) bool: the true class and the count − 1 others it most mistakes.

    The true class is one of the `count` categories wherever it ranks.

    Args:
        raw_logits: (B, C) of expert 0, without the prior; its mask serves all experts.
        labels: (B,).
        count: N_h in 1..C: 30 of 100 classes, 300 of 1000.

    Raises:
        ValueError: count out of range, or shapes that do not fit.

    Source: NCL (arXiv 2203.15359), hard category mining.

    Example:
        >>> hard_category_mask(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([2]), count=2)
        tensor([[ True, False,  True]])
    """
    if raw_logits.dim() != 2 or labels.shape != raw_logits.shape[:1]:
        raise ValueError(
            f"raw_logits of shape {tuple(raw_logits.shape)} do not fit labels of shape"
            f" {tuple(labels.shape)} (must be (B, C) and (B,))"
        )
    classes = raw_logits.shape[1]
    if not 1 <= count <= classes:
        raise ValueError(f"count = {count} is not allowed (must be 1..C = {classes})")
    ranked = raw_logits.scatter(1, labels[:, None], math.inf)
    mask = torch.zeros_like(raw_logits, dtype=torch.bool)
    return mask.scatter(1, ranked.topk(count, dim=1).indices, True)


def masked_logits(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits (K, B, C) of the hard categories and 0 elsewhere, as in NCL's public code.

    Not −∞ elsewhere: the other classes stay in the softmax, with a constant logit of 0. So a
    constant added to all logits matters here, and the prior is NCL's log n, not log π.

    Args:
        logits: (K, B, C) prior-compensated.
        mask: (B, C) of `hard_category_mask`.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> masked_logits(torch.tensor([[[3.0, 2.0]]]), torch.tensor([[False, True]]))
        tensor([[[0., 2.]]])
    """
    if logits.dim() != 3 or mask.shape != logits.shape[1:]:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit logits of shape"
            f" {tuple(logits.shape)} (must be (B, C) and (K, B, C))"
        )
    return logits * mask


def _divergences_to_others(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Wide Σ_{q≠k} KL(p^k ‖ p^q), (K, B), with gradients to k and to every q."""
    check_above_0(temperature=temperature)
    if logits.dim() != 3:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} are not allowed (must be (K, B, C))"
        )
    experts = len(logits)
    log_p = F.log_softmax(widened(logits) / temperature, dim=2)
    # The sum over q of log p^k - log p^q, in K tensors instead of K²; q = k adds 0.
    differences = experts * log_p - log_p.sum(0)
    return (log_p.exp() * differences).sum(2)


def _standardized_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log softmax(z / σ)_y, (K, B), σ over the classes."""
    if logits.dim() != 3 or labels.shape != logits.shape[1:2]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit labels of shape"
            f" {tuple(labels.shape)} (must be (K, B, C) and (B,))"
        )
    logits = widened(logits)
    # Not `std`, which warns when there are no images.
    variance = (logits - logits.mean(2, keepdim=True)).square().mean(2, keepdim=True)
    # Against the largest logit, equal ones are exactly 0 and stay so, whatever they are divided by.
    centered = logits - logits.amax(2, keepdim=True)
    tiny = torch.finfo(logits.dtype).tiny
    log_p = F.log_softmax(centered / variance.sqrt().clamp(min=tiny), dim=2)
    return -log_p.gather(2, labels.expand(len(logits), -1)[:, :, None]).squeeze(2)
