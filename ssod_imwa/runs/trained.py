"""A trained model's file together with the configuration of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint
from ssod_imwa.engine.checkpoint.models import ModelFile, read_models
from ssod_imwa.errors import UserError
from ssod_imwa.runs.config import parse_config


@dataclass(frozen=True)
class TrainedModels(ModelFile):
    """The content of a model file, its configuration read.

    Attributes:
        config: of the run, with MODEL.WEIGHTS empty: the initial weights are no longer needed; and
            DATASETS.IMPORT empty: a file of weights does not choose which code is run.
        modules: what DATASETS.IMPORT was.
        lazy_config: MODEL.DETECTRON2.CONFIG if it is a Python file of the user's, else "".
    """

    config: CfgNode
    modules: tuple[str, ...] = ()
    lazy_config: str = ""

    def require_asked(self, asked: Sequence[str], *, reads_data: bool) -> None:
        """Refuse to go on with code that the file names and the command line does not.

        Args:
            asked: modules and LazyConfigs that the command line names. It alone is imported, so
                that any module will do in place of the file's.
            reads_data: whether data sets are read, which `modules` may have to register.

        Raises:
            UserError: something is not asked for.
        """
        code = [self.lazy_config] if self.lazy_config else []
        if reads_data and all(name.endswith(".py") for name in asked):
            code += self.modules
        if missing := " ".join(name for name in code if name not in asked):
            raise UserError(
                f"the configuration in {self.path} names code to run: {missing} (a file of weights "
                f"does not choose it; if you trust it, give --import {missing})"
            )


def read_trained(source: str | Path) -> TrainedModels:
    """Read a finished run's averaged models and configuration, given its OUTPUT_DIR or the file.

    Nothing that it names is imported.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
        ConfigError: the configuration in it is not one of this version.
    """
    file = read_models(source)
    config = parse_config(file.content["config"], f"configuration in {file.path}").clone()
    config.defrost()
    config.MODEL.WEIGHTS = ""
    modules, config.DATASETS.IMPORT = config.DATASETS.IMPORT, []
    return TrainedModels(
        **vars(file), config=config, modules=tuple(modules), lazy_config=_lazy_config(config)
    )


def read_shipped(source: str | Path) -> TrainedModels:
    """Read a finished run's models, as `read_trained`, or an exported model.

    Raises:
        CheckpointError: the file is missing, damaged, or neither of the two.
        ConfigError: the configuration in it is not one of this version.
    """
    path = Path(source)
    content = None if path.is_dir() or damage(path) is not None else load_checkpoint(path)
    if not isinstance(content, Mapping) or not {"model", "config"} <= content.keys():
        return read_trained(source)
    config = parse_config(content["config"], f"configuration in {path}").clone()
    config.defrost()
    config.MODEL.WEIGHTS, config.DATASETS.IMPORT = "", []
    if config.TASK == "detection" and config.MODEL.TOOLKIT == "torchvision":
        _take_rgb(config)  # as exports do, whatever the run's detector took
    models = {"model": content["model"]}
    return TrainedModels(
        path, models, "model", dict(content), config, lazy_config=_lazy_config(config)
    )


def _take_rgb(config: CfgNode) -> None:
    """Describe the same detector with the inputs of its first convolution turned around."""
    if config.INPUT.FORMAT == "BGR":
        config.INPUT.FORMAT = "RGB"
        for name in ("PIXEL_MEAN", "PIXEL_STD"):  # in the order of the channels
            config.MODEL[name] = config.MODEL[name][::-1]


def _lazy_config(cfg: CfgNode) -> str:
    if cfg.TASK != "detection" or cfg.MODEL.TOOLKIT != "detectron2":
        return ""
    name = cfg.MODEL.DETECTRON2.CONFIG
    # One of the model zoo is detectron2's own code.
    return name if name.endswith(".py") and Path(name).is_file() else ""
