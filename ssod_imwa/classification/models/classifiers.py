"""What turns features (B, d) into logits (B, C)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.checks import check_above_0, check_choice
from ssod_imwa.config.options import Options, option

ClassifierKind = Literal["linear", "cosine", "biased_cosine"]
COSINES: tuple[ClassifierKind, ...] = ("cosine", "biased_cosine")


@dataclass(frozen=True)
class ClassifierOptions(Options):
    """The kind of classifier."""

    classifier: ClassifierKind = option(
        "linear", "what turns features into logits; the cosines of NCL have a bias"
    )


@dataclass(frozen=True)
class CosineOptions(Options):
    """Of a cosine classifier."""

    scale: float = option(
        30.0, "factor of the cosines; LDAM's loss has its own, so 1 with it", above=0
    )


@dataclass(frozen=True)
class TauNormOptions(Options):
    """Of a classifier that was trained."""

    tau_norm: float = option(
        0.0,
        "divide each class's weights in MODEL.WEIGHTS by their norm to this power, and drop its "
        "bias (tau-norm); 0 leaves them as they are",
        low=0,
    )


class CosineClassifier(nn.Module):
    """scale * cosine of the angle between the features and each class's weights; no bias.

    The logits do not depend on the norms of the weights, which long-tailed training makes larger
    for frequent classes (Kang et al., arXiv 1910.09217, section 4).

    Args:
        in_features: d.
        classes: C.
        scale: s, above 0: the largest logit. 30 in LDAM and BCL, 16 in NCL (32 on iNaturalist);
            1 if the loss scales.

    Raises:
        ValueError: `scale` is not above 0.

    Example:
        >>> classifier = CosineClassifier(2, 3, scale=16.0)
        >>> features = torch.tensor([[3.0, 4.0]])
        >>> torch.equal(classifier(features), classifier(2 * features))
        True
    """

    def __init__(self, in_features: int, classes: int, *, scale: float = 30.0) -> None:
        super().__init__()
        check_above_0(scale=scale)
        self.in_features = in_features
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, in_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in the cube, then each class's weights to norm 1, as in LDAM."""
        self.weight.uniform_(-1, 1)
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C), -scale..scale, of features (B, d)."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


def make_classifier(
    kind: ClassifierKind, in_features: int, classes: int, *, scale: float = 30.0
) -> nn.Linear | CosineClassifier:
    """A classifier for features of width d.

    Args:
        kind: "linear" (with bias), "cosine" or "biased_cosine".
        in_features: d.
        classes: C.
        scale: of the cosine classifiers.

    Raises:
        ValueError: the kind is not known or `scale` is out of range.

    Example:
        >>> make_classifier("linear", 64, 10)
        Linear(in_features=64, out_features=10, bias=True)
    """
    check_choice("classifier", kind, get_args(ClassifierKind))
    if kind == "cosine":
        return CosineClassifier(in_features, classes, scale=scale)
    if kind == "biased_cosine":
        return BiasedCosineClassifier(in_features, classes, scale=scale)
    return nn.Linear(in_features, classes)


class BiasedCosineClassifier(CosineClassifier):
    """scale * cosine + b_c, as NCL has it.

    Its weights begin at norms near 0.58, in place of 1. A step turns them by an angle in proportion
    to 1 / norm², so it learns at about three times the rate of `CosineClassifier`.

    The bias is called `offset`, so that no linear classifier takes this one's weights for its own.

    Args:
        in_features: d.
        classes: C.
        scale: s, above 0: 16 in NCL (32 on iNaturalist).

    Example:
        >>> [name for name, _ in BiasedCosineClassifier(2, 3).named_parameters()]
        ['weight', 'offset']
    """

    def __init__(self, in_features: int, classes: int, *, scale: float = 16.0) -> None:
        super().__init__(in_features, classes, scale=scale)
        self.offset = nn.Parameter(torch.zeros(classes))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights uniform within ±1/sqrt(d), no bias."""
        bound = self.in_features**-0.5
        self.weight.uniform_(-bound, bound)
        if "offset" in self._parameters:  # the first call comes before there is one
            self.offset.zero_()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of features (B, d)."""
        return super().forward(features) + self.offset


@torch.no_grad()
def tau_normalized(classifier: nn.Linear, tau: float) -> nn.Linear:
    """A new classifier with weights w_c / |w_c|^tau and no bias (arXiv 1910.09217, section 4).

    Nothing is trained: tau is chosen afterwards on validation images, from 0..2 in steps of 0.1
    in the paper. 0 keeps the weights, 1 makes all norms 1.

    Args:
        classifier: trained; not changed. Its bias is dropped, as in the authors' code.
        tau: at least 0.

    Raises:
        ValueError: `tau` is below 0, or a class's weights are all 0.

    Example:
        >>> trained = nn.Linear(2, 1)
        >>> _ = trained.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> tau_normalized(trained, 1.0).weight.tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    if not tau >= 0:
        raise ValueError(f"tau = {tau} is not allowed (must be at least 0)")
    weight = classifier.weight
    norms = weight.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        c = int(norms.flatten().argmin())
        raise ValueError(f"the weights of class {c} are all 0 (they have no norm to divide by)")
    # skip_init: the weights are copied, so the global generator is left alone.
    normalized = nn.utils.skip_init(
        nn.Linear,
        classifier.in_features,
        classifier.out_features,
        bias=False,
        device=weight.device,
        dtype=weight.dtype,
    )
    normalized.weight.copy_(weight / norms**tau)
    return normalized
