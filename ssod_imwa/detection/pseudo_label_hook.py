"""Tells who watches a run when self-training begins, and when it has nothing to train on."""

from __future__ import annotations

import logging
from typing import Any

from ssod_imwa.engine.trainer import HookBase

logger = logging.getLogger(__name__)

RECORDED = "pseudo_boxes"  # what a method records of each own iteration after burn-in
# A young teacher may be silent for some iterations; over so many it is no accident.
PATIENCE = 50

_WARNING = (
    "no box of the teacher passed the threshold in %d own iterations: nothing is learned from the "
    "unlabeled images. Likely causes: a threshold above the teacher's scores (lower "
    "SSOD.BBOX_THRESHOLD), a teacher that starts before it has learned enough (raise "
    "SSOD.BURN_IN_ITERS, or SSOD.RAMPUP_ITERS of a mean teacher), or too few labeled images (add "
    "some)"
)


class PseudoLabelHook(HookBase):
    """Announces the end of burn-in once and warns once when no pseudo-label comes for a while.

    It works for every method that records `pseudo_boxes`, the mean number of an image's
    pseudo-labels, and is silent for others. A member's own iterations are counted, also over
    episodes; on several ranks that share a batch, all of them have to be without pseudo-labels.

    It looks each `patience` global steps, as reading a number waits for the GPU: a warning comes
    after `patience` to 2 x `patience` - 1 iterations without pseudo-labels.

    Args:
        patience: own iterations in a row without pseudo-labels that are worth a warning.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._has_begun = False
        self._has_warned = False
        self._next = 0  # first global step that is not counted yet
        self._empty: dict[int, int] = {}  # iterations without pseudo-labels up to now, by member

    @property
    def name(self) -> str:
        return "pseudo-labels"

    def after_step(self) -> None:
        # The names alone: asking for values would wait for the GPU in each step.
        if RECORDED not in self.trainer.storage.smoothing_hints():
            return
        t = self.trainer.position.t
        if not self._has_begun:
            self._has_begun = True
            if t > 0:
                logger.info("burn-in ended after %d iterations: pseudo-labels are learned now", t)
        if not self._has_warned and (self.trainer.iter + 1) % self._patience == 0:
            self._count()
            longest = max(self._empty.values(), default=0)
            if self.trainer.ranks.batch.all_true(longest >= self._patience):
                self._has_warned = True
                logger.warning(_WARNING, longest)

    def _count(self) -> None:
        """Continue each member's count up to the current step."""
        storage = self.trainer.storage
        if RECORDED not in storage.smoothing_hints():
            return
        for value, step in storage.since(RECORDED, self._next):
            member = self.trainer.schedule.position(step).member
            self._empty[member] = 0 if value > 0 else self._empty.get(member, 0) + 1
        self._next = self.trainer.iter + 1

    def state_dict(self) -> dict[str, Any]:
        if not self._has_begun:
            return {}
        if not self._has_warned:
            self._count()
        return {
            "has_begun": self._has_begun,
            "has_warned": self._has_warned,
            "next": self._next,
            "empty": dict(self._empty),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self._has_begun, self._has_warned = state["has_begun"], state["has_warned"]
        self._next, self._empty = state["next"], dict(state["empty"])
