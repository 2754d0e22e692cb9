"""Continue a run exactly where a checkpoint was taken."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ssod_imwa.averaging.checks import checksum
from ssod_imwa.averaging.weights import named_state
from ssod_imwa.engine.checkpoint.atomic import WriteError, damage, digest_path, load_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import changes, check_format, identity, in_words
from ssod_imwa.engine.checkpoint.output import POINTER, on_main, resume_files, write_pointer
from ssod_imwa.engine.checkpoint.plain import plain
from ssod_imwa.engine.trainer import Trainer
from ssod_imwa.errors import CheckpointError

logger = logging.getLogger(__name__)

CHECKPOINT_HOOK = "checkpoint"
"""Name of `CheckpointHook`, under which its state and the record of inexact resumes are saved."""


def resume(
    trainer: Trainer,
    source: str | os.PathLike[str],
    run: Mapping[str, Any],
    *,
    allow_inexact: bool = False,
) -> Path | None:
    """Continue a run exactly where a checkpoint was taken; call it after all hooks are registered.

    Args:
        trainer: gets the state of the checkpoint.
        source: an output directory, whose newest intact checkpoint is taken, or one .pth file.
        run: the identity given to `CheckpointHook`.
        allow_inexact: continue although the identity changed; later checkpoints keep a record.

    Returns:
        The file, or None if the directory holds no checkpoint and nothing was changed.

    Raises:
        CheckpointError: every checkpoint is damaged, or the newest intact one belongs to another
            run or does not fit the models.
    """
    source = Path(source)
    find = _explicit if source.suffix == ".pth" else _newest_intact
    path = on_main(lambda: find(source), trainer.ranks.run)
    if path is None:
        return None
    state = load_checkpoint(path)
    record = _check_compatible(path, state, run, allow_inexact=allow_inexact)
    training = _of_member(path, state, trainer)
    if training["iteration"] > trainer.max_iter:
        raise CheckpointError(
            f"{path} has done {training['iteration']} global steps, the run has only "
            f"{trainer.max_iter}; start a new run in another OUTPUT_DIR"
        )
    if record:
        training["hooks"].setdefault(CHECKPOINT_HOOK, {}).setdefault("inexact", []).append(record)
    try:
        trainer.load_state_dict(training)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit this run: {_one_line(error)}") from error
    trainer.ranks.run.assert_equal(trainer.start_iter, "the resumed global step")
    weights = checksum(named_state(trainer.method.models()))
    trainer.ranks.batch.assert_equal(weights, "the checksum of the resumed weights")
    logger.info("resuming from %s after global step %d", path, trainer.start_iter)
    _warn_of_own_statistics(trainer)
    return path


def _of_member(path: Path, state: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """The part of a checkpoint with which this rank goes on.

    Raises:
        CheckpointError: its members were not trained as this run trains them.
    """
    saved, ranks = state.get("members_at_once", 1), trainer.ranks
    if saved != ranks.members:
        raise CheckpointError(
            f"{path} is of {_order(saved)}, which a run of {_order(ranks.members)} cannot continue "
            f"(set IMWA.PARALLEL {saved > 1} to go on, or start anew)"
        )
    first: dict[str, Any] = state["trainer"]
    others = state.get("other_members", [])
    if not others or ranks.member == 0:
        return first
    own: dict[str, Any] = others[ranks.member - 1]
    names = {hook.name for hook in trainer.hooks if hook.is_of_run} & first["hooks"].keys()
    of_run = {name: first["hooks"][name] for name in names}
    return {"models": first["models"], **own, "hooks": own["hooks"] | of_run}


def _order(at_once: int) -> str:
    return f"{at_once} members at once" if at_once > 1 else "members in turn"


def _warn_of_own_statistics(trainer: Trainer) -> None:
    """Say that a resume is not exact where every rank had running statistics of its own."""
    ranks, done = trainer.ranks.batch.size, trainer.start_iter
    if ranks == 1 or done == 0 or trainer.schedule.position(done - 1).ends_episode:
        return
    trainer.method.set_train_mode()  # frozen norms are none of these
    norms = [
        name
        for name, module in trainer.method.student.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.track_running_stats
        and module.training
    ]
    if norms:
        logger.warning(
            "this resume is not exact: inside an episode each of %d ranks has running statistics "
            "of its own in %d batch norms such as %s, and the checkpoint has those of rank 0 (at "
            "an episode's end, or with frozen norms, it would be)",
            ranks,
            len(norms),
            norms[0],
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _newest_intact(directory: Path) -> Path | None:
    reasons: list[str] = []
    for path in resume_files(directory).values():
        if (reason := damage(path)) is None:
            for passed_over in reasons:
                logger.warning("%s; falling back to %s", passed_over, path)
            _repair_pointer(path)
            return path
        reasons.append(f"{path} is damaged: {reason}")
    if reasons:
        raise CheckpointError(
            f"no checkpoint can be resumed ({'; '.join(reasons)}); restore one, or start again "
            "with --overwrite"
        )
    return None


def _explicit(path: Path) -> Path:
    reason = damage(path)
    if reason is not None and path.is_file() and not digest_path(path).exists():
        logger.warning("%s cannot be verified: %s", path, reason)
    elif reason is not None:
        raise CheckpointError(f"{path} cannot be resumed: {reason}")
    return path


def _repair_pointer(path: Path) -> None:
    pointer = path.with_name(POINTER)
    try:
        found = repr(pointer.read_text())
        if found == repr(path.name):
            return
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        found = f"not readable ({error})"
    logger.warning("%s is %s instead of %r: repaired", pointer, found, path.name)
    try:
        write_pointer(path)
    except WriteError as error:
        logger.warning("%s", error)


def _check_compatible(
    path: Path, state: Any, run: Mapping[str, Any], *, allow_inexact: bool
) -> dict[str, Any] | None:
    """A record of what changed since the checkpoint was written; None if nothing did."""
    if not isinstance(state, dict) or "trainer" not in state:
        raise CheckpointError(f"{path} is not a resume file of this library")
    check_format(path, state)
    found = changes(state["run"], identity(plain(dict(run), "run")))
    if not found:
        return None
    if not allow_inexact:
        raise CheckpointError(
            f"{path} belongs to a run that differs in {in_words(found)}; undo these changes, or "
            "continue inexactly with --allow-inexact-resume"
        )
    logger.warning("continuing %s inexactly; changed: %s", path, in_words(found))
    return {"global_step": state["trainer"]["iteration"], "changes": [tuple(c) for c in found]}
