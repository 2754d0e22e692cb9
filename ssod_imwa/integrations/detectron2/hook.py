"""IMWA inside a detectron2 project that knows nothing of this package."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import detectron2.engine
import detectron2.utils.comm as d2_comm
from detectron2.engine import hooks as d2_hooks
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule, Position
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.member_state import Stateful
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.detection.detectors.plain_attributes import PlainAttributes
from ssod_imwa.engine.seeding import counted_seed
from ssod_imwa.integrations.detectron2.averages import Average, UnknownAverages, as_module
from ssod_imwa.integrations.detectron2.preparation import (
    AFTER,
    check_checkpointers,
    check_length,
    check_place,
    check_rates,
    plan_rates,
    share_handlers,
)
from ssod_imwa.integrations.detectron2.trainer_parts import (
    generator_states,
    own_clock,
    set_generator_states,
    unwrapped,
)

logger = logging.getLogger(__name__)


class IMWAHook(detectron2.engine.HookBase):
    """Trains M members in turn in any detectron2 trainer and averages them after each episode.

    ::

        trainer = DefaultTrainer(cfg)                       # SOLVER.MAX_ITER is a member's T
        IMWAHook(cfg.SOLVER.MAX_ITER, members=2, episodes=4).register(trainer)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()                                     # M * T steps

    Inside `run_step` the trainer's `iter` is the member's own iteration t and its `max_iter` is T,
    so learning rate, burn-in and schedules behave as in a run of T steps; hooks, writers,
    evaluation and checkpoints see the global step. Learning-rate scheduler, optimizer state,
    gradient scaler and the `loss_normalizer` of dense detectors belong to each member.

    Every member's part of an episode has a data order of its own: before it, generators are seeded
    from (seed, member, episode) and the loader is built anew (the very first part keeps the
    trainer's loader and generators, so M = 1 is the stock run bit for bit). A run that resumes
    inside such a part reads its batches again up to where it stood, so it goes on exactly; on
    several processes only rank 0's generators are restored exactly, since detectron2's checkpoint
    holds one process.

    Args:
        iterations: T, steps of one member.
        members: M.
        episodes: E.
        start: own iterations before members part, trained once; see `EpisodeSchedule`.
        lengths: of the episodes, if they are not alike; see `EpisodeSchedule`.
        teacher: name of the trainer's attribute that holds a second model, averaged apart; "" for
            none. The project's own checkpointer has to save it.
        averaged_state: further averages of the model, by name: modules, or objects with an
            attribute `state` that maps names to tensors, as d2go's and detrex's `EMAState`. They
            are averaged as a teacher is, and have to be saved as it is.
        build_loader: makes a training loader. None takes `trainer.build_train_loader(trainer.cfg)`
            where there is one (DefaultTrainer), else keeps the running loader, whose stream goes on
            from member to member and cannot be resumed.
        seed: of the members' generators; the same for every rank.
        run_step: name of the trainer's method that does one step.
        member_state: further objects with `state_dict`/`load_state_dict` of which each member has
            a state of its own.
        options: the other arguments of `averaging.imwa.IMWA`, such as `store` or `optimizer_state`.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """

    def __init__(
        self,
        iterations: int,
        *,
        members: int = 2,
        episodes: int = 1,
        start: int = 0,
        lengths: Sequence[int] | None = None,
        teacher: str = "",
        averaged_state: Mapping[str, Average] | None = None,
        build_loader: Callable[[], Iterable[Any]] | None = None,
        seed: int = 0,
        run_step: str = "run_step",
        member_state: Mapping[str, Stateful] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.schedule = EpisodeSchedule(
            iterations, episodes=episodes, members=members, start=start, lengths=lengths
        )
        if taken := {"student", "teacher"} & set(averaged_state or {}):
            raise ValueError(f"averaged_state[{min(taken)!r}] is not allowed (the name is taken)")
        self._teacher = teacher
        self._averaged_state = dict(averaged_state or {})
        self._build_loader = build_loader
        self._seed = seed
        self._run_step = run_step
        self._member_state = dict(member_state or {})
        self._options = dict(options or {})
        self._imwa: IMWA | None = None
        self._attributes: PlainAttributes | None = None
        self._pending: dict[str, Any] | None = None
        # Generators as they were before the current part's first batch was drawn.
        self._part_start: dict[str, Any] = {}
        # Generators after the last step: what other hooks draw afterwards is put back.
        self._after_step: dict[str, Any] = {}
        self._undo = contextlib.ExitStack()
        self._unknown: UnknownAverages | None = None

    def register(self, trainer: detectron2.engine.TrainerBase) -> None:
        """Put the hook where it belongs in a trainer's list, and make the run M * T steps long.

        Raises:
            ValueError: the trainer or its learning rates are not set to T steps, or its checkpoints
                would not hold what a resume needs.
        """
        planned = getattr(trainer, "max_iter", self.schedule.iterations)
        if planned not in (self.schedule.iterations, len(self.schedule)):
            raise ValueError(
                f"iterations = {self.schedule.iterations} is not allowed (the trainer is set to "
                f"{planned} steps, SOLVER.MAX_ITER; both are the steps of one member)"
            )
        check_checkpointers(trainer, self._averages(trainer))
        trainer.register_hooks([self])
        trainer._hooks.remove(self)
        after = [i for i, hook in enumerate(trainer._hooks) if isinstance(hook, AFTER)]
        trainer._hooks.insert(min(after, default=len(trainer._hooks)), self)
        trainer.max_iter = len(self.schedule)
        plan_rates(trainer, self.schedule)
        check_rates(trainer, self.schedule)
        for hook in trainer._hooks:
            for writer in getattr(hook, "_writers", ()):
                if isinstance(writer, CommonMetricPrinter):
                    writer._max_iter = len(self.schedule)  # it is silent beyond
        share_handlers()

    def before_train(self) -> None:
        trainer = self.trainer
        share_handlers()
        self._check(trainer)
        modules = self._find_modules(trainer)
        self._unknown = UnknownAverages(modules["student"], modules.values())
        self._attributes = PlainAttributes(modules, DenseDetector, "loss_normalizer")
        self._imwa = IMWA(
            self.schedule,
            modules,
            optimizer=trainer.optimizer,
            member_state={
                "attributes": self._attributes,
                **self._found_state(),
                **self._member_state,
            },
            ranks=Ranks.of_run(),
            **self._options,
        )
        if self._pending is not None:
            self._imwa.load_state_dict(self._pending["imwa"])
            self._attributes.load_state_dict(self._pending["attributes"])
            self._resume(self._pending)
            self._pending = None
        else:
            self._part_start = generator_states()
        self._undo.enter_context(own_clock(trainer, self._run_step, self.schedule))

    def before_step(self) -> None:
        if self._after_step and self.schedule.members > 1:
            set_generator_states(self._after_step)
        position = self.schedule.position(self.trainer.iter)
        if position.starts_member and self.trainer.iter > 0:
            self._start_part(position.member, position.episode)
        assert self._imwa is not None  # since before_train
        self._imwa.before_step(self.trainer.iter)

    def after_step(self) -> None:
        assert self._imwa is not None  # since before_train
        assert self._unknown is not None
        position = self.schedule.position(self.trainer.iter)
        if position.ends_member:
            self._wait_for_metrics()
        first = self.trainer.iter == self.trainer.start_iter
        if position.members > 1 and (first or position.ends_member):
            self._unknown.report(self.trainer)
        self._imwa.after_step(self.trainer.iter)
        self._after_step = generator_states()

    def after_train(self) -> None:
        self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """Members that do not train, generators, and what detectron2 does not save."""
        if self._imwa is None or self._attributes is None:
            return {}
        return {
            "imwa": self._imwa.state_dict(),
            "attributes": self._attributes.state_dict(),
            "generators": self._after_step,
            "part_start": self._part_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called while the trainer's checkpoint is loaded; used when training starts."""
        self._pending = state

    def _resume(self, state: dict[str, Any]) -> None:
        self._after_step = state["generators"]
        last = self.schedule.position(self.trainer.start_iter - 1)
        plain = self.schedule.members == 1  # one part from beginning to end
        if self._loader_builder() is None:
            logger.warning(
                "the data order is not resumed (give IMWAHook build_loader, or use a trainer with "
                "build_train_loader)"
            )
        elif plain or not last.ends_member:
            begin = 0 if plain else self.schedule.bounds(last.episode)[0]
            self._read_again(state["part_start"], last, last.t + 1 - begin)
        self._set_generators(self._after_step)
        self._after_step = generator_states()

    def _read_again(self, start: dict[str, Any], position: Position, done: int) -> None:
        """Bring the loader of a part to where it was after `done` batches."""
        logger.info("reading %d batches again, up to where the run stopped", done)
        if (position.member, position.episode) != (0, 0):
            self._start_part(position.member, position.episode)
        self._part_start = start
        self._set_generators(start)
        batches = self._inner()._data_loader_iter
        for _ in range(done):
            next(batches)

    def _set_generators(self, states: dict[str, Any]) -> None:
        if d2_comm.is_main_process():
            set_generator_states(states)
        else:  # the checkpoint holds rank 0's; ranks must not draw alike
            seed = counted_seed(self._seed, "detectron2 resume", self.trainer.start_iter)
            seed_all_rng(seed % 2**31 + d2_comm.get_rank())

    def _start_part(self, member: int, episode: int) -> None:
        """Give a member's part of an episode its own generators and data order."""
        build = self._loader_builder()
        if self.schedule.members == 1 or build is None:
            return
        seed_all_rng(member_seed(self._seed, member, episode) + d2_comm.get_rank())
        self._inner().reset_data_loader(build)
        self._part_start = generator_states()

    def _loader_builder(self) -> Callable[[], Iterable[Any]] | None:
        if self._build_loader is not None:
            return self._build_loader
        build = getattr(self.trainer, "build_train_loader", None)
        return None if build is None else lambda: build(self.trainer.cfg)

    def _inner(self) -> detectron2.engine.SimpleTrainer:
        """The trainer that holds the loader: DefaultTrainer's `_trainer`, or the trainer itself."""
        return getattr(self.trainer, "_trainer", self.trainer)

    def _wait_for_metrics(self) -> None:
        # Metrics that are written by another thread must get there under this member's clock.
        executor = getattr(self._inner(), "concurrent_executor", None)
        if executor is not None:
            executor.submit(lambda: None).result()

    def _found_state(self) -> dict[str, Stateful]:
        found: dict[str, Stateful] = {}
        for hook in self.trainer._hooks:
            if isinstance(hook, d2_hooks.LRScheduler):
                found["scheduler"] = hook.scheduler
        scaler = getattr(self._inner(), "grad_scaler", None)
        if scaler is not None:
            found["scaler"] = scaler
        return found

    def _averages(self, trainer: detectron2.engine.TrainerBase) -> dict[str, Average]:
        """What the project averages by itself, by the expression that it has for it."""
        averages = {f"averaged_state.{name}": x for name, x in self._averaged_state.items()}
        teacher = self._find_teacher(trainer) if self._teacher else None
        return averages if teacher is None else {f"trainer.{self._teacher}": teacher, **averages}

    def _find_modules(self, trainer: detectron2.engine.TrainerBase) -> dict[str, nn.Module]:
        """The student and all its averages."""
        modules = {"student": unwrapped(trainer.model)}
        teacher = self._find_teacher(trainer) if self._teacher else None
        if teacher is not None:  # `_check` has refused a name without one
            modules["teacher"] = as_module("teacher", teacher)
        for name, average in self._averaged_state.items():
            modules[name] = as_module(f"averaged_state[{name!r}]", average)
        return modules

    def _find_teacher(self, trainer: detectron2.engine.TrainerBase) -> Average | None:
        for owner in (trainer, getattr(trainer, "_trainer", None)):
            if (average := getattr(owner, self._teacher, None)) is not None:
                return average
        return None

    def _check(self, trainer: detectron2.engine.TrainerBase) -> None:
        check_length(trainer, self.schedule)
        if trainer.start_iter > 0 and self._pending is None:
            raise ValueError(
                f"the run continues at step {trainer.start_iter}, but its checkpoint holds no "
                "state of IMWAHook (resume with the trainer's own checkpointer, or start anew)"
            )
        check_place(trainer, self)
        if self._teacher and self._find_teacher(trainer) is None:
            raise ValueError(
                f"teacher = {self._teacher!r} is not allowed (the trainer has no model of this "
                "name)"
            )
        check_checkpointers(trainer, self._averages(trainer))


def member_seed(seed: int, member: int, episode: int) -> int:
    """What the generators are seeded with before a member's part of an episode, plus the rank."""
    return counted_seed(seed, "detectron2 part", member, episode) % 2**31
