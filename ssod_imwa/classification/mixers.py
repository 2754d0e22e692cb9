"""How a step mixes its images or features: mixup, CutMix, Remix, manifold mixup, MFW, or not.

A mixer draws the mixing of one batch. Methods use it as::

    drawn = mixer.draw(labels, images.shape)
    with drawn.at_layer():                       # features are mixed on their way through a layer
        logits = student(drawn.images(images))   # or the images themselves are
    loss = criterion(logits, drawn.targets, progress=...)

Random numbers come from torch's global generator, which the trainer seeds before every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ssod_imwa.classification.mixing import (
    Box,
    box_share,
    cut_mix,
    draw_beta,
    draw_box,
    mfw_strengths,
    mix,
    mix_labels,
    remix_label_shares,
)

Kind = Literal["none", "mixup", "mixup_or_cutmix", "remix", "manifold", "mfw"]
OF_IMAGES = ("mixup", "mixup_or_cutmix", "remix")
OF_LAYERS = ("manifold", "mfw")


@dataclass(frozen=True)
class Mixing:
    """The mixing of one batch.

    Attributes:
        targets: labels (B,) or shares (B, C).
        layer: whose output is mixed; None mixes the images.
        permutation: (B,) partner of each sample; None mixes nothing.
        shares: (B,) or (1,) of the partner.
        box: of CutMix, which takes the partner's pixels instead of a share of them all.
    """

    targets: torch.Tensor
    layer: nn.Module | None = None
    permutation: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    box: Box | None = None

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """The images, mixed if they are what is mixed."""
        return images if self.layer is not None else self._mixed(images)

    @contextmanager
    def at_layer(self) -> Iterator[None]:
        """Inside, the output of the layer is mixed."""
        if self.layer is None:
            yield
            return
        handle = self.layer.register_forward_hook(lambda module, inputs, out: self._mixed(out))
        try:
            yield
        finally:
            handle.remove()

    def _mixed(self, values: torch.Tensor) -> torch.Tensor:
        if self.permutation is None or self.shares is None:
            return values
        if self.box is not None:
            return cut_mix(values, self.permutation, self.box)
        return mix(values, self.permutation, self.shares)


class Mixer:
    """Draws mixings of one kind.

    Args:
        kind: "mixup" and "remix" mix images and labels, "manifold" the output of one of `layers`,
            drawn for each batch, and labels, "mfw" the output of the one layer and no labels.
            "mixup_or_cutmix" is one or the other, each as often.
        counts: training images of each class.
        layers: modules; None among them is the images.
        alpha: of Beta(alpha, alpha), above 0; CutMix has 1.
        beta: of MFW's strengths.
        deviation: of MFW's strengths.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        kind: Kind = "none",
        *,
        counts: Sequence[int],
        layers: Sequence[nn.Module | None] = (None,),
        alpha: float = 1.0,
        beta: float = 2.0,
        deviation: str = "geometric",
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(
                f"kind = {kind!r} is not allowed (must be one of {list(get_args(Kind))})"
            )
        if not alpha > 0:
            raise ValueError(f"alpha = {alpha} is not allowed (must be above 0)")
        if len(layers) == 0 or (kind != "manifold" and len(layers) != 1):
            must = "at least 1" if kind == "manifold" else "1"
            raise ValueError(
                f"{len(layers)} layers with kind = {kind!r} are not allowed (must be {must})"
            )
        if kind in OF_IMAGES and layers[0] is not None:
            raise ValueError(
                f"a layer with kind = {kind!r} is not allowed (it mixes images; manifold and mfw "
                "mix the output of layers)"
            )
        self.kind = kind
        self.layers = tuple(layers)
        self.alpha = alpha
        self.classes = len(counts)
        self._counts = torch.as_tensor(counts)
        self._strengths = mfw_strengths(counts, beta=beta, deviation=deviation)

    @property
    def mixes_labels(self) -> bool:
        """Whether targets are shares of classes."""
        return self.kind not in ("none", "mfw")

    def draw(self, labels: torch.Tensor, shape: torch.Size) -> Mixing:
        """The mixing of a batch with these labels (B,) and images of this shape (B, ch, H, W)."""
        if self.kind == "none":
            return Mixing(labels)
        generator = torch.default_generator
        permutation = torch.randperm(len(labels), generator=generator).to(labels.device)
        if self.kind == "mfw":
            draws = draw_beta(self.alpha, len(labels), generator=generator).to(labels.device)
            shares = self._strengths.to(labels.device)[labels] * draws
            return Mixing(labels, self.layers[0], permutation, shares)
        if self.kind == "mixup_or_cutmix" and torch.rand((), generator=generator) < 0.5:
            return self._draw_cutmix(labels, permutation, shape)
        shares = draw_beta(self.alpha, 1, generator=generator).to(labels.device)
        layer = self.layers[int(torch.randint(len(self.layers), (), generator=generator))]
        of_labels = shares
        if self.kind == "remix":
            counts = self._counts.to(labels.device)
            of_labels = remix_label_shares(shares, labels, permutation, counts)
        targets = mix_labels(labels, permutation, of_labels, classes=self.classes)
        return Mixing(targets, layer, permutation, shares)

    def _draw_cutmix(
        self, labels: torch.Tensor, permutation: torch.Tensor, shape: torch.Size
    ) -> Mixing:
        height, width = shape[-2:]
        share = float(draw_beta(1.0, 1, generator=torch.default_generator))
        box = draw_box(share, height, width, generator=torch.default_generator)
        shares = torch.tensor([box_share(box, height, width)], device=labels.device)
        targets = mix_labels(labels, permutation, shares, classes=self.classes)
        return Mixing(targets, None, permutation, shares, box)
