"""Effective collaborative learning of long-tailed experts (ECL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from ssod_imwa.classification.class_counts import checked_counts, log_prior
from ssod_imwa.classification.data.loader import ImageBatch
from ssod_imwa.classification.losses.balanced_softmax import logit_adjusted_loss
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.losses.collaborative import bkt_weights, knowledge_distillation_loss
from ssod_imwa.classification.methods.collaborative import (
    Collaborative,
    check_weights,
    train_accuracy,
)
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork, ExpertOutputs
from ssod_imwa.classification.methods.moco import ExpertContrast
from ssod_imwa.classification.models.freezing import Part

Transfer = Literal["cls_over_ref", "ref_over_cls", "none"]
DISTILLED = ("logits", "features")


class ECL(Collaborative):
    """Experts with balanced classifiers that distil one another's logits and features.

    For K experts, with z the classifiers' logits, r the reference heads', v the features, π the
    class prior and w the weights of balanced knowledge transfer::

        L = 1/K Σ_k [CE(z^k + log π, y) + CE(r^k + log π, y)]
            + α [KD(z; w) + KD(v)] + β Σ_k InfoNCE_k

    Args:
        student: the network, with reference heads.
        counts: training images of each class.
        iterations: T of a member.
        alpha: α, 0 or more; at 0 each expert learns by itself.
        beta: β, 0 or more; of no account without `contrast`.
        distil: what is distilled, of "logits" and "features".
        temperature: τ of both distillations, above 0.
        transfer: form of w, see `bkt_weights`; "none" is plain distillation, all w = 1.
        transfer_clip: largest w; None for no limit.
        compensated: distil z + log π, as NCL does, instead of z.
        contrast: MoCo beside the experts, see `Collaborative`.
        part: what is trained, see `Collaborative`.
        ema_decay: of a teacher.

    Raises:
        ValueError: an argument is out of range, or the network does not fit.

    Source: ECL, equations 5 to 9.
    """

    def __init__(
        self,
        student: CollaborativeNetwork,
        counts: Sequence[int],
        *,
        iterations: int,
        alpha: float = 0.6,
        beta: float = 1.0,
        distil: Sequence[str] = DISTILLED,
        temperature: float = 1.0,
        transfer: Transfer = "cls_over_ref",
        transfer_clip: float | None = None,
        compensated: bool = False,
        contrast: ExpertContrast | None = None,
        part: Part = "all",
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__(
            student,
            counts,
            iterations=iterations,
            contrast=contrast,
            part=part,
            ema_decay=ema_decay,
        )
        if student.references is None:
            raise ValueError("a network without reference heads is not allowed (ECL needs them)")
        check_weights(alpha=alpha, beta=beta)
        _check_distillation(distil, temperature, transfer, transfer_clip)
        device = next(student.parameters()).device
        self.alpha = alpha
        self.beta = beta
        self.distil = tuple(distil)
        self.temperature = temperature
        self.transfer = transfer
        self.transfer_clip = transfer_clip
        self.compensated = compensated
        self.log_prior = log_prior(counts).to(device)
        self._watch = _GroupMeans(counts, device) if self._weighs else None

    @property
    def _weighs(self) -> bool:
        return "logits" in self.distil and self.transfer != "none"

    def losses(self, batch: ImageBatch, t: int) -> dict[str, torch.Tensor]:
        labels = batch.labels
        outputs = self.parallel_student(batch.views[0])
        return {
            "loss_cls": self._balanced(outputs.logits, labels),
            "loss_ref": self._balanced(outputs.reference_logits, labels),
            **self._distillation(outputs, labels),
            **self._contrastive(outputs, batch, t, weight=self.beta),
            "train_accuracy": train_accuracy(outputs.logits, labels),
        }

    def _balanced(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Balanced softmax, the mean over experts and images."""
        repeated = labels.repeat(self.num_experts)
        return logit_adjusted_loss(logits.flatten(0, 1), repeated, self.log_prior)

    def _distillation(
        self, outputs: ExpertOutputs, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        records: dict[str, torch.Tensor] = {}
        if "logits" in self.distil:
            weights = None
            if self.transfer != "none":
                weights = bkt_weights(
                    outputs.logits,
                    outputs.reference_logits,
                    labels,
                    form=self.transfer,
                    clip=self.transfer_clip,
                )
                records |= self._watch(weights, labels)
            logits = widened(outputs.logits)
            records["loss_kd_logits"] = self.alpha * knowledge_distillation_loss(
                logits + self.log_prior if self.compensated else logits,
                temperature=self.temperature,
                weights=weights,
            )
        if "features" in self.distil:
            records["loss_kd_features"] = self.alpha * knowledge_distillation_loss(
                outputs.features, temperature=self.temperature
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


def _check_distillation(
    distil: Sequence[str], temperature: float, transfer: str, clip: float | None
) -> None:
    unknown = [name for name in distil if name not in DISTILLED]
    if unknown:
        raise ValueError(f"distil = {unknown[0]!r} is not allowed (must be of {DISTILLED})")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} is not allowed (must be above 0)")
    if transfer not in get_args(Transfer):
        raise ValueError(
            f"transfer = {transfer!r} is not allowed (must be one of {get_args(Transfer)})"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"transfer_clip = {clip} is not allowed (must be above 0)")
