"""Mixing of images or features, and of labels: mixup, CutMix, Remix, Major Feature Weakening (MFW).

A batch is mixed with itself, permuted: sample n keeps 1 − share_n of itself and takes share_n of
sample permutation[n]. A share is the partner's, the papers' 1 − λ (λ itself in MFW); Beta(α, α) is
the same for both. All randomness comes from a generator.

    permutation = torch.randperm(len(labels), generator=generator)

    shares = draw_beta(1.0, 1, generator=generator)                       # mixup: one for the batch
    logits = model(mix(images, permutation, shares))
    loss = F.cross_entropy(logits, mix_labels(labels, permutation, shares, classes=10))

    shares = strengths[labels] * draw_beta(2.0, len(labels), generator=generator)             # MFW
    logits = upper_layers(mix(lower_layers(images), permutation, shares))
    loss = F.cross_entropy(logits, labels)                     # the labels are not mixed

Remix is mixup with `remix_label_shares` of the shares for the labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ssod_imwa.classification.checks import check_above_0, check_at_least_0, check_choice
from ssod_imwa.classification.class_counts import checked_counts

DEVIATIONS = ("geometric", "arithmetic")

# The ends of float32's (0, 1).
_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = 1 - torch.finfo(torch.float32).eps / 2


def draw_beta(alpha: float, count: int, *, generator: torch.Generator) -> torch.Tensor:
    """Independent draws from Beta(α, α), float32 on the CPU, in (0, 1) for small α, too.

    One number of the generator seeds NumPy's sampler, since torch's own takes no generator. A
    generator on the CPU costs no synchronization.

    Args:
        alpha: α, above 0; 1 is the uniform distribution.
        count: how many, 0 or more.
        generator: moved on by one number, whatever the count.

    Raises:
        ValueError: alpha or count out of range.

    Example:
        >>> draw_beta(1.0, 3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    check_above_0(alpha=alpha)
    check_at_least_0(count=count)
    number = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    draws = np.random.Generator(np.random.Philox(int(number))).beta(alpha, alpha, count)
    # float32 rounds 1.6 % of the draws of α = 0.2 to 1, where nothing would be left of an image.
    return torch.from_numpy(draws).float().clamp(_SMALLEST, _LARGEST)


def mix(values: torch.Tensor, permutation: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """(1 − share_n) x_n + share_n x_permutation[n], with a gradient to both.

    A share of 0 leaves the sample as it is, bit for bit.

    Args:
        values: (B, ...) floating point, images or features; a share counts for all of a sample.
        permutation: (B,) int64, for instance of `torch.randperm`.
        shares: (B,) or, one for all, (1,), in [0, 1]; brought to the type and device of values.

    Raises:
        ValueError: values that are not floating point, or shapes that do not fit.

    Source: mixup (Zhang et al., arXiv 1710.09412), equation 1; MFW, equation 4.

    Example:
        >>> mix(torch.tensor([0.0, 8.0]), torch.tensor([1, 0]), torch.tensor([0.25, 0.0]))
        tensor([2., 8.])
    """
    if not values.is_floating_point():
        raise ValueError(f"values of {values.dtype} are not allowed (must be floating point)")
    _check_pairing(permutation, shares, len(values))
    weight = shares.to(values).reshape(-1, *[1] * (values.dim() - 1))
    return torch.lerp(values, values[permutation], weight)


class Box(NamedTuple):
    """Rows top..bottom-1 and columns left..right-1 of an image."""

    top: int
    bottom: int
    left: int
    right: int


def draw_box(share: float, height: int, width: int, *, generator: torch.Generator) -> Box:
    """CutMix's box: `share` of the image's area, its shape the image's, its center anywhere.

    What lies outside the image is cut off, so the area, and with it the label's share, is often
    smaller: `box_share` is what it has become.

    Args:
        share: in [0, 1].
        height: of the image, in pixels.
        width: of the image, in pixels.
        generator: moved on by two numbers.

    Source: CutMix (Yun et al., arXiv 1905.04899), equation 2.

    Example:
        >>> draw_box(0.25, 4, 4, generator=torch.Generator().manual_seed(0))
        Box(top=0, bottom=2, left=2, right=4)
    """
    box_height, box_width = round(height * share**0.5), round(width * share**0.5)
    row, column = torch.rand(2, generator=generator).tolist()
    top, left = int(row * height) - box_height // 2, int(column * width) - box_width // 2
    return Box(
        max(0, top), min(height, top + box_height), max(0, left), min(width, left + box_width)
    )


def box_share(box: Box, height: int, width: int) -> float:
    """The part of the image that a box covers.

    Example:
        >>> box_share(Box(0, 2, 0, 1), 4, 4)
        0.125
    """
    return (box.bottom - box.top) * (box.right - box.left) / (height * width)


def cut_mix(images: torch.Tensor, permutation: torch.Tensor, box: Box) -> torch.Tensor:
    """The images (B, ch, H, W) with the partners' pixels inside the box; a new tensor.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]])
        >>> cut_mix(images, torch.tensor([1, 0]), Box(0, 1, 1, 2)).flatten().tolist()
        [1.0, 4.0, 3.0, 2.0]
    """
    mixed = images.clone()
    inside = (..., slice(box.top, box.bottom), slice(box.left, box.right))
    mixed[inside] = images[permutation][inside]
    return mixed


def mix_labels(
    labels: torch.Tensor, permutation: torch.Tensor, shares: torch.Tensor, *, classes: int
) -> torch.Tensor:
    """The labels' shares in each mixed sample, as `F.cross_entropy` takes them.

    Args:
        labels: (B,) int64 in 0..classes-1.
        permutation: (B,) int64, that of `mix`.
        shares: (B,) or (1,), those of `mix` or of `remix_label_shares`.
        classes: the number of classes.

    Returns:
        (B, classes) float32, each row with the sum 1.

    Raises:
        ValueError: shapes that do not fit.

    Source: mixup (Zhang et al., arXiv 1710.09412), equation 1.

    Example:
        >>> labels, shares = torch.tensor([0, 1]), torch.tensor([0.25])
        >>> mix_labels(labels, torch.tensor([1, 0]), shares, classes=2)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    _check_pairing(permutation, shares, len(labels))
    one_hot = F.one_hot(labels, classes).float()
    return torch.lerp(one_hot, one_hot[permutation], shares.to(one_hot)[:, None])


def remix_label_shares(
    shares: torch.Tensor,
    labels: torch.Tensor,
    permutation: torch.Tensor,
    counts: torch.Tensor,
    *,
    kappa: float = 3.0,
    tau: float = 0.5,
) -> torch.Tensor:
    """Remix: the whole label to the partner whose class is κ times rarer, if it is mixed in enough.

    The partner has the label's share 1 where n_own ≥ κ n_partner and 1 − share < τ, and the share 0
    where κ n_own ≤ n_partner and share < τ; elsewhere the shares stay.

    Args:
        shares: (B,) or (1,) in [0, 1], those of `mix`.
        labels: (B,) int64.
        permutation: (B,) int64, that of `mix`.
        counts: (C,) training images of each class, on the labels' device.
        kappa: κ, above 1.
        tau: τ in [0, 1].

    Returns:
        (B,) shares for `mix_labels`, of the type of `shares`, on the labels' device.

    Raises:
        ValueError: kappa or tau out of range, or shapes that do not fit.

    Source: Remix (Chou et al., arXiv 2007.03943), section 3; not compared with its public code, so
    check before a claim rests on it.

    Example:
        >>> labels, permutation = torch.tensor([0, 1]), torch.tensor([1, 0])
        >>> shares, counts = torch.tensor([0.6, 0.4]), torch.tensor([100, 10])
        >>> remix_label_shares(shares, labels, permutation, counts)
        tensor([1., 0.])
    """
    if not 1 < kappa < math.inf:
        raise ValueError(f"kappa = {kappa} is not allowed (must be above 1)")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau = {tau} is not allowed (must be between 0 and 1)")
    _check_pairing(permutation, shares, len(labels))
    images = counts[labels]
    of_partner = images[permutation]
    shares = shares.to(labels.device).expand(len(labels))
    all_partner = (images >= kappa * of_partner) & (1 - shares < tau)
    all_itself = (kappa * images <= of_partner) & (shares < tau)
    return shares.masked_fill(all_partner, 1.0).masked_fill(all_itself, 0.0)


def mfw_strengths(
    counts: Sequence[int] | torch.Tensor, *, beta: float = 2.0, deviation: str = "geometric"
) -> torch.Tensor:
    """MFW's s_c = 0.5 · sigmoid((n_c − μ) / (β γ)): the most that a class takes of a partner.

    μ is the geometric mean of the counts and γ their deviation. The paper calls γ the standard
    deviation, but its own account of s, 0.5 for the head and about 0 for the tail of long-tailed
    CIFAR-10, holds only for the geometric one, exp(std log n_c): the default. Both are those of the
    population. Classes of equal counts have s = 0.25.

    Args:
        counts: training images of each class, at least 1 a class.
        beta: β, above 0; 2 for long-tailed and 0.01 for step imbalance in the paper.
        deviation: geometric or arithmetic.

    Returns:
        (C,) float32 in [0, 0.5] on the CPU.

    Raises:
        ValueError: counts that `checked_counts` refuses, beta out of range, unknown deviation.

    Source: MFW, equation 12 and section 5.2.

    Example:
        >>> mfw_strengths([1000, 10, 10])
        tensor([0.5000, 0.0557, 0.0557])
    """
    check_above_0(beta=beta)
    check_choice("deviation", deviation, DEVIATIONS)
    checked = checked_counts(counts)
    if checked.min() == checked.max():  # the limit; the arithmetic form divides 0 by 0
        return torch.full_like(checked, 0.25).float()
    logs = checked.log()
    spread = logs.std(correction=0).exp() if deviation == "geometric" else checked.std(correction=0)
    return (0.5 * torch.sigmoid((checked - logs.mean().exp()) / (beta * spread))).float()


def _check_pairing(permutation: torch.Tensor, shares: torch.Tensor, batch: int) -> None:
    if permutation.shape != (batch,):
        raise ValueError(
            f"permutation of shape {tuple(permutation.shape)} does not fit a batch of {batch}"
            f" (must be ({batch},))"
        )
    if shares.shape not in {(batch,), (1,)}:
        raise ValueError(
            f"shares of shape {tuple(shares.shape)} do not fit a batch of {batch}"
            f" (must be ({batch},), or (1,) for all)"
        )
