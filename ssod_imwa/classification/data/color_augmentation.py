"""Color changes of a batch, by another amount for each image; torchvision's take one for all.

    strength = 0.6 + 0.8 * numbers
    images = adjust_contrast(images, strength)

Images are uint8 (B, 3, H, W) of 0..255 or float32 of 0..1; uint8 results are rounded down after
each change, as torchvision's (and nearly Pillow's) are. Amounts may be float64, which keeps uint8
results equal to torchvision's, whose scalars are Python's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torchvision.transforms.v2 import functional as F


def adjust_brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Images times a factor each.

    Args:
        images: uint8 or float32 (B, 3, H, W).
        factors: (B,), at least 0; 1 changes nothing.

    Example:
        >>> images = torch.full((2, 3, 1, 1), 100, dtype=torch.uint8)
        >>> adjust_brightness(images, torch.tensor([0.5, 3.0]))[:, 0].flatten().tolist()
        [50, 255]
    """
    return _bounded(images * _of_images(factors, images).float(), images.dtype)


def adjust_contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Images moved away from (factor > 1) or towards the mean of their gray values.

    Args:
        images: uint8 or float32 (B, 3, H, W).
        factors: (B,), at least 0; 1 changes nothing, 0 leaves the mean alone.

    Example:
        >>> images = torch.tensor([100, 100, 100, 200, 200, 200], dtype=torch.uint8)
        >>> images = images.reshape(1, 2, 3).permute(0, 2, 1)[:, :, None]
        >>> adjust_contrast(images, torch.tensor([0.5]))[0, 0, 0].tolist()
        [124, 174]
    """
    mean = _gray(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean, factors)


def adjust_saturation(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Images moved away from (factor > 1) or towards their gray values.

    Args:
        images: uint8 or float32 (B, 3, H, W).
        factors: (B,), at least 0; 1 changes nothing, 0 leaves gray.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
        >>> adjust_saturation(red, torch.tensor([0.0])).flatten()
        tensor([0.2989, 0.2989, 0.2989])
    """
    return _blend(images, _gray(images), factors)


def adjust_hue(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Images with their hues turned, brightness (the largest channel) and saturation kept.

    With V the largest channel, R its distance to the smallest and h in [0, 6) the hue, channel c is

        V − R max(0, min(k, 4 − k, 1)),   k = (n_c + h) mod 6,   n = 5, 3, 1 for red, green, blue.

    Args:
        images: float32 (B, 3, H, W).
        shifts: (B,), in turns: 1/3 makes green of red.

    Raises:
        ValueError: the images are not floating point.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
        >>> adjust_hue(red, torch.tensor([1 / 3])).flatten().round(decimals=5).tolist()
        [0.0, 1.0, 0.0]
    """
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype} are not allowed (must be floating point, 0..1)")
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    distance = largest - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(distance == 0, 1.0, distance)
    hue = torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(largest == red, (green - blue) / divisor, hue)
    channels = torch.arange(5, 0, -2, device=images.device)[:, None, None]
    k = (hue[:, None] + (channels + 6 * _of_images(shifts, images).float())).remainder_(6)
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return largest[:, None] - distance[:, None] * share


def make_gray(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Images of which those chosen have their gray value in all channels.

    Args:
        images: uint8 or float32 (B, 3, H, W).
        chosen: bool (B,), in CPU memory.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].repeat(2, 1, 1, 1)
        >>> make_gray(red, torch.tensor([False, True])).flatten(1)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.2989, 0.2989, 0.2989]])
    """
    rows = chosen.nonzero()[:, 0].to(images.device, non_blocking=True)
    gray = F.rgb_to_grayscale(images[rows], num_output_channels=3)
    return images.index_copy(0, rows, gray)


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
ORDERS = torch.tensor(list(permutations(range(len(OPERATIONS)))))


def jitter(
    images: torch.Tensor, amounts: torch.Tensor, orders: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue of some images, in an order of their own.

    Args:
        images: float32 (B, 3, H, W).
        amounts: (B, 4): factors of the first three and shift of the hue.
        orders: int64 (B,), 0..23, row of `ORDERS`, in CPU memory.
        chosen: bool (B,), in CPU memory; other images stay as they are.

    Example:
        >>> images = torch.full((2, 3, 1, 1), 0.5)
        >>> amounts = torch.tensor([[1.2, 1.0, 1.0, 0.0]]).repeat(2, 1)
        >>> result = jitter(images, amounts, torch.zeros(2).long(), torch.tensor([True, False]))
        >>> result[:, 0].flatten()
        tensor([0.6000, 0.5000])
    """
    images = images.clone()
    amounts = amounts.to(images.device, non_blocking=True)
    for operations in ORDERS[orders].unbind(1):
        codes = torch.where(chosen, operations, -1)
        for operation, rows in groups(codes, images.device):
            changed = OPERATIONS[operation](images[rows], amounts[rows, operation])
            images.index_copy_(0, rows, changed)
    return images


def groups(codes: torch.Tensor, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Each code of 0 or more that occurs, and the rows with it, on a device.

    Args:
        codes: int64 (B,), in CPU memory, where they can be read without waiting for a GPU.
        device: of the rows.

    Example:
        >>> for code, rows in groups(torch.tensor([4, -1, 0, 4]), torch.device("cpu")):
        ...     print(code, rows.tolist())
        0 [2]
        4 [0, 3]
    """
    present, counts = codes.unique(return_counts=True)
    order = codes.argsort(stable=True).to(device, non_blocking=True)
    for code, rows in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        if code >= 0:
            yield code, rows


def _gray(images: torch.Tensor) -> torch.Tensor:
    """float32 (B, 1, H, W), whole numbers for uint8 images."""
    red, green, blue = images.unbind(1)
    gray = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]
    return gray if images.is_floating_point() else gray.floor_()


def _blend(images: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Factors times images plus their complements times others."""
    factors = _of_images(factors, images)
    blended = (images * factors.float()).addcmul_(others, (1 - factors).float())
    return _bounded(blended, images.dtype)


def _of_images(amounts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return amounts.to(images.device, non_blocking=True)[:, None, None, None]


def _bounded(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return images.clamp_(0, 1) if dtype.is_floating_point else images.clamp_(0, 255).to(dtype)
