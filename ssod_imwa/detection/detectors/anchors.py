"""The anchors of a feature pyramid's levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from ssod_imwa.detection.detectors.options import AnchorOptions


class LevelAnchors(AnchorGenerator):
    """Anchors in float32 whatever type the features have."""

    def forward(
        self, image_list: ImageList, feature_maps: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        # bfloat16 cannot tell pixels above 256 apart. One channel of each level is enough: only
        # type and size are read.
        return super().forward(image_list, [level[:1, :1].float() for level in feature_maps])


class StridedAnchors(LevelAnchors):
    """Anchors that also stand a level's stride apart.

    torchvision's stand image size // map size pixels apart, which is less on the two coarsest
    levels unless images are padded to multiples of the last stride.

    Args:
        sizes: edge lengths of the anchors of each level.
        ratios: height over width, of each level.
        strides: of each level, in pixels.
    """

    def __init__(
        self,
        sizes: tuple[tuple[float, ...], ...],
        ratios: tuple[tuple[float, ...], ...],
        strides: Sequence[int],
    ) -> None:
        super().__init__(sizes, ratios)
        self.strides = strides

    def grid_anchors(
        self, grid_sizes: list[list[int]], strides: list[list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        fixed = [[torch.tensor(stride)] * 2 for stride in self.strides]
        return super().grid_anchors(grid_sizes, fixed)


def anchor_shapes(
    options: AnchorOptions, count: int
) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    """Sizes and aspect ratios of the anchors of each level.

    Args:
        options: see there.
        count: of levels.

    Raises:
        ValueError: they do not fit so many levels that share a head.
    """
    sizes, lists = options.sizes, options.aspect_ratios
    ratios = lists * count if len(lists) == 1 else lists
    if len(sizes) != count or len(ratios) != count:
        raise ValueError(
            f"{len(sizes)} lists of anchor sizes and {len(lists)} of aspect ratios are not "
            f"allowed (must be one list for each of {count} levels, or one list of ratios for all)"
        )
    counts = {len(size) * len(ratio) for size, ratio in zip(sizes, ratios, strict=True)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{sorted(counts)} anchors per place are not allowed (must be one positive number: "
            "all levels share a head)"
        )
    return tuple(map(tuple, sizes)), tuple(map(tuple, ratios))
