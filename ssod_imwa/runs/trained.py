"""A trained model's file together with the configuration of its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from ssod_imwa.engine.checkpoint.models import ModelFile, read_models
from ssod_imwa.runs.config import parse_config


@dataclass(frozen=True)
class TrainedModels(ModelFile):
    """The content of a model file, its configuration read.

    Attributes:
        config: of the run, with MODEL.WEIGHTS empty: the initial weights are no longer needed.
    """

    config: CfgNode


def read_trained(source: str | Path) -> TrainedModels:
    """Read a finished run's averaged models and configuration, given its OUTPUT_DIR or the file.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
        ConfigError: the configuration in it is not one of this version.
    """
    file = read_models(source)
    config = parse_config(file.content["config"], f"configuration in {file.path}").clone()
    config.defrost()
    config.MODEL.WEIGHTS = ""
    return TrainedModels(**vars(file), config=config)
