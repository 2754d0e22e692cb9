"""Keeps pytest's search for doctests away from modules whose toolkit is not installed."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("detectron2") is None:
    collect_ignore_glob = ["ssod_imwa/*/detectron2*"]  # its * also stands for folders
