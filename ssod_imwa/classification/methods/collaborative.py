"""What methods of experts that learn together (ECL, NCL) have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ssod_imwa.classification.methods.base import ClassificationMethod, Training
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork, ExpertOutputs
from ssod_imwa.classification.methods.moco import ExpertContrast
from ssod_imwa.classification.models.freezing import set_train_mode
from ssod_imwa.data.batches import Batch


class Collaborative(ClassificationMethod):
    """A method of experts, with or without a contrastive loss of each.

    Args:
        student: the network.
        counts: training images of each class.
        training: see `ClassificationMethod`.
        contrast: MoCo beside the experts; None for no contrastive loss, when the network must be
            without query heads.

    Raises:
        ValueError: a number is out of range, counts are not one a class, or network and `contrast`
            do not belong together.
    """

    reads: Mapping[str, tuple[str, ...]] = {"labeled": ("image", "key")}
    student: CollaborativeNetwork

    def __init__(
        self,
        student: CollaborativeNetwork,
        counts: Sequence[int],
        *,
        training: Training,
        contrast: ExpertContrast | None = None,
    ) -> None:
        super().__init__(student, training)
        classes = len(student.deployed.experts[0].classifier.get_parameter("weight"))
        if len(counts) != classes:
            raise ValueError(
                f"{len(counts)} counts are not allowed (must be one for each of the network's "
                f"{classes} classes)"
            )
        if (student.projections is None) != (contrast is None):
            raise ValueError(
                "query heads and `contrast` belong together; give both or neither (a head without "
                "a loss would get no gradient)"
            )
        self.contrast = contrast
        if contrast is None:
            self.reads = {"labeled": ("image",)}
        self.num_experts = student.deployed.num_experts

    def set_train_mode(self) -> None:
        super().set_train_mode()
        if self.contrast is not None:
            self.contrast.key.train()
            set_train_mode(self.contrast.key.deployed, self.part)

    def models(self) -> dict[str, nn.Module]:
        models = super().models()
        return models if self.contrast is None else {**models, "momentum": self.contrast.key}

    def after_step(self, t: int) -> None:
        super().after_step(t)
        if self.contrast is not None:
            self.contrast.after_step(t)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.contrast is None else {"contrast": self.contrast.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.contrast is not None:
            self.contrast.load_state_dict(state["contrast"])

    def _contrastive(
        self, outputs: ExpertOutputs, batch: Batch, t: int, *, weight: float
    ) -> dict[str, torch.Tensor]:
        """The weighted contrastive loss, summed over experts; nothing without `contrast`."""
        if self.contrast is None:
            return {}
        assert outputs.queries is not None  # the constructor has seen query heads
        # A weight of 0 keeps its loss in the graph: every parameter gets a gradient on every rank.
        loss = self.contrast.loss(
            outputs.queries, batch["labeled"].views["key"], t, self.ranks.batch
        )
        return {"loss_contrastive": weight * loss}
