"""What a training method has to offer to be trained, wrapped by IMWA, resumed and evaluated."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.engine.label_statistics import LabelStatistics
from ssod_imwa.engine.teacher import Teacher


class Method(ABC):
    """A training method, the IMWA paper's 𝒜(θ, ω, 𝒟, ℋ, T).

    The trainer calls, for each of a member's own iterations t = 0..T-1::

        method.set_train_mode()
        losses = method.losses(batch, t)
        sum(losses that are named loss...).backward()
        optimizer.step()
        method.after_step(t)

    Everything that changes with time (burn-in, ramp-ups, EMA decay) follows t, never the global
    step, so that a member under IMWA sees the same method as a plain run does.

    Attributes:
        reads: the streams that `losses` reads and the views it takes of each, by which a run's
            batches are made. On the class it is all that the method may read, on an instance what
            it reads with its settings.
        student: the model that gradients train.
        teacher: what follows it as a moving average, or None if the method has none; it is what is
            evaluated and shipped once it is ready.
        parallel_student: what `losses` calls: the student, or its wrapper (compiled,
            DistributedDataParallel).
        at_average: entries of `state_dict` -> what becomes of them when members are averaged:
            "kept" by each member, "averaged" like weights, or "shared" by members in turn, who hand
            on one and the same. Entries that it does not name are kept.
        label_statistics: what counts the labels that the teacher gives, for methods that have a
            teacher label; None if nobody looks.
        ranks: who else trains; those of `ranks.batch` have the other parts of every batch.
        cross_teaches: the rules by which another member's teacher can label ("other": in place of
            what labels by itself; "agree": with it, where both say the same).
        cross_teach: the rule that is followed, or "none".
        other_teacher: the other member's teacher in eval mode, None while there is none; see
            `CrossTeachingHook`.
    """

    at_average: Mapping[str, str] = MappingProxyType({})
    reads: Mapping[str, tuple[str, ...]]
    cross_teaches: tuple[str, ...] = ()

    def __init__(self, student: nn.Module, teacher: Teacher | None = None) -> None:
        self.student = student
        self.teacher = teacher
        self.parallel_student: nn.Module = student
        self.label_statistics: LabelStatistics | None = None
        self.ranks = Ranks.alone()
        self.cross_teach = "none"
        self.other_teacher: nn.Module | None = None

    def join(self, ranks: Ranks) -> None:
        """Take part in a run of several processes."""
        self.ranks = ranks

    def set_train_mode(self) -> None:
        """Put the student into the mode in which it trains; frozen parts may stay in eval mode."""
        self.student.train()

    @abstractmethod
    def losses(self, batch: Any, t: int) -> dict[str, torch.Tensor]:
        """Scalars of one batch: those named `loss...` are summed, the others are only recorded."""

    def after_step(self, t: int) -> None:
        """Update what follows the student after the optimizer's step t."""
        if self.teacher is not None:
            self.teacher.follow(t)

    @property
    def burn_in(self) -> int:
        """Own iterations in which labeled images alone are learned: until the teacher starts."""
        return 0 if self.teacher is None else self.teacher.start

    def phases(self) -> dict[int, dict[str, int]]:
        """First own iteration of each phase -> passes over an image of each stream in its steps.

        A pass forward counts 1, one with gradients 3. The time left scales by them what it has not
        measured yet. In burn-in labeled images alone are learned; after it a teacher looks at one
        view of the others, of which the student learns the rest.
        """
        passes = {name: 3 * len(views) for name, views in self.reads.items()}
        if self.teacher is not None:
            passes |= {name: count - 2 for name, count in passes.items() if name != "labeled"}
        if self.burn_in == 0:
            return {0: passes}
        return {0: {"labeled": passes["labeled"]}, self.burn_in: passes}

    def use(self, settings: Mapping[str, Any]) -> None:
        """Go on with the settings of the member that trains next.

        Args:
            settings: values of attributes, by their names: "options", or "labeler.options" for one
                of a part. What was made of other settings when the method was built stays.

        Raises:
            AttributeError: there is no attribute of a name.
        """
        for name, value in settings.items():
            owner, _, attribute = name.rpartition(".")
            part = operator.attrgetter(owner)(self) if owner else self
            if not hasattr(part, attribute):
                raise AttributeError(f"{type(self).__name__} has no {name}")
            setattr(part, attribute, value)

    def models(self) -> dict[str, nn.Module]:
        """The models that IMWA averages, by name: "student", "teacher", and what else moves."""
        models: dict[str, nn.Module] = {"student": self.student}
        return models if self.teacher is None else {**models, "teacher": self.teacher.model}

    def evaluated_models(self, t: int) -> dict[str, nn.Module]:
        """The models worth evaluating once iteration t is done; the last one is to be shipped."""
        models: dict[str, nn.Module] = {"student": self.student}
        if self.teacher is not None and self.teacher.ready(t):
            models["teacher"] = self.teacher.model
        return models

    def inference_model(self, t: int) -> nn.Module:
        """The model to ship once iteration t is done."""
        return list(self.evaluated_models(t).values())[-1]

    def state_dict(self) -> dict[str, Any]:
        """What a member owns beyond weights: queues, prototypes, distribution estimates."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise KeyError(f"{type(self).__name__} has no state, but was given {sorted(state)}")
