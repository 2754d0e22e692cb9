"""How far a refined box moves when its proposal moves: how sure Soft Teacher is of a box."""

from __future__ import annotations

import torch


def jitter_boxes(boxes: torch.Tensor, *, copies: int, scale: float) -> torch.Tensor:
    """Copies of boxes whose coordinates are moved by Gaussian noise, not clipped.

    The standard deviation is `scale` times the width for x, times the height for y; edges below a
    pixel count as one. Drawn from torch's global generator, which the trainer seeds for each step.

    Args:
        boxes: (n, 4), x1 y1 x2 y2 in pixels.
        copies: of each box.
        scale: at least 0.

    Returns:
        (copies, n, 4).
    """
    noise = torch.randn(copies, *boxes.shape, dtype=boxes.dtype, device=boxes.device)
    return boxes + scale * noise * _edges(boxes)


def box_deviation(refined: torch.Tensor) -> torch.Tensor:
    """The standard deviation of a box's refined copies, relative to its size.

    That of each coordinate over the copies (of a sample: n - 1) is divided by the width (x) or
    height (y) of the mean box, where edges below a pixel count as one; then the mean of the four is
    taken.

    Args:
        refined: (copies, n, 4), at least two copies.

    Returns:
        (n,), at least 0.

    Source: Soft Teacher (arXiv 2106.09018), equation 9, in its public code's form.

    Example:
        >>> box_deviation(torch.tensor([[[0.0, 0, 10, 10]], [[2.0, 0, 10, 10]]]))
        tensor([0.0393])
    """
    mean = refined.mean(dim=0)
    # By hand: torch's `std` warns where there is no box.
    deviation = ((refined - mean).square().sum(dim=0) / (len(refined) - 1)).sqrt()
    return (deviation / _edges(mean)).mean(dim=1)


def _edges(boxes: torch.Tensor) -> torch.Tensor:
    """Width, height, width, height of boxes (n, 4), each at least a pixel."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)
