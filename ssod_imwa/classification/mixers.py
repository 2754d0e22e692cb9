"""How a step mixes its images or features: mixup, CutMix, Remix, manifold mixup, MFW, or not.

A mixer draws the mixing of one batch. Methods use it as::

    drawn = mixer.draw(labels, images.shape)
    with drawn.at_layer():                       # features are mixed on their way through a layer
        logits = student(drawn.images(images))   # or the images themselves are
    loss = criterion(logits, drawn.targets, progress=...)

Random numbers come from torch's global generator, which the trainer seeds before every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.build import find_layer
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.config.options import Options, option

Network = ImageClassifier | Experts
INPUT = "input"  # the name of the images among the layers of a network


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


class Mixer(ABC):
    """Draws mixings of one kind.

    Args:
        counts: training images of each class.
        options: of the kind.
        network: whose layers' output may be mixed.

    Attributes:
        name: that configurations call it by.
        options_class: type of its options.
        mixes_labels: whether targets are shares of classes.
        mixes_features: whether it may mix inside the network.
        cuts_pixels: whether it takes pixels of another image, which cached features do not have.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Options]] = Options
    mixes_labels: ClassVar[bool] = True
    mixes_features: ClassVar[bool] = False
    cuts_pixels: ClassVar[bool] = False

    def __init__(self, counts: Sequence[int], options: Options, network: Network) -> None:
        self.classes = len(counts)

    @abstractmethod
    def draw(self, labels: torch.Tensor, shape: torch.Size) -> Mixing:
        """The mixing of a batch with these labels (B,) and images of this shape (B, ch, H, W)."""


class NoMixing(Mixer):
    """Leaves images, labels and the generator alone."""

    name = "none"
    mixes_labels = False

    def draw(self, labels: torch.Tensor, shape: torch.Size) -> Mixing:
        return Mixing(labels)


@dataclass(frozen=True)
class MixupOptions(Options):
    """The distribution of shares."""

    alpha: float = option(1.0, "parameter of the Beta distribution of shares", above=0)


class Mixup(Mixer):
    """Mixes images and labels by one share for all of a batch."""

    name = "mixup"
    options_class = MixupOptions

    def __init__(self, counts: Sequence[int], options: MixupOptions, network: Network) -> None:
        super().__init__(counts, options, network)
        self.alpha = options.alpha
        self.layers: tuple[nn.Module | None, ...] = (None,)

    def draw(self, labels: torch.Tensor, shape: torch.Size) -> Mixing:
        return self._draw_mixup(labels, _permutation(labels))

    def _draw_mixup(self, labels: torch.Tensor, permutation: torch.Tensor) -> Mixing:
        generator = torch.default_generator
        shares = draw_beta(self.alpha, 1, generator=generator).to(labels.device)
        layer = self.layers[int(torch.randint(len(self.layers), (), generator=generator))]
        of_labels = self._label_shares(shares, labels, permutation)
        targets = mix_labels(labels, permutation, of_labels, classes=self.classes)
        return Mixing(targets, layer, permutation, shares)

    def _label_shares(
        self, shares: torch.Tensor, labels: torch.Tensor, permutation: torch.Tensor
    ) -> torch.Tensor:
        return shares


class MixupOrCutMix(Mixup):
    """Mixup or CutMix, each as often; shares of CutMix are uniform."""

    name = "mixup_or_cutmix"
    cuts_pixels = True

    def draw(self, labels: torch.Tensor, shape: torch.Size) -> Mixing:
        permutation = _permutation(labels)
        if torch.rand((), generator=torch.default_generator) < 0.5:
            return self._draw_cutmix(labels, permutation, shape)
        return self._draw_mixup(labels, permutation)

    def _draw_cutmix(
        self, labels: torch.Tensor, permutation: torch.Tensor, shape: torch.Size
    ) -> Mixing:
        height, width = shape[-2:]
        share = float(draw_beta(1.0, 1, generator=torch.default_generator))
        box = draw_box(share, height, width, generator=torch.default_generator)
        shares = torch.tensor([box_share(box, height, width)], device=labels.device)
        targets = mix_labels(labels, permutation, shares, classes=self.classes)
        return Mixing(targets, None, permutation, shares, box)


class Remix(Mixup):
    """Mixup whose labels lean to the rarer class."""

    name = "remix"

    def __init__(self, counts: Sequence[int], options: MixupOptions, network: Network) -> None:
        super().__init__(counts, options, network)
        self._counts = torch.as_tensor(counts)

    def _label_shares(
        self, shares: torch.Tensor, labels: torch.Tensor, permutation: torch.Tensor
    ) -> torch.Tensor:
        return remix_label_shares(shares, labels, permutation, self._counts.to(labels.device))


@dataclass(frozen=True)
class ManifoldOptions(MixupOptions):
    """Where features are mixed."""

    layers: list[str] = option(
        [INPUT], 'layers whose output is mixed, such as "layer3"; "input" mixes the images'
    )


class ManifoldMixup(Mixup):
    """Mixup of the output of a layer, drawn for each batch.

    Raises:
        ValueError: no layer is named, or one that the network lacks.
    """

    name = "manifold"
    options_class = ManifoldOptions
    mixes_features = True

    def __init__(self, counts: Sequence[int], options: ManifoldOptions, network: Network) -> None:
        super().__init__(counts, options, network)
        if not options.layers:
            raise ValueError("0 layers are not allowed (must be at least 1)")
        self.layers = tuple(_layer(network, name) for name in options.layers)


@dataclass(frozen=True)
class MFWOptions(ManifoldOptions):
    """Where features are weakened, and how much."""

    beta: float = option(2.0, "MFW's beta: 2 for long tails, 0.01 for steps", above=0)
    deviation: Literal["geometric", "arithmetic"] = option(
        "geometric", "which deviation of the class counts beta multiplies"
    )


class MFW(Mixer):
    """Major feature weakening: the output of one layer by shares of each image's own, no labels.

    Raises:
        ValueError: not exactly one layer is named, or one that the network lacks.
    """

    name = "mfw"
    options_class = MFWOptions
    mixes_labels = False
    mixes_features = True

    def __init__(self, counts: Sequence[int], options: MFWOptions, network: Network) -> None:
        super().__init__(counts, options, network)
        if len(options.layers) != 1:
            raise ValueError(f"{len(options.layers)} layers are not allowed (must be 1)")
        self.alpha = options.alpha
        self.layer = _layer(network, options.layers[0])
        self._strengths = mfw_strengths(counts, beta=options.beta, deviation=options.deviation)

    def draw(self, labels: torch.Tensor, shape: torch.Size) -> Mixing:
        permutation = _permutation(labels)
        draws = draw_beta(self.alpha, len(labels), generator=torch.default_generator)
        shares = self._strengths.to(labels.device)[labels] * draws.to(labels.device)
        return Mixing(labels, self.layer, permutation, shares)


MIXERS: dict[str, type[Mixer]] = {
    mixer.name: mixer for mixer in (NoMixing, Mixup, MixupOrCutMix, Remix, ManifoldMixup, MFW)
}


@dataclass(frozen=True)
class MixerChoice(Options):
    """CLS.MIX: what is mixed; its other keys are the mixer's."""

    kind: str = option("none", "what is mixed, and how", choices=tuple(MIXERS))


def _permutation(labels: torch.Tensor) -> torch.Tensor:
    return torch.randperm(len(labels), generator=torch.default_generator).to(labels.device)


def _layer(network: Network, name: str) -> nn.Module | None:
    """The layer of a name, None for the images."""
    return None if name == INPUT else find_layer(network, name)
