"""From a configuration to members that label for each other."""

from __future__ import annotations

from ssod_imwa.config.averaging import StoreOptions
from ssod_imwa.config.options import read_options
from ssod_imwa.engine.cross_teaching import CrossTeachingHook
from ssod_imwa.engine.method import Method
from ssod_imwa.errors import ConfigError
from ssod_imwa.task import Task


def build_cross_teaching(task: Task, method: Method) -> list[CrossTeachingHook]:
    """What lends members each other's teachers, if IMWA.CROSS_TEACH says so; sets the rule.

    Raises:
        ConfigError: the method has no teacher, or its labels do not go with the rule.
    """
    rule = task.cfg.IMWA.CROSS_TEACH
    if rule == "none":
        return []
    allowed = ("none", *(method.cross_teaches if method.teacher is not None else ()))
    if rule not in allowed:
        reason = "" if method.teacher is not None else ": it has no teacher"
        raise ConfigError(
            f"IMWA.CROSS_TEACH = {rule!r} is not allowed with {task.method!r} (must be one of "
            f"{', '.join(map(repr, allowed))}{reason})"
        )
    method.cross_teach = rule
    return [CrossTeachingHook(read_options(StoreOptions, task.cfg.IMWA).store_device)]
