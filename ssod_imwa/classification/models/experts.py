"""Several classifiers that learn together, on networks of their own or with common first groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.config.options import Options, option


@dataclass(frozen=True)
class ExpertsOptions(Options):
    """How many networks, and what they share."""

    experts: int = option(1, "K networks, whose logits are averaged", low=1)
    shared_groups: int = option(
        0, "how many stages, from the first on, are one for all experts", low=0
    )


class Experts(nn.Module):
    """K classifiers of one shape; called on images, it returns the mean of their logits.

    NCL and ECL have K whole networks, RIDE and SADE common first groups. A common group is the
    same module in each expert, so that one expert alone, `experts[k]`, is a whole classifier.

    Args:
        build: makes a network; called K times, so that each begins with weights of its own.
        num_experts: K, at least 1: ECL's and NCL's heads may stand on one network alone.
        shared_groups: how many groups the experts have in common, from the first on.

    Attributes:
        experts: the K classifiers.
        num_features: d, of each expert's features.

    Raises:
        ValueError: `num_experts` or `shared_groups` is out of range.

    Example:
        >>> from ssod_imwa.classification.models.cifar_resnet import CifarResNet
        >>> model = Experts(lambda: CifarResNet(10, depth=8), 3, shared_groups=2)
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> model(images).shape, model.expert_logits(images).shape
        (torch.Size([2, 10]), torch.Size([3, 2, 10]))
    """

    def __init__(
        self, build: Callable[[], ImageClassifier], num_experts: int, *, shared_groups: int = 0
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"experts = {num_experts} is not allowed (must be at least 1)")
        first = build()
        most = len(first.groups) - 1
        if not 0 <= shared_groups <= most:
            raise ValueError(
                f"shared_groups = {shared_groups} is not allowed (must be 0..{most}: an expert "
                "needs a group of its own)"
            )
        self.shared_groups = shared_groups
        self.num_features = first.num_features
        experts = [first]
        for _ in range(num_experts - 1):
            expert = build()
            for name in first.group_names[:shared_groups]:
                expert.set_submodule(name, first.get_submodule(name))
            experts.append(expert)
        # cast: a ModuleList's type does not tell of what it is a list.
        self.experts = cast("Sequence[ImageClassifier]", nn.ModuleList(experts))

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.experts)

    def expert_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Each expert's features (B, d) of images (B, 3, H, W)."""
        for group in self.experts[0].groups[: self.shared_groups]:
            images = group(images)
        features = []
        for expert in self.experts:
            maps = images
            for group in expert.groups[self.shared_groups :]:
                maps = group(maps)
            features.append(expert.pool(maps))
        return features

    def expert_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (K, B, C)."""
        features = self.expert_features(images)
        return torch.stack(
            [expert.classifier(rows) for expert, rows in zip(self.experts, features, strict=True)]
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.expert_logits(images).mean(0)
