"""What the methods of detection have in common."""

from __future__ import annotations

from typing import Any

from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.parts import missing_ability
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.teacher import Teacher


class DetectionMethod(Method):
    """A method around a detector; its state is what the detector keeps outside its state dict.

    Attributes:
        needs: abilities that its detector has to have.

    Raises:
        ConfigError: the detector lacks one.
    """

    needs: frozenset[str] = frozenset()
    student: Detector

    def __init__(self, student: Detector, teacher: Teacher | None = None) -> None:
        for ability in sorted(self.needs - student.abilities):
            raise missing_ability(type(self).__name__, ability, student.name)
        super().__init__(student, teacher)

    def state_dict(self) -> dict[str, Any]:
        return self.student.outside_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_outside_state(state)
