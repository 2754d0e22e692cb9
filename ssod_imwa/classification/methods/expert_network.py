"""The networks of experts that learn together: with more heads, and as a momentum encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.methods.base import TrainingNetwork
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.heads import projection_head


class ExpertOutputs(NamedTuple):
    """What the losses need of K experts and B images.

    Attributes:
        logits: (K, B, C) of the classifiers.
        features: (K, B, d) that the classifiers see.
        reference_logits: (K, B, C) of the reference heads, None without them.
        queries: (K, B, width), rows of length 1, of the query heads, None without them.
    """

    logits: torch.Tensor
    features: torch.Tensor
    reference_logits: torch.Tensor | None
    queries: torch.Tensor | None


class CollaborativeNetwork(TrainingNetwork):
    """Experts, each with a second classifier (ECL's reference head) and MoCo's query head, or not.

    Args:
        deployed: the experts; in eval mode the network returns the mean of their logits.
        reference: give each expert a reference head, a classifier of the same kind with weights of
            its own.
        width: of the query heads' rows: 64 on CIFAR, 1024 on large sets; 0 for no query heads.
        hidden: width inside the query heads; None takes d, as NCL does.

    Raises:
        ValueError: `deployed` is no `Experts`, or a width is out of range.

    Example:
        >>> from ssod_imwa.classification.models import CifarResNet
        >>> experts = Experts(lambda: CifarResNet(10, depth=8), 3)
        >>> network = CollaborativeNetwork(experts, reference=True, width=64)
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> [tuple(output.shape) for output in network(images)]
        [(3, 2, 10), (3, 2, 64), (3, 2, 10), (3, 2, 64)]
        >>> network.eval()(images).shape
        torch.Size([2, 10])
    """

    deployed: Experts

    def __init__(
        self,
        deployed: Experts,
        *,
        reference: bool = False,
        width: int = 0,
        hidden: int | None = None,
    ) -> None:
        if not isinstance(deployed, Experts):
            raise ValueError(f"a {type(deployed).__name__} is not allowed (must be Experts)")
        if width < 0:
            raise ValueError(f"width = {width} is not allowed (must be 0 or more)")
        super().__init__(deployed)
        self.width = width
        self.hidden = deployed.num_features if hidden is None else hidden
        self.references = (
            nn.ModuleList(expert.new_classifier() for expert in deployed.experts)
            if reference
            else None
        )
        self.projections = self.new_projections() if width else None

    def new_projections(self) -> nn.ModuleList:
        """Query heads with new weights, one for each expert, on the CPU."""
        d = self.deployed.num_features
        return nn.ModuleList(
            projection_head("moco", d, self.hidden, self.width) for _ in self.deployed.experts
        )

    def outputs(self, *inputs: torch.Tensor) -> ExpertOutputs:
        (images,) = inputs
        features = self.deployed.expert_features(images)
        classifiers = [expert.classifier for expert in self.deployed.experts]
        references, projections = self.references, self.projections
        return ExpertOutputs(
            logits=_through(classifiers, features),
            features=torch.stack(features),
            reference_logits=None if references is None else _through(references, features),
            queries=None if projections is None else _rows(projections, features),
        )

    def branch(self, projections: nn.ModuleList) -> ContrastiveBranch:
        """The network's own parameters, in modules without the classifiers.

        Args:
            projections: the query heads, or others.
        """
        # What the memo holds is not copied, so this copies the modules around the tensors alone.
        tensors = chain(self.parameters(), self.buffers())
        deployed = copy.deepcopy(self.deployed, {id(tensor): tensor for tensor in tensors})
        for expert in deployed.experts:
            expert.classifier = nn.Identity()
        return ContrastiveBranch(deployed, projections)


class ContrastiveBranch(nn.Module):
    """Encoders and heads of K experts: images (B, 3, H, W) to rows (K, B, width) of length 1.

    Parameters have the names that they have in `CollaborativeNetwork`, because IMWA takes those
    whose name trains nowhere for frozen.

    Args:
        deployed: the experts; their classifiers are not called.
        projections: one head for each.
    """

    def __init__(self, deployed: Experts, projections: nn.ModuleList) -> None:
        super().__init__()
        self.deployed = deployed
        self.projections = projections

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return _rows(self.projections, self.deployed.expert_features(images))


def _through(heads: Iterable[nn.Module], features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each expert's features through its own head, stacked."""
    return torch.stack([head(rows) for head, rows in zip(heads, features, strict=True)])


def _rows(heads: Iterable[nn.Module], features: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `_through`, with rows of length 1."""
    return F.normalize(widened(_through(heads, features)), dim=2)
