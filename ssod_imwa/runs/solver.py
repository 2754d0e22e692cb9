"""The optimizer and the learning rate of a run, and what members have of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssod_imwa.config.options import read_options
from ssod_imwa.config.shared import AdamWOptions, SGDOptions
from ssod_imwa.engine.hooks import LRHook, MemberSettings, MemberSettingsHook
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.solver import build_optimizer
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.schedule import build_multiplier
from ssod_imwa.task import Task


def build_task_optimizer(task: Task, student: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of SOLVER over a student's parameters."""
    solver = task.cfg.SOLVER
    return build_optimizer(
        student,
        name=solver.OPTIMIZER,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        beta2=read_options(AdamWOptions, solver).beta2,
        nesterov=read_options(SGDOptions, solver).nesterov,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        decay_biases=solver.DECAY_BIASES,
        lr_factor=task.lr_factor,
        groups=task.parameter_groups(student),
    )


def build_lr_hook(task: Task, method: Method) -> LRHook:
    """What sets the learning rate, and all else that members have of their own.

    Args:
        task: of the run.
        method: of the run.

    Raises:
        ConfigError: a member's settings do not go with the method.
    """
    if not task.own:
        return LRHook(build_multiplier(task.cfg))
    own = []
    for member, cfg in enumerate(task.own):
        try:
            own.append(_settings(task.configured(cfg), method))
        except ConfigError as error:
            raise ConfigError(f"IMWA.MEMBER_OVERRIDES, member {member}: {error}") from error
    return MemberSettingsHook(_settings(task, method), own)


def _settings(task: Task, method: Method) -> MemberSettings:
    settings = task.method_settings(method)
    groups = build_task_optimizer(task, method.student).param_groups
    return MemberSettings(
        build_multiplier(task.cfg), [_without_parameters(x) for x in groups], settings
    )


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
