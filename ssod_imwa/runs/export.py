"""A finished run's model as files that its library loads without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssod_imwa.classification import export as classification
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.engine.checkpoint.atomic import make_room, write_checkpoint
from ssod_imwa.runs.trained import TrainedModels


def export_model(trained: TrainedModels, output: Path, *, asked: Sequence[str] = ()) -> str:
    """Write the model to evaluate and ship; the Python lines that load it.

    Args:
        trained: of a finished run.
        output: file to write; of a detectron2 detector a configuration is written beside it.
        asked: a LazyConfig of the user's that may be read.

    Raises:
        UserError: the model cannot be exported, a file cannot be written, the configuration's file
            is there already, or the model's file names code that is not asked for.
    """
    trained.require_asked(asked, reads_data=False)
    if trained.config.TASK == "detection":
        return _export_detector(trained, output)
    model = classification.trained_classifier(trained.config, trained)
    make_room(output)
    write_checkpoint(output, classification.exported_content(model, trained.config, trained))
    return classification.loading_code(model, trained.config, str(output))


def _export_detector(trained: TrainedModels, output: Path) -> str:
    cfg = trained.config
    detector = build_detector(cfg, num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    detector.load_weights(str(trained.path))
    sizes = cfg.INPUT
    make_room(output)
    return detector.export(
        output,
        min_size=sizes.MIN_SIZE_TEST,
        max_size=sizes.MAX_SIZE_TEST,
        about={"classes": list(trained.classes), "config": cfg.dump()},
    )
