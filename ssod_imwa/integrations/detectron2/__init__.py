"""For detectron2 projects: IMWA as a hook, our keys in their config, data sets in either catalog.

Needs detectron2, which is installed by its own guide (docs/detectron2.md).
"""

from ssod_imwa.integrations.detectron2.catalog import register_in_detectron2, run_evaluator
from ssod_imwa.integrations.detectron2.config import add_ssod_imwa_config
from ssod_imwa.integrations.detectron2.hook import IMWAHook

__all__ = ["IMWAHook", "add_ssod_imwa_config", "register_in_detectron2", "run_evaluator"]
