"""When the models of a run are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import Position
from ssod_imwa.engine.evaluation import EvaluationHook, Evaluations
from ssod_imwa.engine.lawa import LawaHook
from ssod_imwa.engine.writers import Writer
from ssod_imwa.task import Evaluator


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
    cfg: CfgNode,
    evaluations: Evaluations,
    polling: Evaluator,
    to_end: Evaluator,
    writers: Sequence[Writer],
    *,
    replaces: Callable[[Position], bool],
    lawa: LawaHook | None = None,
) -> EvaluationHooks:
    """What TEST asks for.

    Args:
        cfg: of the run.
        evaluations: receives the records.
        polling: an evaluation that a signal may cut short.
        to_end: one that it may not.
        writers: receive a row for each evaluation.
        replaces: see `EvaluationHook`.
        lawa: has what is evaluated at the end of the run.
    """
    test = cfg.TEST
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
        polling,
        evaluations,
        stage="average",
        period=test.EVAL_EPISODES,
        writers=writers,
        replaces=replaces,
    )
    running = EvaluationHook(
        "running evaluation",
        polling,
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
        polling,
        evaluations,
        stage="lawa",
        period=0,
        writers=writers,
        weights=lawa.weights,
    )
    return EvaluationHooks(running, members, averages, of_last)
