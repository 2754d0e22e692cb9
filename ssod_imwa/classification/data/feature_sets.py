"""Data sets of cached features: what a frozen network says of each image in a few views.

A file holds, of every image, the features of its plain view, of its weak views and of a bank of
strong ones, so that a head on a frozen network is trained in seconds; or the maps of its first
stages, so that the others are fine-tuned in minutes. `tools/extract_features.py`
makes it, "features:FILE" names it in DATASETS, and the views "none", "weak" and "randaugment" pick
one of its rows for each image and step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.data.handwriting import is_for_testing
from ssod_imwa.engine.checkpoint.atomic import make_room, write_checkpoint
from ssod_imwa.engine.checkpoint.foreign import read_content
from ssod_imwa.errors import DataError, WeightsError

FORMAT = "ssod_imwa features 1"
PARTS = ("fit", "held_out")


@dataclass(frozen=True, eq=False)
class FeatureDataset(ClassificationDataset):
    """Features in place of images.

    Attributes:
        images: float16 (N, V, d), or maps (N, V, c, h, w), of V views: the plain one, W - 1 more
            weak ones, and strong ones.
        weak: W, how many of the first views are weak ones.
        source: which network sees which pixels, in words; sets of different ones do not go
            together.
        network: timm's name of it.
        stages: how many of its stages made maps; 0 of features, which all of them made.
    """

    weak: int = 1
    source: str = ""
    network: str = ""
    stages: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        dimensions = 5 if self.stages else 3
        if (
            self.images is None
            or self.images.ndim != dimensions
            or not 1 <= self.weak <= self.views
        ):
            raise ValueError(
                f"{self.name}: {self.weak} weak views are not allowed (must be 1 or more of the "
                "views of features (N, V, d) or maps (N, V, c, h, w))"
            )

    @property
    def kind(self) -> str:
        """What it holds, as `models.build.ON_FEATURES` has it."""
        return "cached maps" if self.stages else "cached features"

    @property
    def width(self) -> int:
        """D, or channels of a map."""
        return self._features.shape[2]

    @property
    def views(self) -> int:
        """V."""
        return self._features.shape[1]

    @property
    def distinctive(self) -> torch.Tensor:
        # Of an image that a set holds twice only the plain views are alike.
        return self._features[:, :1]

    @property
    def size(self) -> str:
        shape = " x ".join(map(str, self._features.shape[2:]))
        return f"{self.views} views of {shape} features by {self.source}"

    @property
    def _features(self) -> torch.Tensor:
        assert self.images is not None  # see __post_init__
        return self.images


class FeatureView:
    """One of some views of each image, float32 (B, d) or (B, c, h, w).

    Args:
        first, last: the views first..last-1 of the file.

    Example:
        >>> view = FeatureView(1, 3)
        >>> view(torch.arange(4.0).view(1, 4, 1), torch.tensor([[0.9]]))
        tensor([[2.]])
    """

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.numbers = 1 if last - first > 1 else 0

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Pick a view of each image.

        Args:
            images: float16 (B, V, d) or (B, V, c, h, w).
            numbers: float64 (B, self.numbers), in [0, 1), in CPU memory.
        """
        if not self.numbers:
            return images[:, self.first].float()
        views = self.first + (numbers[:, 0] * (self.last - self.first)).long()
        rows = torch.arange(len(images), device=images.device)
        return images[rows, views.to(images.device)].float()


def feature_view(name: str, dataset: FeatureDataset) -> FeatureView:
    """The view of cached features that stands for one of images.

    Args:
        name: "none", the plain view; "weak", one of the plain and the other weak ones;
            "randaugment", one of the strong ones.
        dataset: whose views they are.

    Raises:
        ValueError: the name is not one of these, or the file has no strong views.
    """
    places = {"none": (0, 1), "weak": (0, dataset.weak), "randaugment": (dataset.weak, None)}
    if name not in places:
        raise ValueError(
            f"view {name!r} is not allowed for features (must be in {list(places)}: other views "
            "need pixels)"
        )
    first, last = places[name]
    if first == dataset.views:
        raise ValueError(
            f"view {name!r} is not allowed for {dataset.name}, which has no strong views (make it "
            "by tools/extract_features.py with --strong)"
        )
    return FeatureView(first, dataset.views if last is None else last)


def write_features(
    path: Path,
    features: torch.Tensor,
    dataset: ClassificationDataset,
    *,
    weak: int,
    made: dict[str, Any],
) -> None:
    """Write the features of a data set, and the folders above the file.

    Args:
        path: of the file.
        features: float16 (N, V, d), or maps (N, V, c, h, w).
        dataset: of the images.
        weak: how many of the first views are weak ones, the plain one among them.
        made: how they were made, as plain values; "source", "network" and "stages" are what
            `FeatureDataset` has.

    Raises:
        UserError: the file cannot be written.
    """
    make_room(path)
    content = {
        "format": FORMAT,
        "data_set": dataset.name,
        "classes": list(dataset.classes),
        "labels": dataset.labels,
        "ids": list(dataset.files) or list(map(str, range(len(dataset)))),
        "features": features,
        "weak": weak,
        "made": made,
    }
    write_checkpoint(path, content)


def read_features(path: Path, *, name: str, part: str = "") -> FeatureDataset:
    """The data set in a file of `write_features`.

    Args:
        path: of the file.
        name: of the data set.
        part: "" for all images; "held_out" for every fifth image of each class, "fit" for the
            others: what hyper-parameters are chosen with instead of test images.

    Raises:
        DataError: the file is missing, damaged or no file of features, or the part is not known.
    """
    if part not in ("", *PARTS):
        raise DataError(f"{name}: part {part!r} is not known (must be one of {', '.join(PARTS)})")
    try:
        content = read_content(path)
    except WeightsError as error:
        raise DataError(f"{name}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is no file of features (make it by tools/extract_features.py)")
    dataset = FeatureDataset(
        name,
        content["labels"],
        tuple(content["classes"]),
        images=content["features"],
        weak=content["weak"],
        source=content["made"]["source"],
        network=content["made"].get("network", ""),
        stages=content["made"].get("stages", 0),
    )
    if not part:
        return dataset
    held_out = is_for_testing(dataset.labels.numpy())
    chosen = np.flatnonzero(held_out == (part == "held_out"))
    return cast(FeatureDataset, dataset.subset(chosen))
