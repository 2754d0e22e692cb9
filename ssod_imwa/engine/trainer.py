"""The training loop of every task, with detectron2's trainer and hook contract."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule, Position
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.engine.events import EventStorage
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.seeding import seed_everything
from ssod_imwa.errors import NonFiniteError

logger = logging.getLogger(__name__)

# Members that are trained at once wait for each other after so many seconds, or steps if these are
# less: after each step, the slower of two busy cores would decide every time, and who asks a run to
# stop (torchrun, docker) waits for 10 to 30 seconds.
TALK_SECONDS = 5.0
TALK_STEPS = 16


class HookBase:
    """Something the trainer calls at fixed points of the loop.

    The contract is detectron2's::

        hook.before_train()
        for trainer.iter in range(trainer.start_iter, trainer.max_iter):
            hook.before_step()
            trainer.run_step()          # calls hook.after_backward() before the optimizer's step
            hook.after_step()
        hook.after_train()              # also when the loop ends by an exception

    Attributes:
        name: key of the hook's state in checkpoints; two hooks of a trainer never share it.
        is_of_run: whether the state is the same on all ranks, also where these train other members
            at the same time; a checkpoint then has it once.
        trainer: the trainer, set at registration.
    """

    trainer: Any = None
    is_of_run: bool = False

    @property
    def name(self) -> str:
        return type(self).__name__

    def before_train(self) -> None: ...

    def after_train(self) -> None: ...

    def before_step(self) -> None: ...

    def after_backward(self) -> None: ...

    def after_step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """Trains a method over an episode schedule.

    Two clocks run: the method sees `position.t`, the member's own iteration; hooks, logs and
    checkpoints see `iter`, the global step 0..M*T-1.

    Args:
        method: the method and its models, on their device.
        schedule: which member trains at which global step.
        batches: given a global step, the batches from that step on, each with a method `to(device)`
            and, for accumulation, `split(parts)`.
        optimizer: holds the student's parameters.
        seed: run seed; the global generators are re-seeded from (seed, member, t) at every step.
        first_member: number of the schedule's member 0 (for members trained as separate runs).
        accumulation: micro-batches whose gradients add up to one optimizer step.
        amp_dtype: float16 or bfloat16 for automatic mixed precision, None for none.
        clip: called with the student's parameters before the optimizer's step.
        drops_members: whether one of several members that cannot go on is dropped, instead of
            ending the run: what it has trained becomes NaN, which IMWA leaves out of the average
            with nonfinite = "drop", and the rest of its turn is skipped.
        ranks: who trains which member. A rank among those that share a batch is part of the step's
            seed, so that they draw different dropout masks.
    """

    def __init__(
        self,
        method: Method,
        schedule: EpisodeSchedule,
        batches: Callable[[int], Iterable[Any]],
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        first_member: int = 0,
        accumulation: int = 1,
        amp_dtype: torch.dtype | None = None,
        clip: Callable[[list[nn.Parameter]], object] | None = None,
        drops_members: bool = False,
        ranks: Ranks = Ranks.alone(),
    ) -> None:
        self.method = method
        self.schedule = schedule
        self.optimizer = optimizer
        self.seed = seed
        self.first_member = first_member
        self.accumulation = accumulation
        self.amp_dtype = amp_dtype
        self.clip = clip
        self.drops_members = drops_members
        self.ranks = ranks
        self.parameters = [p for p in method.student.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        # Only float16 needs its small gradients scaled up.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        self.hooks: list[HookBase] = []
        self.iter = self.start_iter = 0
        self.max_iter = len(schedule)
        self.storage = EventStorage()
        self.stop_requested = False
        # Of the last step: seconds, and when it ended by `time.perf_counter`.
        self.step_seconds = self.step_end = 0.0
        self._batches = batches
        self._stream: Iterator[Any] = iter(())
        self._failure = ""  # why this member cannot go on; equal on all ranks of it
        self._talks_at = 0

    @property
    def position(self) -> Position:
        """Episode, member and own iteration of the current global step."""
        return self.schedule.position(self.iter)

    @property
    def may_drop(self) -> bool:
        """Whether the current member is one of several, and dropped if it cannot go on."""
        return self.drops_members and self.position.members > 1

    @property
    def has_dropped(self) -> bool:
        """Whether the current member was dropped: what would look at it has nothing to see."""
        return self.may_drop and bool(self._failure)

    @property
    def speaks_for_member(self) -> bool:
        """Whether this process is the one of all that train its member which writes of it."""
        is_one_of_many = self.position.members > 1
        return self.ranks.batch.is_main and (is_one_of_many or self.ranks.exchange.is_main)

    @property
    def talks(self) -> bool:
        """Whether this is a step after which all ranks hear of what happened on any of them.

        Every step is, except where members are trained at once: these talk at their end, and at own
        iterations in between on which they have agreed. One that has failed learns nothing until
        then.
        """
        position = self.position
        return self.ranks.members == 1 or position.ends_member or position.t >= self._talks_at

    def _agree_when_to_talk(self) -> None:
        if self.ranks.members > 1:
            slowest = max(self.ranks.run.all_gather(self.step_seconds))
            steps = int(TALK_SECONDS / slowest)
            self._talks_at = self.position.t + min(max(steps, 1), TALK_STEPS)

    def register_hooks(self, hooks: Sequence[HookBase]) -> None:
        """Append hooks; at each point they are called in this order."""
        for hook in hooks:
            if any(hook.name == other.name for other in self.hooks):
                raise ValueError(f"hook name {hook.name!r} is taken (names key the saved state)")
            hook.trainer = self
            self.hooks.append(hook)

    def train(self) -> None:
        """Run from `start_iter` to `max_iter`, or to the step in which a hook asked to stop."""
        self.iter = self.storage.iter = self.start_iter
        self._stream = iter(self._batches(self.start_iter))
        with ExitStack() as stack:
            # A stack, so that a hook that fails to clean up does not keep the others from it.
            for hook in reversed(self.hooks):
                stack.callback(hook.after_train)
            self._call("before_train")
            while self.iter < self.max_iter and not self.stop_requested:
                self.storage.iter = self.iter
                self._call("before_step")
                self.run_step()
                self._call("after_step")
                if self.talks:
                    self._agree_when_to_talk()
                if self.has_dropped and self.position.ends_member:
                    self._failure = ""
                    self._stream = iter(self._batches(self.iter + 1))
                self.iter += 1

    def run_step(self) -> None:
        """One optimizer step of the current member; none if it was dropped."""
        start = time.perf_counter()
        if self.has_dropped:
            self.step_end = start
            return
        position = self.position
        batch = next(self._stream).to(self.device)
        self.storage.put_scalar("data_time", time.perf_counter() - start)
        member = self.first_member + position.member
        seed_everything(self.seed, "step", member, position.t, self.ranks.batch.rank)
        self.method.set_train_mode()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            records = self._gradients(batch, position.t)
        except FloatingPointError as error:  # as detectron2's proposals raise it
            records = {}
            self._fail_without_loss(error, position)
        self._call("after_backward")
        if not self._failure:
            self._update(records, position)
        if self.has_dropped:
            self.drop_member(self._failure)
        else:
            if self.talks:
                self.raise_if_failed()
            self.method.after_step(position.t)
            self.storage.put_tensors(records)
        self.step_end = time.perf_counter()
        self.step_seconds = self.step_end - start
        self.storage.put_scalar("time", self.step_seconds)

    def _gradients(self, batch: Any, t: int) -> dict[str, torch.Tensor]:
        """The losses of a batch, and what they are made of; the student has the gradients."""
        parts = batch.split(self.accumulation) if self.accumulation > 1 else [batch]
        records: dict[str, torch.Tensor] = {}
        for number, part in enumerate(parts, start=1):
            for name, value in self._backward(part, t, last=number == len(parts)).items():
                records[name] = records.get(name, 0) + value / len(parts)
        return records

    def _fail_without_loss(self, error: FloatingPointError, position: Position) -> None:
        self._failure = self._failure or (
            f"{error} (at {self._place(position)}; lower SOLVER.BASE_LR or clip gradients, "
            "SOLVER.CLIP_GRADIENTS.ENABLED True)"
        )
        if self.ranks.batch.size > 1:  # the others wait for this one's gradients
            raise NonFiniteError(self._failure) from error

    def _backward(self, batch: Any, t: int, *, last: bool) -> dict[str, torch.Tensor]:
        student = self.method.parallel_student
        postponed: AbstractContextManager[None] = nullcontext()
        if isinstance(student, nn.parallel.DistributedDataParallel) and not last:
            postponed = student.no_sync()  # only the last micro-batch exchanges gradients
        autocast = torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )
        with postponed:
            with autocast:
                records = self.method.losses(batch, t)
                losses = [value for name, value in records.items() if name.startswith("loss")]
                if not losses:
                    raise ValueError(
                        f"no loss in {sorted(records)} (a name must begin with 'loss')"
                    )
                total = torch.stack(losses).sum()
            self.scaler.scale(total / self.accumulation).backward()
        return {"total_loss": total.detach(), **{k: v.detach() for k, v in records.items()}}

    def _update(self, records: dict[str, torch.Tensor], position: Position) -> None:
        """The optimizer's step; where it is not to be had, a failure that stops this member."""
        self._failure = self._why_not_finite(records, position)
        if self._failure:
            return
        self.scaler.unscale_(self.optimizer)  # not before: the next step may be another member's
        if self.clip is not None:
            self.clip(self.parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Every overflow halves the loss scale and skips the step; below 1 nothing is learned.
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            self._failure = (
                f"gradients overflow at every loss scale at {self._place(position)}; lower "
                "SOLVER.BASE_LR or use SOLVER.AMP.DTYPE bfloat16"
            )

    def _why_not_finite(self, records: dict[str, torch.Tensor], position: Position) -> str:
        """What is wrong with a step on the first rank of this member that has it, or ""."""
        finite = torch.isfinite(records["total_loss"])
        if not self.scaler.is_enabled():  # with a scaler an overflow skips the step by design
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            finite = finite & torch.isfinite(nn.utils.get_total_norm(gradients))
        if self.ranks.batch.all_true(finite):
            return ""
        losses = {name: float(value) for name, value in records.items()}
        reason = (
            f"loss or gradient is not finite at {self._place(position)}: {losses}; lower "
            "SOLVER.BASE_LR or clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True)"
        )
        return next(filter(None, self.ranks.batch.all_gather("" if finite else reason)))

    def _place(self, position: Position) -> str:
        """Where a run is, counted from 1 for people to read."""
        words = ", ".join(self.schedule.in_words(position))
        return f"global step {position.global_step + 1} ({words})"

    def raise_if_failed(self) -> None:
        """Raise on all ranks when a member cannot go on and is not dropped; all call it together.

        Raises:
            NonFiniteError: why not, of the first member that has failed.
        """
        if not self.may_drop and not self.ranks.exchange.all_true(not self._failure):
            raise NonFiniteError(next(filter(None, self.ranks.exchange.all_gather(self._failure))))

    @torch.no_grad()
    def drop_member(self, reason: str) -> None:
        """Leave out the current member, see `may_drop`; all of its ranks call it."""
        self._failure = reason
        for parameter in self.parameters:
            parameter.fill_(torch.nan)
        logger.warning("%s; the rest of this member's turn is skipped", reason)

    def _call(self, point: str) -> None:
        for hook in self.hooks:
            getattr(hook, point)()

    def state_dict(self) -> dict[str, Any]:
        """Everything to resume after the current step, hooks included; see `engine.checkpoint`."""
        # At its end the member has been left out of the average already.
        is_dropped = self.has_dropped and not self.position.ends_member
        return {
            "iteration": self.iter + 1,
            "dropped": self._failure if is_dropped else "",
            "models": {name: model.state_dict() for name, model in self.method.models().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method": self.method.state_dict(),
            "hooks": {hook.name: state for hook in self.hooks if (state := hook.state_dict())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.start_iter = state["iteration"]
        self._failure = state.get("dropped", "")
        for name, model in self.method.models().items():
            model.load_state_dict(state["models"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.method.load_state_dict(state["method"])
        for hook in self.hooks:
            hook.load_state_dict(state["hooks"].get(hook.name, {}))
