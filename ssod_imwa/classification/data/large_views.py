"""Random views of large images, one at a time, of torchvision's and timm's transforms.

    view = large_view("standard", size=224, jitter=True)
    seed_everything(seed, "view", member, t, slot)
    inputs = view(read_image(path))

They draw from the global generators of torch, Python and NumPy, as their libraries do; who calls
them seeds those for each image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.data.augmentation import IMAGENET_STATISTICS, Statistics
from ssod_imwa.classification.data.randaugment import NUMBERS, randaugment
from ssod_imwa.config.options import Options, option

LargeView = Callable[[torch.Tensor], torch.Tensor]
LargeViewName = Literal[
    "test",
    "standard",
    "mae",
    "livt",
    "randcls",
    "randclsstack",
    "bcl_randclsstack",
    "sim",
    "bcl_sim",
    "weak",
    "randaugment",
]
Resize = Literal["bilinear", "bicubic"]

# RandAugment of balanced contrastive learning: two operations of magnitude 10, spread by 0.5.
RANDOM_OPERATIONS = "rand-n2-m10-mstd0.5"
# The longest translation, as a fraction of the edge.
TRANSLATION = 0.45
# RandAugment and random erasing that LiVT (and MAE) fine-tune with.
LIVT_OPERATIONS = "rand-m9-mstd0.5-inc1"
LIVT_ERASING = 0.25

BLUR_SIGMA = (0.1, 2.0)
BLUR_SIZE = 13  # pixels, three times the largest sigma on each side


@dataclass(frozen=True)
class JitterOptions(Options):
    """Of the "standard" view."""

    jitter: bool = option(True, 'color jitter of the "standard" view')


def large_view(
    name: str,
    *,
    size: int = 224,
    statistics: Statistics = IMAGENET_STATISTICS,
    jitter: bool,
    flip: bool = True,
    test_resize: Resize = "bilinear",
    padding: int = 4,
    cutout: int = 16,
) -> LargeView:
    """The view of a published recipe: uint8 (3, H, W) -> normalized float32 (3, size, size).

    "weak" and "randaugment" are FixMatch's: the shorter edge resized to the size, a random crop
    with a reflected border, mirrored, and for "randaugment" its operations and a gray square. All
    others but "test" are a random crop of 8 to 100 % of the image (20 to 100 % for "mae"), resized
    and mirrored, and then

    - "test": resized to 256/224 of the size and cropped from the center instead;
    - "standard": color jitter (0.4, 0.4, 0.4, 0);
    - "mae": nothing; resized bicubically (masked autoencoders, arXiv 2111.06377);
    - "livt": RandAugment (m = 9) and random erasing; resized bicubically;
    - "randcls": the jitter of "standard" and RandAugment (n = 2, m = 10), as BCL, PaCo and NCL
      classify;
    - "sim": that jitter, gray by chance and a blur by chance, as PaCo, GPaCo and NCL contrast;
    - "randclsstack": all of "sim", then that RandAugment (GPaCo);
    - "bcl_sim": jitter (0.4, 0.4, 0.4, 0.1) by chance and gray by chance, without a blur (BCL);
    - "bcl_randclsstack": all of "bcl_sim", then that RandAugment.

    Args:
        name: of the recipe.
        size: edge of the result, in pixels.
        statistics: to normalize with; their mean also fills what RandAugment uncovers.
        jitter: False leaves out the color jitter of "standard".
        flip: mirror half of the images.
        test_resize: how "test" is resized; bicubically in LiVT.
        padding: reflected border of the crops of "weak" and "randaugment", in pixels.
        cutout: edge of the square of "randaugment", in pixels.

    Raises:
        ValueError: the name is not known, or a number is out of range.

    Example:
        >>> view = large_view("test", size=32, jitter=False)
        >>> view(torch.zeros(3, 60, 80, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """
    names = list(get_args(LargeViewName))
    if name not in names:
        raise ValueError(f"view {name!r} is not allowed for images in files (must be in {names})")
    check_at_least_1(size=size)
    if name == "livt":
        return _livt(size, statistics, flip)
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)]
    if name in ("weak", "randaugment"):
        if padding >= size:
            raise ValueError(
                f"padding = {padding} with images of {size} x {size} pixels is not allowed (must "
                "be less to reflect)"
            )
        crop = v2.RandomCrop(size, padding=padding, padding_mode="reflect")
        mirror = [v2.RandomHorizontalFlip()] if flip else []
        operations = [_RandAugment(cutout)] if name == "randaugment" else []
        return v2.Compose([v2.Resize(size), crop, *mirror, *operations, *finish])
    if name == "test":
        resize = v2.Resize(size * 256 // 224, interpolation=v2.InterpolationMode(test_resize))
        return v2.Compose([resize, v2.CenterCrop(size), *finish])
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(
        size,
        scale=(0.2 if name == "mae" else 0.08, 1.0),
        interpolation=bicubic if name == "mae" else v2.InterpolationMode.BILINEAR,
    )
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([crop, *mirror, *_colors(name, size, statistics, jitter), *finish])


def _colors(name: str, size: int, statistics: Statistics, jitter: bool) -> Sequence[nn.Module]:
    plain_jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    gray = v2.RandomGrayscale(p=0.2)
    if name == "standard":
        return [plain_jitter] if jitter else []
    if name == "randcls":
        return [plain_jitter, *_random_operations(size, statistics)]
    if name in ("sim", "randclsstack"):
        blur = v2.RandomApply([v2.GaussianBlur(BLUR_SIZE, BLUR_SIGMA)], p=0.5)
        colors = [plain_jitter, gray, blur]
    elif name in ("bcl_sim", "bcl_randclsstack"):
        colors = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), gray]
    else:
        return []
    return [*colors, *_random_operations(size, statistics)] if "randcls" in name else colors


def _random_operations(size: int, statistics: Statistics) -> Sequence[nn.Module]:
    # Imported here: timm takes seconds and is needed by few views.
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(round(255 * mean) for mean in statistics.mean)
    options = {"translate_const": int(size * TRANSLATION), "img_mean": fill}
    operations = rand_augment_transform(RANDOM_OPERATIONS, options)
    return [v2.ToPILImage(), operations, v2.PILToTensor()]


class _RandAugment(nn.Module):
    """FixMatch's RandAugment, of numbers of torch's global generator."""

    def __init__(self, cutout: int) -> None:
        super().__init__()
        self.cutout = cutout

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        numbers = torch.rand(NUMBERS, dtype=torch.float64).tolist()
        return pil_to_tensor(randaugment(to_pil_image(image), numbers, cutout=self.cutout))


def _livt(size: int, statistics: Statistics, flip: bool) -> LargeView:
    from timm.data import create_transform

    pipeline = create_transform(
        size,
        is_training=True,
        hflip=0.5 if flip else 0.0,
        color_jitter=0.0,
        auto_augment=LIVT_OPERATIONS,
        interpolation="bicubic",
        mean=statistics.mean,
        std=statistics.std,
        re_prob=LIVT_ERASING,
        re_mode="pixel",
    )
    return v2.Compose([v2.ToPILImage(), pipeline])
