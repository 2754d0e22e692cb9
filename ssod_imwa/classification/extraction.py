"""Features of a data set by a frozen network, in the views that what follows is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ssod_imwa.classification.data.augmentation import Statistics
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.small_views import BatchView, small_view
from ssod_imwa.classification.models.feature_tail import check_stages, first_stages
from ssod_imwa.classification.models.library_models import TIMM, LibraryClassifier
from ssod_imwa.config.options import Options, option
from ssod_imwa.engine.checkpoint.packages import (
    PIXEL_MEAN,
    PIXEL_STD,
    package_of,
    read_package,
)
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError

PADDING = 4  # of strong views, as FixMatch has it for 32 pixels
CUTOUT = 16


@dataclass(frozen=True)
class FeatureOptions(Options):
    """Which features of an image are kept."""

    stages: int = option(
        0,
        "stages of the network whose maps are kept, for feature_tail; 0 keeps pooled features",
        low=0,
    )
    size: int = option(128, "edge of the images that the network sees, in pixels", low=1)
    mirror: bool = option(True, "whether the mirror image is a weak view beside the plain one")
    strong: int = option(4, "strong views of each image (RandAugment, Cutout)", low=0)
    seed: int = option(0, "of the strong views", low=0)
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "of the network; bfloat16 is twice as fast where processors have it"
    )

    @property
    def weak(self) -> int:
        """Weak views, the plain one among them."""
        return 1 + self.mirror

    @property
    def views(self) -> int:
        """All views."""
        return self.weak + self.strong


def package_network(weights: str, options: FeatureOptions) -> nn.Module:
    """A network with the weights of a package, in eval mode, its batch norms folded.

    Args:
        weights: "package:NAME".
        options: size of images, precision, and how many of its stages.

    Returns:
        Images (B, 3, H, W) to features (B, d), or maps (B, c, h, w).

    Raises:
        WeightsError: the package is not known or not installed.
        ValueError: the network has fewer stages.
    """
    name = f"{TIMM}{package_of(weights).network}"
    model = LibraryClassifier(name, 1, image_size=options.size)
    model.load_library_weights(read_package(weights), weights)
    fold_norms(model.eval())
    network = model.body
    if options.stages:
        check_stages(network, options.stages, name)
        network = first_stages(network, options.stages)
    return network.to(getattr(torch, options.precision)).to(memory_format=torch.channels_last)


def fold_norms(module: nn.Module) -> None:
    """Multiply each batch norm of timm into the convolution before it, in place.

    With channels last that halves the time of a frozen network (docs/backbones.md).

    Args:
        module: in eval mode; a norm follows its convolution among its children.
    """
    before: tuple[str, nn.Conv2d] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            before = (name, child)
        elif isinstance(child, BatchNormAct2d) and before is not None:
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, child.act)
            before = None
        else:
            fold_norms(child)


def made_by(
    weights: str, dataset: ClassificationDataset, options: FeatureOptions
) -> dict[str, Any]:
    """How features are made, as plain values; "source" is what sets trained together share."""
    digest = package_of(weights).digest
    fields = [field.name for field in dataclasses.fields(options)]
    cut = f"{options.stages} stages of " if options.stages else ""
    return {
        "source": f"{cut}{weights} ({digest[:8]}) at {options.size} px in {options.precision}",
        "network": package_of(weights).network,
        "sha256": digest,
        "pixel_mean": list(PIXEL_MEAN),
        "pixel_std": list(PIXEL_STD),
        "stored": dataset.size,
        "padding": PADDING,
        "cutout": CUTOUT,
        **{name: getattr(options, name) for name in fields},
    }


@torch.no_grad()
def view_features(
    network: nn.Module,
    dataset: ClassificationDataset,
    options: FeatureOptions,
    *,
    batch_size: int = 16,
) -> Iterator[torch.Tensor]:
    """Features of every image, one view after the other.

    The plain view comes first, then the mirror image, then strong views: RandAugment and Cutout of
    the image as it is stored, cropped from a border of 4 pixels, each with numbers of its own.
    Whatever the size of batches, an image's strong views are functions of (seed, its place).

    Args:
        network: images to features or maps, in eval mode.
        dataset: of square images in memory.
        options: which views.
        batch_size: images at a time.

    Yields:
        float16 (N, d), or maps (N, c, h, w).

    Raises:
        DataError: the images are in files, or not square.
    """
    images = dataset.images
    if images is None or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise DataError(
            f"{dataset.name}: images must be in memory and square to have their features cached"
        )
    plain = _view("none", images, options)
    yield _features(network, images, plain, batch_size=batch_size)
    if options.mirror:
        yield _features(network, images.flip(3), plain, batch_size=batch_size)
    strong = _view("randaugment", images, options)
    for number in range(options.strong):
        generator = counted_generator(options.seed, "cached view", number)
        numbers = torch.from_numpy(generator.random((len(images), strong.numbers)))
        yield _features(network, images, strong, numbers, batch_size=batch_size)


def _view(name: str, images: torch.Tensor, options: FeatureOptions) -> BatchView:
    mean, std = ((x / 255, y / 255, z / 255) for x, y, z in (PIXEL_MEAN, PIXEL_STD))
    return small_view(
        name,
        Statistics(mean, std),
        size=options.size,
        padding=PADDING,
        flip=options.mirror,
        cutout=CUTOUT,
        stored=images.shape[3],
    )


def _features(
    network: nn.Module,
    images: torch.Tensor,
    view: BatchView,
    numbers: torch.Tensor | None = None,
    *,
    batch_size: int,
) -> torch.Tensor:
    numbers = torch.empty(len(images), 0) if numbers is None else numbers
    dtype = next(network.parameters()).dtype
    parts = []
    for batch, rows in zip(images.split(batch_size), numbers.split(batch_size), strict=True):
        inputs = view(batch, rows).to(dtype, memory_format=torch.channels_last)
        parts.append(network(inputs).half())
    return torch.cat(parts)
