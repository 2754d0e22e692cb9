"""Puts what a teacher teaches among the run's numbers, and warns when it teaches nothing good."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssod_imwa.averaging.episodes import Position
from ssod_imwa.engine.label_statistics import BINS, LabelCounts
from ssod_imwa.engine.trainer import HookBase

logger = logging.getLogger(__name__)

# A young teacher may be silent for some iterations; over so many it is no accident.
PATIENCE = 50
# Numbers of more classes than this would make metrics.json megabytes long.
MOST_CLASSES = 200
# Of a class of which so many labels were due, one at least should have come: under the labeled
# images' own shares none comes with probability e^-20.
DUE = 20
# A teacher that labels so many times the objects that people labeled sees doubles or background.
TOO_MANY = 3


@dataclass(frozen=True)
class LabelAdvice:
    """What a task says of a teacher that goes wrong: likely causes and the keys to turn.

    Attributes:
        label: what one label is, such as "box".
        none: when no label passes.
        many: when far more labels pass than the labeled images have objects.
        missing: when a class has none.
    """

    label: str
    none: str
    many: str
    missing: str


class LabelHook(HookBase):
    """Records `labels/...` and tells who watches a run how self-training goes.

    Each `period` global steps and at each member's end, for methods that have label statistics and
    once these have begun: `labels/per_image`, `labels/empty_images` (%), `labels/scores-0.9` (% of
    all scores in [0.9, 1]), where truth is known `labels/precision` and `labels/recall` (%), and
    for each class `labels/share-NAME` (% of all labels), `labels/precision-NAME` and
    `labels/recall-NAME`. The shares of the labeled images, to compare, are in results.json.

    Announced once: the end of burn-in. Warned of once each: no label over `PATIENCE` own
    iterations of a member, far more labels than people gave, classes without any.

    It belongs before the hook that writes rows. On several ranks that share a batch it counts
    for all of them, and it watches all members, also those that other ranks train.

    Args:
        classes: names in label order.
        prior: objects of each class on the labeled images.
        labeled_images: how many these are.
        period: global steps between two records.
        advice: the task's words.
    """

    def __init__(
        self,
        classes: Sequence[str],
        prior: Sequence[int],
        *,
        labeled_images: int,
        period: int,
        advice: LabelAdvice,
    ) -> None:
        self._classes = tuple(classes)
        self._prior = np.array(prior, dtype=np.float64)
        self._labeled_images = labeled_images
        self._period = period
        self._advice = advice
        self._has_begun = False
        self._said: list[str] = []
        self._partial: LabelCounts | None = None  # of the current period, of this rank
        self._iterations = 0  # of the current period, in which the teacher labeled
        self._silent: dict[int, int] = {}  # own iterations without labels up to now, by member
        self._total: LabelCounts | None = None

    @property
    def name(self) -> str:
        return "labels"

    def after_step(self) -> None:
        statistics = self.trainer.method.label_statistics
        if statistics is None:
            return
        position = self.trainer.position
        if statistics.touched:
            statistics.touched = False
            self._iterations += 1
            self._announce(position.t)
        is_due = not (self.trainer.iter + 1) % self._period or position.ends_member
        # A member that was dropped has nothing to say, but hears what others say.
        if is_due and self.trainer.ranks.exchange.any_true(self._iterations > 0):
            counts = self._counts_of_all_ranks()
            if self._iterations:
                self._record(counts)
            self._watch(counts, position)
            self._iterations = 0

    def _announce(self, t: int) -> None:
        if not self._has_begun and t > 0:
            logger.info("burn-in ended after %d iterations: pseudo-labels are learned now", t)
        self._has_begun = True

    def _counts_of_all_ranks(self) -> LabelCounts:
        group = self.trainer.ranks.batch
        counts, *others = [
            LabelCounts.from_rows(rows) for rows in group.all_gather(self._take().rows())
        ]
        self._partial = None
        for other in others:
            counts = counts + other
        return counts

    def _keep(self, counts: LabelCounts) -> None:
        self._partial = counts if self.trainer.ranks.batch.is_main else None

    def _take(self) -> LabelCounts:
        statistics = self.trainer.method.label_statistics
        assert statistics is not None  # see after_step
        counts = statistics.take()
        return counts if self._partial is None else self._partial + counts

    def _record(self, counts: LabelCounts) -> None:
        for name, value in label_numbers(counts, self._classes).items():
            self.trainer.storage.put_scalar(f"labels/{name}", value, smoothing_hint=False)

    def _watch(self, counts: LabelCounts, position: Position) -> None:
        mine = (position.member, self._iterations, counts.rows())
        of_members = self.trainer.ranks.exchange.all_gather(mine)
        for member, iterations, rows in of_members[: position.members]:
            self._watch_member(member, iterations, LabelCounts.from_rows(rows))

    def _watch_member(self, member: int, iterations: int, counts: LabelCounts) -> None:
        labels = int(counts.used.sum())
        self._silent[member] = 0 if labels else self._silent.get(member, 0) + iterations
        self._total = counts if self._total is None else self._total + counts
        if self._silent[member] >= PATIENCE:
            self._warn(
                "none",
                "no %s of the teacher passed the threshold in %d own iterations: nothing is "
                "learned from the unlabeled images. Likely causes: %s",
                self._advice.label,
                self._silent[member],
                self._advice.none,
            )
        per_image = labels / max(counts.images, 1)
        usual = float(self._prior.sum()) / max(self._labeled_images, 1)
        if counts.images >= PATIENCE and per_image > TOO_MANY * usual:
            self._warn(
                "many",
                "the teacher gives %.3g labels an image, the labeled images have %.3g. Likely "
                "causes: %s",
                per_image,
                usual,
                self._advice.many,
            )
        due = self._prior / max(self._prior.sum(), 1) * self._total.used.sum()
        missing = np.flatnonzero((due >= DUE) & (self._total.used == 0))
        if len(missing):
            self._warn(
                "missing",
                "of %s the teacher gave no label among %d. Likely causes: %s",
                ", ".join(self._classes[i] for i in missing),
                int(self._total.used.sum()),
                self._advice.missing,
            )

    def _warn(self, kind: str, text: str, *values: object) -> None:
        if kind not in self._said:
            self._said.append(kind)
            if self.trainer.ranks.run.is_main:
                logger.warning(text, *values)

    def state_dict(self) -> dict[str, Any]:
        if not self._has_begun:
            return {}
        # One process writes the file: it keeps from now on what all have counted so far.
        counts = self._counts_of_all_ranks()
        self._keep(counts)
        return {
            "said": list(self._said),
            "iterations": self._iterations,
            "silent": dict(self._silent),
            "partial": counts.rows(),
            "total": None if self._total is None else self._total.rows(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self._has_begun = True
        self._said, self._iterations = list(state["said"]), state["iterations"]
        self._silent = dict(state["silent"])
        self._keep(LabelCounts.from_rows(state["partial"]))
        self._total = None if state["total"] is None else LabelCounts.from_rows(state["total"])


def label_numbers(counts: LabelCounts, classes: Sequence[str]) -> dict[str, float]:
    """The scalars of `LabelHook`, by name; those that have nothing to divide by are left out."""
    numbers = {
        "per_image": _ratio(counts.used.sum(), counts.images),
        "empty_images": _percent(counts.empty, counts.images),
        "precision": _percent(counts.right.sum(), counts.judged.sum()),
        "recall": _percent(counts.right.sum(), counts.objects.sum()),
    }
    for tenth in range(BINS):
        share = _percent(counts.scores[tenth], counts.scores.sum())
        numbers[f"scores-{tenth / BINS:.1f}"] = share
    if len(classes) <= MOST_CLASSES:
        for label, name in enumerate(classes):
            used, right = counts.used[label], counts.right[label]
            numbers[f"share-{name}"] = _percent(used, counts.used.sum())
            numbers[f"precision-{name}"] = _percent(right, counts.judged[label])
            numbers[f"recall-{name}"] = _percent(right, counts.objects[label])
    return {name: value for name, value in numbers.items() if value is not None}


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _percent(part: float, whole: float) -> float | None:
    return 100 * float(part) / float(whole) if whole else None
