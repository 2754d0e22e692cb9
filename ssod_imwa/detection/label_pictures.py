"""Pictures of what a teacher teaches, as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import draw_bounding_boxes, make_grid

from ssod_imwa.config.options import Options, option
from ssod_imwa.detection.data.records import Detections, View
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.engine.trainer import HookBase

FOLDER = "pseudo_labels"
MOST_IMAGES = 8
SHORTEST_SIDE = 320  # pixels


@dataclass(frozen=True)
class PictureOptions(Options):
    """How often pseudo-labels are drawn."""

    picture_period: int = option(
        0,
        "own iterations between two pictures of unlabeled images with the teacher's labels "
        "(pseudo_labels/); 0 draws none",
        low=0,
        iterations=True,
        free=True,
    )


class LabelPictureHook(HookBase):
    """Draws weak views of the current unlabeled batch with the labels that were learned.

    Args:
        folder: for `member0_t0000499.png` and so on, counted from 0.
        classes: names in label order.
        period: own iterations of a member between two pictures.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str], *, period: int) -> None:
        self._folder = Path(folder)
        self._classes = tuple(classes)
        self._period = period

    @property
    def name(self) -> str:
        return "pseudo-label pictures"

    def after_step(self) -> None:
        position, method = self.trainer.position, self.trainer.method
        is_silent = self.trainer.has_dropped or not self.trainer.speaks_for_member
        if (position.t + 1) % self._period or is_silent:
            return
        assert isinstance(method, DetectionMethod)  # the task registers no other
        views, labels = method.last_labels
        if not views:  # still in burn-in
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"member{position.member}_t{position.t:07d}.png"
        picture = draw_labels(views[:MOST_IMAGES], labels[:MOST_IMAGES], self._classes)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def draw_labels(
    views: Sequence[View], labels: Sequence[Detections], classes: Sequence[str]
) -> torch.Tensor:
    """Views side by side, each with its labels, their names and scores: uint8 (3, H, W).

    Small views are enlarged by a whole factor, for texts to be smaller than boxes.
    """
    shortest = min(min(view.image.shape[1:]) for view in views)
    scale = max(1, SHORTEST_SIDE // shortest)
    height = scale * max(view.image.shape[1] for view in views)
    width = scale * max(view.image.shape[2] for view in views)
    drawn = []
    for view, item in zip(views, labels, strict=True):
        image = view.image.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        if len(item):
            pairs = zip(item.labels.tolist(), item.scores.tolist(), strict=True)
            texts = [f"{classes[label]} {score:.2f}" for label, score in pairs]
            image = draw_bounding_boxes(
                image, scale * item.boxes.cpu(), texts, colors="yellow", width=2
            )
        page = torch.full((3, height, width), 255, dtype=torch.uint8)
        page[:, : image.shape[1], : image.shape[2]] = image
        drawn.append(page)
    return make_grid(drawn, nrow=4, padding=4, pad_value=255)
