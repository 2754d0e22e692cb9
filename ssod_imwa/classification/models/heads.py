"""What stands on the features of an encoder besides a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ssod_imwa.classification.checks import check_choice
from ssod_imwa.config.options import Options, option

HeadKind = Literal["bcl", "paco", "gpaco", "moco"]


def projection_head(kind: HeadKind, d: int, hidden: int, out: int) -> nn.Sequential:
    """Layers from features (B, d) to projections (B, out), which the method normalizes.

    Args:
        kind: whose head. "bcl" and "paco": linear, batch norm, ReLU, linear. "moco" (NCL, ECL):
            linear, ReLU, linear. "gpaco": linear, ReLU, linear, ReLU, linear.
        d: width of the features. BCL's second head has the same, as it projects the classifier's
            weights.
        hidden: width between the linear layers: d in large networks, 512 in BCL on CIFAR.
        out: BCL 1024 (128 on CIFAR), PaCo and GPaCo 128 (32), NCL 1024 (64).

    Raises:
        ValueError: the kind is not known.

    Example:
        >>> [type(layer).__name__ for layer in projection_head("bcl", 64, 512, 128)]
        ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    check_choice("head", kind, get_args(HeadKind))
    layers: list[nn.Module] = [nn.Linear(d, hidden)]
    if kind in ("bcl", "paco"):
        layers.append(nn.BatchNorm1d(hidden))
    layers.append(nn.ReLU())
    if kind == "gpaco":
        layers += [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out))


@dataclass(frozen=True)
class ScaleOptions(Options):
    """A classifier with scales."""

    learnable_scale: bool = option(
        False, "multiply each class's logit by a factor that is learned (MiSLAS; LWS)"
    )


class ScaledClassifier(nn.Module):
    """A classifier whose logits, bias included, are multiplied by a learned scale of each class.

    MiSLAS trains it in its second stage, beside the classifier; learnable weight scaling (LWS)
    trains nothing but the scales.

    Args:
        classifier: features (B, d) -> logits (B, C), with weights (C, d).

    Example:
        >>> classifier = ScaledClassifier(nn.Linear(64, 10))
        >>> classifier.scale.shape, classifier(torch.zeros(2, 64)).shape
        (torch.Size([10]), torch.Size([2, 10]))
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        weight = classifier.get_parameter("weight")
        self.classifier = classifier
        self.scale = nn.Parameter(weight.new_ones(len(weight)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scales to 1 and leave the classifier as it is."""
        self.scale.fill_(1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * self.classifier(features)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """A new linear classifier with the same logits.

        Raises:
            ValueError: the classifier is not linear.
        """
        source = self.classifier
        if not isinstance(source, nn.Linear):
            raise ValueError(f"a scaled {type(source).__name__} is no linear classifier")
        has_bias = source.bias is not None
        # skip_init: the weights are copied, so the global generator is left alone.
        linear = nn.utils.skip_init(
            nn.Linear,
            source.in_features,
            source.out_features,
            bias=has_bias,
            device=source.weight.device,
            dtype=source.weight.dtype,
        )
        linear.weight.copy_(self.scale[:, None] * source.weight)
        if has_bias:
            linear.bias.copy_(self.scale * source.bias)
        return linear
