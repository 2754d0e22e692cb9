"""FixMatch (Sohn et al., arXiv 2001.07685), and all that is composed on it.

docs/fixmatch.md lists the equations of every composition and where this
implementation differs from the public ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ssod_imwa.classification.extras.base import Extra, Step, masked_cross_entropy
from ssod_imwa.classification.labelers.base import Labeler, PseudoLabels, WeakOutputs
from ssod_imwa.classification.labelers.records import count_labels, label_records
from ssod_imwa.classification.losses.base import Criterion, widened
from ssod_imwa.classification.methods.base import ClassificationMethod, Training, train_accuracy
from ssod_imwa.classification.methods.fixmatch_network import FixMatchNetwork, HeadOutputs
from ssod_imwa.classification.models.freezing import set_train_mode
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.teacher import Teacher

LABELER = "labeler"


@dataclass(frozen=True)
class FixMatchOptions(Options):
    """The loss of unlabeled images, and what is composed with it."""

    unsup_loss_weight: float = option(
        1.0, "λ_u, weight of the loss on pseudo-labels", low=0, per_member=True
    )
    strong_views: int = option(
        1, "strong views of an unlabeled image: 1 (FixMatch, DASO), 2 (ACR, DARP, ABC, CoSSL)",
        low=1, high=2,
    )  # fmt: skip
    second_head: Literal["none", "abc", "balanced"] = option(
        "none",
        "head beside FixMatch's, which is then tested: ABC's, or ACR's balanced one",
    )


class FixMatch(ClassificationMethod):
    """Confident pseudo-labels of weak views are learned on strong views.

    All images pass through the network in one batch, in training mode, labeled ones first, so that
    batch norms see the mixture and pseudo-labels come from the student::

        L = L_s(z(x), y) + λ_u mean [mask] CE(z(strong), ŷ) + extras

    With IMWA.CROSS_TEACH the labeler is given the logits of another member's average in eval mode
    ("other"), or that average has to predict ŷ, too, for the mask to be 1 ("agree").

    Args:
        student: the network.
        criterion: L_s; balanced softmax is "+ LA".
        options: see there.
        training: see `ClassificationMethod`.
        labeler: what gives ŷ and the mask.
        averages_statistics: whether the labeler's estimates are averaged as weights are; else each
            member keeps its own.
        extras: further losses.
        knows_truth: whether targets of unlabeled images are their hidden classes, which are
            recorded beside the pseudo-labels.

    Raises:
        ValueError: the network has one head and two are needed or the other way round, or the
            labeler reads features of a teacher that there is not.
    """

    reads: Mapping[str, tuple[str, ...]] = {
        "labeled": ("weak",),
        "unlabeled": ("weak", "strong", "strong_1", "strong_2"),
    }
    student: FixMatchNetwork
    teacher: Teacher[FixMatchNetwork] | None

    def __init__(
        self,
        student: FixMatchNetwork,
        criterion: Criterion,
        options: FixMatchOptions,
        *,
        training: Training,
        labeler: Labeler,
        averages_statistics: bool = False,
        extras: Sequence[Extra] = (),
        knows_truth: bool = False,
    ) -> None:
        super().__init__(student, training)
        _check_composition(student, labeler, extras, has_teacher=self.teacher is not None)
        self.knows_truth = knows_truth
        self.options = options
        self.criterion = criterion.to(next(student.parameters()).device)
        self.labeler = labeler
        self.extras = tuple(extras)
        names = ["strong"] if options.strong_views == 1 else ["strong_1", "strong_2"]
        self.strong_names = tuple(names)
        self.reads = {"labeled": ("weak",), "unlabeled": ("weak", *names)}
        self.cross_teaches = _cross_teaching(labeler, two_heads=student.base_head is not None)
        self.at_average = _policies(labeler, averaged=averages_statistics)

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        step = self._step(batch, t)
        pseudo_labels = step.pseudo_labels
        supervised = self.criterion(step.labeled.logits, step.labels, progress=self.progress(t))
        unlabeled = masked_cross_entropy(
            step.strong.logits, pseudo_labels.targets, pseudo_labels.mask
        )
        records = {
            "loss_labeled": supervised,
            "loss_unlabeled": self.options.unsup_loss_weight * unlabeled,
            "train_accuracy": train_accuracy(step.labeled.logits, step.labels),
            **label_records(pseudo_labels),
        }
        for extra in self.extras:
            records |= extra.losses(step)
        if self.label_statistics is not None:
            truth = batch["unlabeled"].targets if self.knows_truth else None
            count_labels(self.label_statistics, pseudo_labels, truth)
        return records

    def _step(self, batch: Batch, t: int) -> Step:
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        strong = [unlabeled.views[name] for name in self.strong_names]
        images = torch.cat([labeled.views["weak"], unlabeled.views["weak"], *strong])
        outputs = self.parallel_student(images)
        first, second = len(labeled), len(labeled) + len(unlabeled)
        weak = self._weak(outputs.rows(first, second), unlabeled.indices)
        if self.labeler.reads_labeled_features:
            features = self._teacher_features(labeled.views["weak"])
            self.labeler.see_labeled(features, labeled.targets, self.ranks.batch)
        pseudo_labels = self._label(weak, unlabeled.views["weak"], t)
        return Step(
            labeled=outputs.rows(0, first),
            labels=labeled.targets,
            weak=weak,
            strong=outputs.rows(second, len(images)),
            pseudo_labels=pseudo_labels,
            t=t,
        )

    @torch.no_grad()
    def _label(self, weak: WeakOutputs, images: torch.Tensor, t: int) -> PseudoLabels:
        """The labeler's pseudo-labels of the weak views, or what IMWA.CROSS_TEACH makes of them."""
        if self.other_teacher is None:
            return self.labeler.label(weak, t)
        logits = widened(self.other_teacher(images))
        if self.cross_teach == "other":
            return self.labeler.label(replace(weak, logits=logits), t)
        labels = self.labeler.label(weak, t)
        return labels._replace(mask=labels.mask & (labels.targets == logits.argmax(1)))

    def _weak(self, outputs: HeadOutputs, indices: torch.Tensor) -> WeakOutputs:
        tested = outputs.tested_logits
        return WeakOutputs(
            logits=widened(outputs.logits.detach()),
            features=widened(outputs.features.detach()),
            indices=indices,
            tested_logits=None if tested is None else widened(tested.detach()),
            processes=self.ranks.batch,
        )

    @torch.no_grad()
    def _teacher_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, d) of the teacher, in the mode that the labeler wants."""
        assert self.teacher is not None  # the constructor has seen one
        network = self.teacher.model.deployed
        if self.labeler.moves_statistics:
            set_train_mode(network, self.part)
        features = network.features(images)
        network.eval()
        return widened(features)

    def after_step(self, t: int) -> None:
        super().after_step(t)
        self.labeler.after_step(t)

    def state_dict(self) -> dict[str, Any]:
        return {f"{LABELER}.{key}": value for key, value in self.labeler.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        prefix = f"{LABELER}."
        self.labeler.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()})


def _check_composition(
    student: FixMatchNetwork, labeler: Labeler, extras: Sequence[Extra], *, has_teacher: bool
) -> None:
    trains_second = any(extra.needs_tested_head for extra in extras)
    if (student.base_head is not None) != trains_second:
        raise ValueError(
            "two heads and an extra that trains the second belong together; give both or neither"
        )
    if labeler.needs_tested_head and not trains_second:
        raise ValueError(f"{labeler.name} labels need a second head that is trained")
    if labeler.reads_labeled_features and not has_teacher:
        raise ValueError(f"{labeler.name} labels need a teacher (an ema_decay above 0)")


def _cross_teaching(labeler: Labeler, *, two_heads: bool) -> tuple[str, ...]:
    """The rules by which another member's average can label.

    A second head learns labels of its own, and features of two networks cannot be compared.
    """
    if two_heads:
        return ()
    return ("agree",) if labeler.reads_labeled_features else ("other", "agree")


def _policies(labeler: Labeler, *, averaged: bool) -> dict[str, str]:
    """What becomes of each entry of the state when members are averaged."""
    mixed = labeler.averageable if averaged else ()
    return {
        f"{LABELER}.{key}": "averaged" if key in mixed else "kept" for key in labeler.state_dict()
    }
