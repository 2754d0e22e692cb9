"""When the models of a run are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ssod_imwa.averaging.episodes import Position
from ssod_imwa.engine.evaluation import EvaluationHook, Evaluations
from ssod_imwa.engine.lawa import LawaHook
from ssod_imwa.engine.writers import Writer
from ssod_imwa.task import Evaluator, Task


class EvaluationHooks(NamedTuple):
    """Hooks of the running models, of members at their ends, of averages, and of LAWA.

    Attributes:
        lawa: None where it is not asked for.
    """

    running: EvaluationHook
    members: EvaluationHook
    averages: EvaluationHook
    lawa: EvaluationHook | None


def build_evaluations(
    task: Task,
    evaluations: Evaluations,
    watch: Callable[..., Evaluator],
    poll: Callable[[], object],
    writers: Sequence[Writer],
    *,
    replaces: Callable[[Position], bool],
    lawa: LawaHook | None = None,
) -> EvaluationHooks:
    """What TEST asks for.

    Args:
        task: of the run.
        evaluations: receives the records.
        watch: makes an evaluator of the processes that share the test images and, if a signal may
            cut it short, of what looks for one; see `progress.watched`.
        poll: looks for a signal.
        writers: receive a row for each evaluation.
        replaces: see `EvaluationHook`.
        lawa: has what is evaluated at the end of the run.
    """
    test = task.cfg.TEST
    # An average is every rank's; a member only that of the ranks that train it.
    of_member, of_all = task.ranks.batch, task.ranks.run
    to_end = watch(of_member)
    members = EvaluationHook(
        "member evaluation",
        to_end,
        evaluations,
        stage="member",
        period=test.EVAL_EPISODES,
        writers=writers,
    )
    averages = EvaluationHook(
        "evaluation",
        watch(of_all, poll),
        evaluations,
        stage="average",
        period=test.EVAL_EPISODES,
        writers=writers,
        replaces=replaces,
    )
    running = EvaluationHook(
        "running evaluation",
        watch(of_member, poll),
        evaluations,
        stage="running",
        period=test.EVAL_PERIOD,
        writers=writers,
        instead=[*([members] if test.EVAL_MEMBERS else []), averages],
        evaluate_to_end=to_end,
        replaces=replaces,
    )
    if lawa is None:
        return EvaluationHooks(running, members, averages, None)
    of_last = EvaluationHook(
        "lawa evaluation",
        watch(of_all, poll),
        evaluations,
        stage="lawa",
        period=0,
        writers=writers,
        weights=lawa.weights,
    )
    return EvaluationHooks(running, members, averages, of_last)
