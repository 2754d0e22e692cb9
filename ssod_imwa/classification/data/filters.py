"""Sharper and blurred images, by another amount for each image of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def adjust_sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Images moved away from (factor > 1) or towards their `smooth_means`; the border stays.

    Args:
        images: uint8 (B, C, H, W).
        factors: (B,), at least 0; 1 changes nothing. float64 keeps results equal to torchvision's.

    Raises:
        ValueError: the images are not uint8.

    Example:
        >>> images = torch.tensor([[0, 0, 0], [0, 130, 0], [0, 0, 0]], dtype=torch.uint8)
        >>> adjust_sharpness(images[None, None], torch.tensor([0.0]))[0, 0, 1].tolist()
        [0, 50, 0]
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images of {images.dtype} are not allowed (must be torch.uint8, 0..255)")
    if min(images.shape[2:]) <= 2:
        return images.clone()
    result = images.float()
    inner = result[:, :, 1:-1, 1:-1]
    mean = smooth_means(result)
    complement = (1 - factors.to(images.device, non_blocking=True)).float()[:, None, None, None]
    inner.addcmul_(mean.sub_(inner), complement)
    return result.clamp_(0, 255).to(torch.uint8)


def smooth_means(images: torch.Tensor) -> torch.Tensor:
    """Means over 3 x 3 pixels, rounded, of which the middle counts 5 of 13: Pillow's smooth filter.

    Args:
        images: float32 (B, C, H, W) of whole numbers, H and W at least 3.

    Returns:
        (B, C, H - 2, W - 2), of all pixels but those on the border.

    Example:
        >>> smooth_means(torch.tensor([[0.0, 0, 0], [0, 130, 0], [0, 0, 13]])[None, None])
        tensor([[[[51.]]]])
    """
    # Sums of whole numbers are exact, whatever their order; a thirteenth is never just between two.
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    return total.add_(images[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()


def blur(images: torch.Tensor, sigmas: torch.Tensor, *, radius: int) -> torch.Tensor:
    """Images under a Gaussian of their own width.

    Args:
        images: float32 (B, C, H, W).
        sigmas: (B,), standard deviations in pixels, above 0.
        radius: pixels to each side that count, at least 0 and less than H and W; three times the
            largest sigma leaves out 0.3 %. Pixels beyond the border are mirror images.

    Raises:
        ValueError: the radius is out of range.

    Example:
        >>> images = torch.zeros(1, 1, 5, 5)
        >>> images[..., 2, 2] = 1
        >>> blur(images, torch.tensor([0.5]), radius=1)[0, 0, 2]
        tensor([0.0000, 0.0838, 0.6193, 0.0838, 0.0000])
    """
    if not 0 <= radius < min(images.shape[2:]):
        raise ValueError(
            f"radius = {radius} is not allowed (must be 0..{min(images.shape[2:]) - 1}, less than "
            "the edges)"
        )
    sigmas = sigmas.to(images.device, non_blocking=True).float()
    distances = torch.arange(radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (distances / sigmas[:, None]) ** 2)
    weights = weights / (2 * weights.sum(1, keepdim=True) - 1)
    parts = weights[:, :, None, None, None].unbind(1)
    for dim in (2, 3):
        images = _weighted(_mirrored(images, radius, dim), parts, dim, images.shape[dim])
    return images


def _mirrored(images: torch.Tensor, radius: int, dim: int) -> torch.Tensor:
    sides = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
    return F.pad(images, sides, mode="reflect")


def _weighted(
    padded: torch.Tensor, parts: tuple[torch.Tensor, ...], dim: int, size: int
) -> torch.Tensor:
    """Sum over distances k of part k times the two pixels at this distance."""
    radius = len(parts) - 1
    total = padded.narrow(dim, radius, size) * parts[0]
    for k in range(1, radius + 1):
        pair = padded.narrow(dim, radius - k, size) + padded.narrow(dim, radius + k, size)
        total.addcmul_(pair, parts[k])
    return total
