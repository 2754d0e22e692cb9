"""Checkpoints that survive kills, full disks and flipped bits, and resume the run exactly.

An output directory holds three kinds of file, each with its digest in ``<name>.json``:

``model_0000123.pth``
    Everything to continue after global step 123; the newest and `keep` older ones. Of members that
    are trained at once it has the states of all.
``model_averaged.pth``
    Weights at the end of the newest finished episode, under "student" and "teacher".
``model_final.pth``
    The same at the end of the run.
``model_lawa.pth``
    The mean of the last averages, if it is asked for.

``last_checkpoint`` holds the newest one's name, as in detectron2. Resuming does not trust it: it
takes the newest file that is intact. Generator states are not saved: random numbers are counted
(`engine.seeding`), so the number of finished steps is also the position in the data.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ssod_imwa import __version__
from ssod_imwa.averaging.checks import nonfinite
from ssod_imwa.averaging.exchange import gather_nested
from ssod_imwa.engine.checkpoint import faults
from ssod_imwa.engine.checkpoint.atomic import (
    WriteError,
    damage,
    load_checkpoint,
    remove_checkpoint,
    remove_stale_temporaries,
    write_checkpoint,
)
from ssod_imwa.engine.checkpoint.compatibility import FORMAT, identity
from ssod_imwa.engine.checkpoint.output import (
    AVERAGED,
    FINAL,
    LAWA,
    POINTER,
    on_main,
    prepare_output,
    removed,
    resume_files,
    write_pointer,
)
from ssod_imwa.engine.checkpoint.plain import plain
from ssod_imwa.engine.checkpoint.resuming import CHECKPOINT_HOOK, resume
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import CheckpointError

__all__ = ["CheckpointHook", "prepare_output", "resume"]

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failed writes in a row after which training ends."""


class CheckpointHook(HookBase):
    """Writes checkpoints at ends of episodes, each `period` steps, at the last step and on call.

    It belongs after every hook whose state changes in `after_step`. All ranks hold it; the first
    one writes while the others wait. A failure to write is tried again after the next step, and
    raised after 3 in a row (at the last step all 3 at once).

    Args:
        directory: output directory.
        run: what makes two runs the same, as plain values by name (M, E, T, seed, batch sizes,
            world size, data set fingerprints, optimizer class, ...). `resume` compares all of it
            but "config", a text, "classes", names, and "stored_size", see `Task`, which are kept
            for the reader.
        period: global steps between checkpoints beside those at an episode's end; 0 is none.
        episodes: episodes from one checkpoint at an episode's end to the next.
        keep: older checkpoints kept beside the newest.
        overwrite: remove an earlier run's checkpoints from the directory after the first step.
        leftovers: other files of an earlier run, which are then removed, too.
        lawa: makes the live models the mean of the run's last averages, once it has ended; None if
            nobody asked for it.

    Raises:
        ValueError: an argument is out of range.
        CheckpointError: in training: writing failed for good, models or optimizer are not finite,
            or the directory holds checkpoints of an earlier run that is neither resumed nor
            overwritten.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        run: Mapping[str, Any],
        period: int = 0,
        episodes: int = 1,
        keep: int = 1,
        overwrite: bool = False,
        leftovers: Sequence[Path] = (),
        lawa: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        for argument, value in (("period", period), ("keep", keep)):
            if value < 0:
                raise ValueError(f"{argument} = {value} is not allowed (must be at least 0)")
        if episodes < 1:
            raise ValueError(f"episodes = {episodes} is not allowed (must be at least 1)")
        self.directory = Path(directory)
        self.run = plain(dict(run), "run")
        self.period = period
        self.episodes = episodes
        self.keep = keep
        self.overwrite = overwrite
        self.leftovers = leftovers
        self.lawa = lawa
        self.inexact: list[dict[str, Any]] = []
        self._seconds = 0.0
        self._started = time.monotonic()
        self._failures = 0
        self._written = -1
        self._infinite: list[str] = []
        self._abandoned: set[int] = set()

    @property
    def name(self) -> str:
        return CHECKPOINT_HOOK

    def before_train(self) -> None:
        self._started = time.monotonic()
        done = self.trainer.start_iter
        # Damaged files that resuming passed over, or a future that it went back from.
        self._abandoned = {step for step in resume_files(self.directory) if step >= done}
        if done == 0:
            self._refuse_other_run()
            # Constants such as attention masks; anything else that is not finite has diverged.
            self._infinite = nonfinite(self._tensors())
        else:
            self._on_main(lambda: self._complete(done - 1))

    def after_step(self) -> None:
        g = self.trainer.iter
        faults.reach(f"step:{g}")
        if self.overwrite and g == 0:
            self._on_main(self._remove_other_run)
        if self._is_last:
            self.save_now()
        elif self._is_due or self._failures:
            self.trainer.raise_if_failed()
            if not self._will_be_dropped():
                self._try()

    def save_now(self) -> None:
        """Write a checkpoint of the step just done, if there is none yet, trying up to 3 times.

        Of a member with weights that are not finite, which IMWA will drop, none is written: the run
        resumes from an earlier one.
        """
        self.trainer.raise_if_failed()
        if self._will_be_dropped():
            return
        while self._written != self.trainer.iter:
            self._try()

    @property
    def seconds(self) -> float:
        """How long the run has trained so far, interruptions left out."""
        return self._seconds + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "inexact": list(self.inexact),
            "infinite": list(self._infinite),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds = state.get("seconds", 0.0)
        self.inexact = list(state.get("inexact", []))
        self._infinite = list(state.get("infinite", []))

    @property
    def _is_last(self) -> bool:
        return self.trainer.iter == self.trainer.max_iter - 1

    @property
    def _is_due(self) -> bool:
        periodic = self.period > 0 and (self.trainer.iter + 1) % self.period == 0
        position = self.trainer.position
        number = self.trainer.schedule.number(position.episode)
        return periodic or (position.ends_episode and number % self.episodes == 0)

    def _on_main(self, function: Callable[[], None]) -> None:
        on_main(function, self.trainer.ranks.run)

    def _try(self) -> None:
        """One attempt to write; counts failures."""
        g = self.trainer.iter
        self._refuse_nonfinite()
        states = self._states()
        try:
            self._on_main(lambda: self._write(g, states))
        except WriteError as error:
            self._failures += 1
            if self._failures == MAX_FAILURES:
                if not self.directory.is_dir():
                    raise WriteError(removed(self.directory)) from error
                raise
            logger.warning("%s; trying again (failure %d)", error, self._failures)
        else:
            self._failures = 0
            self._written = g

    def _states(self) -> list[dict[str, Any]]:
        """The states of the members that are trained at once, on the first rank; [] elsewhere.

        Where members are trained in turn, or all ranks train one and the same, there is one state.
        """
        # On every rank: a hook's state may have to be gathered from all of them.
        state: dict[str, Any] = plain(self.trainer.state_dict(), "trainer")
        ranks, position = self.trainer.ranks, self.trainer.position
        if position.members == 1:
            return [state] if ranks.run.is_main else []
        if not ranks.batch.is_main:
            return []
        if not ranks.exchange.is_main:
            for hook in self.trainer.hooks:
                if hook.is_of_run:
                    state["hooks"].pop(hook.name, None)
            if position.ends_episode:
                del state["models"]  # the averages, equal on all ranks
        return gather_nested(state, ranks.exchange)

    def _refuse_nonfinite(self) -> None:
        """Keep the checkpoints that a state with NaN or infinity would evict."""
        run = self.trainer.ranks.run
        bad: list[str] = next(filter(None, run.all_gather(self._diverged())), [])
        if not bad:
            return

        def refuse() -> None:
            newest = next(iter(resume_files(self.directory).values()), None)
            raise CheckpointError(
                f"{bad[0]} is not finite after global step {self.trainer.iter + 1}, so no "
                f"checkpoint is written ({len(bad)} such tensors; the newest checkpoint is "
                f"{newest}; lower SOLVER.BASE_LR or clip gradients, "
                "SOLVER.CLIP_GRADIENTS.ENABLED True)"
            )

        self._on_main(refuse)

    def _will_be_dropped(self) -> bool:
        """Whether the live member has diverged and IMWA will drop it: the next one is finite."""
        if not self.trainer.may_drop or self.trainer.position.ends_member:
            return False
        bad = self._diverged()
        if not self.trainer.ranks.run.any_true(bool(bad)):
            return False
        logger.warning(
            "no checkpoint after global step %d: %s is not finite, and the member will be dropped",
            self.trainer.iter + 1,
            bad[0] if bad else "another rank's state",
        )
        return True

    def _diverged(self) -> list[str]:
        """Names of tensors that became NaN or infinite; of a member that was dropped all are."""
        if self.trainer.has_dropped and not self.trainer.position.ends_member:
            return []
        return [name for name in nonfinite(self._tensors()) if name not in self._infinite]

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The live tensors of models and optimizer by name."""
        models, optimizer = self.trainer.method.models(), self.trainer.optimizer
        names = {p: f"{k}.{n}" for k, m in models.items() for n, p in m.named_parameters()}
        return {
            f"{key}.{name}": tensor
            for key, model in models.items()
            for name, tensor in model.state_dict().items()
        } | {
            f"the optimizer's {entry} of {names.get(parameter, 'a parameter')}": tensor
            for parameter, state in optimizer.state.items()
            for entry, tensor in state.items()
            if isinstance(tensor, torch.Tensor)
        }

    def _write(self, g: int, states: list[dict[str, Any]]) -> None:
        path = self._path(g)
        state = {
            "format": FORMAT,
            "library": __version__,
            "torch": str(torch.__version__),
            "run": identity(self.run),
            "members_at_once": self.trainer.ranks.members,
            "trainer": states[0],
            "other_members": states[1:],
        }
        write_checkpoint(path, state)
        write_pointer(path)
        for name in self._model_files(g):
            self._write_models(name, g)
        self._remove_abandoned(g)
        self._retain(g)

    def _model_files(self, g: int) -> list[str]:
        """Names of the files of models that are written with the checkpoint of step g."""
        averaged = [AVERAGED] if self.trainer.schedule.position(g).ends_episode else []
        if g != self.trainer.max_iter - 1:
            return averaged
        return [*averaged, FINAL, *([] if self.lawa is None else [LAWA])]

    def _write_models(self, name: str, g: int) -> None:
        with self.lawa() if name == LAWA and self.lawa is not None else nullcontext():
            self._write_live_models(name, g)

    def _write_live_models(self, name: str, g: int) -> None:
        method = self.trainer.method
        position = self.trainer.schedule.position(g)
        models = method.models()
        recommended = method.inference_model(position.t)
        state = {
            "format": FORMAT,
            "library": __version__,
            **{key: plain(model.state_dict(), key) for key, model in models.items()},
            "inference_model": next(key for key, model in models.items() if model is recommended),
            "episode": position.episode,
            "global_step": g,
            "config": self.run.get("config", ""),
            "classes": self.run.get("classes", []),
            "stored_size": self.run.get("stored_size"),
        }
        write_checkpoint(self.directory / name, state | ({"final": True} if name == FINAL else {}))

    def _complete(self, g: int) -> None:
        """Do what a kill after the resume file of step g was written may have prevented."""
        if self.trainer.schedule.position(g).ends_episode:
            self._repair_models(g)
        if self._path(g).exists():  # not if it was resumed from another directory
            self._retain(g)

    def _repair_models(self, g: int) -> None:
        """Write the files of the episode that ended with step g if they are not on disk."""
        for name in self._model_files(g):
            path = self.directory / name
            reason = damage(path)
            if reason is None and load_checkpoint(path)["global_step"] != g:
                reason = "it is of another step"
            if reason is not None:
                logger.warning("%s is written again: %s", path, reason)
                self._write_models(name, g)

    def _retain(self, g: int) -> None:
        """Remove what `keep` does not cover; the checkpoint of step g is intact and stays."""
        older = [step for step in resume_files(self.directory) if step < g]
        for step in [step for step in older if step not in self._abandoned][self.keep :]:
            remove_checkpoint(self._path(step))
        for digest in self.directory.glob("model_*.pth.json"):
            if not digest.with_suffix("").exists():
                remove_checkpoint(digest.with_suffix(""))
        remove_stale_temporaries(self.directory)

    def _remove_abandoned(self, g: int) -> None:
        for step in sorted(self._abandoned - {g}):
            remove_checkpoint(self._path(step))
        self._abandoned = set()

    def _path(self, step: int) -> Path:
        return self.directory / f"model_{step:07d}.pth"

    def _refuse_other_run(self) -> None:
        def refuse() -> None:
            if not self.overwrite and (found := resume_files(self.directory)):
                newest = next(iter(found.values()))
                raise CheckpointError(
                    f"{newest} is of an earlier run, which is neither resumed nor overwritten"
                )

        self._on_main(refuse)

    def _remove_other_run(self) -> None:
        names = [path.name for path in resume_files(self.directory).values()]
        for name in (*names, AVERAGED, FINAL, LAWA, POINTER):
            if (self.directory / name).exists():
                logger.warning("removing %s of the overwritten run", self.directory / name)
                remove_checkpoint(self.directory / name)
        if there := [path for path in self.leftovers if path.exists()]:
            logger.warning("removing %s of the overwritten run (%d files)", there[0], len(there))
            for path in there:
                remove_checkpoint(path)
