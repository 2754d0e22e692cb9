"""What happens around a training step: learning rate and averaging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import NonFiniteError


class LRHook(HookBase):
    """Sets the learning rate of each step from the member's own iteration t.

    Args:
        multiplier: t -> factor of each parameter group's `initial_lr`; see `solver.lr_multiplier`.
    """

    def __init__(self, multiplier: Callable[[int], float]) -> None:
        self.multiplier = multiplier

    @property
    def name(self) -> str:
        return "lr"

    def before_step(self) -> None:
        factor = self.multiplier(self.trainer.position.t)
        groups = self.trainer.optimizer.param_groups
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        # The largest: that of a pretrained part is a small share of it.
        lr = max(group["lr"] for group in groups)
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)


@dataclass(frozen=True)
class MemberSettings:
    """What a member trains with.

    Attributes:
        multiplier: of `LRHook`.
        groups: hyper-parameters of each of the optimizer's groups, such as `initial_lr`, `momentum`
            and `weight_decay`.
        method: see `Method.use`.
    """

    multiplier: Callable[[int], float]
    groups: Sequence[Mapping[str, Any]]
    method: Mapping[str, Any]


class MemberSettingsHook(LRHook):
    """Gives optimizer, learning rate and method the settings of the member that trains.

    Args:
        common: of the part of a run before members part.
        own: of each member.
    """

    def __init__(self, common: MemberSettings, own: Sequence[MemberSettings]) -> None:
        super().__init__(common.multiplier)
        self.common, self.own = common, own

    def before_step(self) -> None:
        # At every step: what a checkpoint or an average brings back is another step's.
        position = self.trainer.position
        settings = self.own[position.member] if position.members > 1 else self.common
        self.trainer.method.use(settings.method)
        groups = self.trainer.optimizer.param_groups
        for group, values in zip(groups, settings.groups, strict=True):
            group.update(values)
        self.multiplier = settings.multiplier
        super().before_step()


class IMWAHook(HookBase):
    """Lets IMWA swap members and average them around the trainer's steps.

    Args:
        imwa: of members in turn, or at once.
    """

    def __init__(self, imwa: IMWA | ParallelIMWA) -> None:
        self.imwa = imwa

    @property
    def name(self) -> str:
        return "imwa"

    def before_step(self) -> None:
        self.imwa.before_step(self.trainer.iter)

    def after_step(self) -> None:
        try:
            averaged = self.imwa.after_step(self.trainer.iter)
        except FloatingPointError as error:
            raise NonFiniteError(f"{error} (keys: SOLVER.BASE_LR, IMWA.NONFINITE)") from error
        if averaged:
            for name, distance in self.imwa.distances.items():
                self.trainer.storage.put_scalar(
                    f"imwa/distance-{name}", distance, smoothing_hint=False
                )

    def state_dict(self) -> dict[str, Any]:
        return self.imwa.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.imwa.load_state_dict(state)
