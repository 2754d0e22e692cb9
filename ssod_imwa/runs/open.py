"""From a configuration to the task that it names."""

from __future__ import annotations

from collections.abc import Callable

from fvcore.common.config import CfgNode

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.task import ClassificationTask
from ssod_imwa.detection.task import DetectionTask
from ssod_imwa.runs.config import member_configs
from ssod_imwa.task import Task

TASKS: dict[str, Callable[[CfgNode, Ranks], Task]] = {
    "detection": DetectionTask,
    "classification": ClassificationTask,
}


def open_task(cfg: CfgNode, ranks: Ranks = Ranks.alone()) -> Task:
    """The task of TASK with its data.

    Args:
        cfg: the configuration.
        ranks: what `launch` hands its processes.

    Raises:
        UserError: the configuration or the data are wrong.
    """
    task = TASKS[cfg.TASK](cfg, ranks)
    task.own = member_configs(task.cfg)
    return task
