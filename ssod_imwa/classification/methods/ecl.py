"""Effective collaborative learning of long-tailed experts (ECL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ssod_imwa.classification.class_counts import checked_counts, log_prior
from ssod_imwa.classification.losses.balanced_softmax import logit_adjusted_loss
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.losses.collaborative import bkt_weights, knowledge_distillation_loss
from ssod_imwa.classification.methods.base import Training, train_accuracy
from ssod_imwa.classification.methods.collaborative import Collaborative
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork, ExpertOutputs
from ssod_imwa.classification.methods.moco import ExpertContrast
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch


@dataclass(frozen=True)
class ECLOptions(Options):
    """Distillation and contrast; the defaults are the paper's."""

    alpha: float = option(
        0.6, "weight of distillation; at 0 each expert learns by itself", low=0, per_member=True
    )
    beta: float = option(
        1.0, "weight of the contrastive losses; 0 trains without MoCo and its second view", low=0
    )
    distil: list[Literal["logits", "features"]] = option(
        ["logits", "features"], "what is distilled"
    )
    temperature: float = option(1.0, "temperature of both distillations", above=0, per_member=True)
    transfer: Literal["cls_over_ref", "ref_over_cls", "none"] = option(
        "cls_over_ref", 'weight of a sample in the distillation of logits; "none" is 1'
    )
    transfer_clip: float = option(0.0, "its largest value; 0 for no limit", low=0)
    compensated: bool = option(False, "distil logits with the log prior added, as NCL does")


class ECL(Collaborative):
    """Experts with balanced classifiers that distil one another's logits and features.

    For K experts, with z the classifiers' logits, r the reference heads', v the features, π the
    class prior and w the weights of balanced knowledge transfer::

        L = 1/K Σ_k [CE(z^k + log π, y) + CE(r^k + log π, y)]
            + α [KD(z; w) + KD(v)] + β Σ_k InfoNCE_k

    Args:
        student: the network, with reference heads.
        counts: training images of each class.
        options: α, β (of no account without `contrast`), what is distilled and how; `transfer` is
            the form of w, see `bkt_weights`, "none" plain distillation with all w = 1.
        training: see `ClassificationMethod`.
        contrast: MoCo beside the experts, see `Collaborative`.

    Raises:
        ValueError: the network does not fit.

    Source: ECL, equations 5 to 9.
    """

    def __init__(
        self,
        student: CollaborativeNetwork,
        counts: Sequence[int],
        options: ECLOptions,
        *,
        training: Training,
        contrast: ExpertContrast | None = None,
    ) -> None:
        super().__init__(student, counts, training=training, contrast=contrast)
        if student.references is None:
            raise ValueError("a network without reference heads is not allowed (ECL needs them)")
        device = next(student.parameters()).device
        self.options = options
        self.log_prior = log_prior(counts).to(device)
        self._watch = _GroupMeans(counts, device) if self._weighs else None

    @property
    def _weighs(self) -> bool:
        return "logits" in self.options.distil and self.options.transfer != "none"

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        labels = batch["labeled"].targets
        outputs = self.parallel_student(batch["labeled"].views["image"])
        return {
            "loss_cls": self._balanced(outputs.logits, labels),
            "loss_ref": self._balanced(outputs.reference_logits, labels),
            **self._distillation(outputs, labels),
            **self._contrastive(outputs, batch, t, weight=self.options.beta),
            "train_accuracy": train_accuracy(outputs.logits.mean(0), labels),
        }

    def _balanced(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Balanced softmax, the mean over experts and images."""
        repeated = labels.repeat(self.num_experts)
        return logit_adjusted_loss(logits.flatten(0, 1), repeated, self.log_prior)

    def _distillation(
        self, outputs: ExpertOutputs, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        records: dict[str, torch.Tensor] = {}
        options = self.options
        if "logits" in options.distil:
            weights = None
            if options.transfer != "none":
                assert self._watch is not None
                assert outputs.reference_logits is not None  # the constructor has seen the heads
                weights = bkt_weights(
                    outputs.logits,
                    outputs.reference_logits,
                    labels,
                    form=options.transfer,
                    clip=options.transfer_clip or None,
                )
                records |= self._watch(weights, labels)
            logits = widened(outputs.logits)
            records["loss_kd_logits"] = options.alpha * knowledge_distillation_loss(
                logits + self.log_prior if options.compensated else logits,
                temperature=options.temperature,
                weights=weights,
            )
        if "features" in options.distil:
            records["loss_kd_features"] = options.alpha * knowledge_distillation_loss(
                outputs.features, temperature=options.temperature
            )
        return records

    def state_dict(self) -> dict[str, Any]:
        watched = {} if self._watch is None else {"transfer": self._watch.means}
        return {**super().state_dict(), **watched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self._watch is not None:
            self._watch.means = state["transfer"].to(self._watch.means.device, copy=True)


class _GroupMeans:
    """Mean and largest weight of a batch, and its means in classes of many, medium and few images.

    A group that a batch lacks keeps its last mean; which ones it lacks is known to the device only.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        images = checked_counts(counts)
        groups = {
            "many": images > 100,
            "medium": (images >= 20) & (images <= 100),
            "few": images < 20,
        }
        present = {name: members for name, members in groups.items() if members.any()}
        self.names = tuple(present)
        self._members = torch.stack(list(present.values())).to(device)
        self.means = torch.ones(len(present), device=device)

    @torch.no_grad()
    def __call__(self, weights: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The records of weights (K, B)."""
        members = self._members[:, labels]
        images = members.sum(1)
        means = (members * weights.mean(0)).sum(1) / images.clamp(min=1)
        self.means = torch.where(images > 0, means, self.means)
        by_group = {f"transfer_{n}": mean for n, mean in zip(self.names, self.means, strict=True)}
        return {"transfer_mean": weights.mean(), "transfer_max": weights.max(), **by_group}
