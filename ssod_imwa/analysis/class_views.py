"""Sheets of what a classification method trains on: the views of an image side by side."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.build import statistics
from ssod_imwa.classification.task import ClassificationTask
from ssod_imwa.data.batches import Part
from ssod_imwa.visualization.pictures import contact_sheet


def class_view_sheets(cfg: CfgNode, *, images: int) -> dict[str, torch.Tensor]:
    """The first images of a run in the views that its method reads, as the network sees them.

    Args:
        cfg: of the run.
        images: at most so many of each stream.

    Returns:
        uint8 (3, H, W), by the name of its file: labeled_views.png and, if the method reads them,
        unlabeled_views.png.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.freeze()
    task = ClassificationTask(cfg)
    reads = task.build_method(task.device).reads
    schedule = EpisodeSchedule(task.cfg.SOLVER.MAX_ITER)
    batch = next(task.build_batches(schedule, task.device, reads)(0))
    return {
        f"{name}_views.png": _sheet(task, part, name, min(images, len(part)))
        for name, part in batch.items()
    }


def _sheet(task: ClassificationTask, part: Part, stream: str, count: int) -> torch.Tensor:
    mean, std = (torch.tensor(x)[:, None, None] for x in statistics(task.cfg))
    pictures, captions = [], []
    for i in range(count):
        label = int(part.targets[i])
        truth = task.classes[label] if label >= 0 else "class unknown"
        caption = f"image {int(part.indices[i])}, " + (
            truth if stream == "labeled" else f"unlabeled ({truth})"
        )
        for name, view in part.views.items():
            values = (view[i].cpu() * std + mean).clamp(0, 1)
            pictures.append((255 * values).round().to(torch.uint8))
            captions.append(f"{caption}: {name}")
    return contact_sheet(pictures, captions, group=len(part.views), cell=160)
