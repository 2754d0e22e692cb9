"""Keeps pytest's search for doctests away from modules whose toolkit is not installed."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("detectron2") is None:
    collect_ignore_glob = [
        "ssod_imwa/integrations/detectron2/*",
        "ssod_imwa/detection/detectors/detectron2.py",
    ]
