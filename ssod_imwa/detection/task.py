"""Detection, as a run knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.data.batches import Batch
from ssod_imwa.data.loader import build_test_batches
from ssod_imwa.data.polling import Poll
from ssod_imwa.detection import build
from ssod_imwa.detection.data.catalog import content_fingerprint
from ssod_imwa.detection.data.images import DetectionImages
from ssod_imwa.detection.data.reports import class_counts
from ssod_imwa.detection.data.validation import check_readable
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.detection.label_pictures import FOLDER, LabelPictureHook
from ssod_imwa.detection.methods.supervised import images_and_targets
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.detection.training_loss import training_loss
from ssod_imwa.engine.label_hook import LabelAdvice, LabelHook
from ssod_imwa.engine.label_statistics import LabelStatistics
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.precise_bn import build_recomputation
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.task import Batches, Evaluator, Recompute, Task, image_counts

ADVICE = LabelAdvice(
    label="box",
    none="a threshold above the teacher's scores (lower SSOD.BBOX_THRESHOLD), a teacher that "
    "starts before it has learned enough (raise SSOD.BURN_IN_ITERS, or SSOD.RAMPUP_ITERS of a mean "
    "teacher), or too few labeled images (add some)",
    many="a threshold that lets background pass (raise SSOD.BBOX_THRESHOLD), unlabeled images of "
    "another kind (look at SSOD.PICTURE_PERIOD's pictures), or training that feeds on its own "
    "mistakes (lower SSOD.UNSUP_LOSS_WEIGHT)",
    missing="too few labeled objects of the class (add some), scores that stay below the threshold "
    "(lower SSOD.BBOX_THRESHOLD), or unlabeled images without it",
)
DENSE_ADVICE = LabelAdvice(
    label="box",
    none="a teacher that is sure of nothing yet (raise SSOD.BURN_IN_ITERS), or too few labeled "
    "images (add some)",
    many="a learning region that reaches beyond the objects (lower SSOD.REGION_RATIO), unlabeled "
    "images of another kind (look at SSOD.PICTURE_PERIOD's pictures), or training that feeds on "
    "its own mistakes (lower SSOD.UNSUP_LOSS_WEIGHT)",
    missing="too few labeled objects of the class (add some), a learning region that is full "
    "without it (raise SSOD.REGION_RATIO), or unlabeled images without it",
)


class DetectionTask(Task):
    """Labeled, unlabeled and test images of a configuration, and the detector trained on them.

    Raises:
        UserError: the configuration or the data are wrong.
    """

    name = "detection"

    def __init__(self, cfg: CfgNode, ranks: Ranks = Ranks.alone()) -> None:
        super().__init__(cfg, ranks)
        self.data = build.build_data(cfg)
        for test in self.data.tests:
            check_readable(test)  # else found when the first episode is over
        self.cfg = build.with_classes(cfg, self.data.labeled.classes)
        self.method = cfg.SSOD.ALGORITHM
        split = cfg.DATASETS.SPLIT
        share = f" {split.PERCENT:g} %" if split.PERCENT < 100 else ""
        self.fold = split.get("FOLD")
        names = [] if self.data.unlabeled is None else cfg.DATASETS.TRAIN_UNLABELED
        unlabeled = "".join(f" + {name}" for name in names)
        tests = ", ".join(test.name for test in self.data.tests)
        self.dataset = f"{'+'.join(cfg.DATASETS.TRAIN)}{share}{unlabeled}, tested on {tests}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.labeled.classes

    @property
    def class_counts(self) -> list[int]:
        return class_counts(self.data.labeled)

    @property
    def images(self) -> dict[str, int]:
        return image_counts(self.data.labeled, self.data.unlabeled, self.data.tests)

    def build_method(self, device: torch.device) -> Method:
        detector = build_detector(self.cfg, len(self.data.labeled.classes))
        method = build.build_method(self.cfg, detector.to(device))
        if self.data.unlabeled is not None:
            method.label_statistics = LabelStatistics(len(self.classes))
            method.hidden_truth = self.data.hidden_truth
        return method

    def method_settings(self, method: Method) -> dict[str, Any]:
        return build.method_settings(self.cfg)

    def load_model(self, weights: str) -> nn.Module:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = weights
        return build_detector(cfg, len(self.data.labeled.classes))

    def build_batches(
        self, schedule: EpisodeSchedule, device: torch.device, reads: Mapping[str, tuple[str, ...]]
    ) -> Batches:
        return build.build_batches(self.cfg, self.data, schedule, self.ranks, reads, own=self.own)

    def build_evaluator(
        self, processes: Group | None = None, *, poll: Poll | None = None
    ) -> Evaluator:
        processes = processes or self.ranks.run
        return build.build_evaluator(self.cfg, self.data.tests, processes, poll=poll)

    def build_bn_recomputation(self, batches: Batches, *, count: int) -> Recompute:
        def learn(model: Detector, batch: Batch) -> object:
            # Of all that the method reads of labeled images, strong views before weak ones.
            views = reversed(batch["labeled"].views.values())
            images, targets = images_and_targets([view for same in views for view in same])
            return model(images, SupervisedLoss(targets))

        return build_recomputation(
            batches, count=count, set_train_mode=lambda model: model.train(), forward=learn
        )

    def build_training_loss(self, images: int) -> Callable[[nn.Module], float]:
        labeled = self.data.labeled
        count = min(images, len(labeled))
        chosen = labeled.subset([i * len(labeled) // count for i in range(count)])
        batches = build_test_batches(
            DetectionImages.labeled(chosen),
            build.build_test_view(self.cfg),
            batch_size=self.cfg.TEST.IMS_PER_BATCH,
            on_bad_record=self.cfg.DATASETS.ON_BAD_RECORD,
        )
        return partial(training_loss, batches=list(batches))

    def lr_factor(self, name: str) -> float:
        # A toolkit that makes its own backbones has its own keys for them.
        body = name.startswith("backbone.body.") and self.cfg.MODEL.TOOLKIT == "torchvision"
        return self.cfg.MODEL.BACKBONE.LR_FACTOR if body else 1.0

    def hooks(self) -> list[HookBase]:
        if self.data.unlabeled is None:
            return []
        cfg, labeled = self.cfg, self.data.labeled
        hooks: list[HookBase] = [
            LabelHook(
                self.classes,
                self.class_counts,
                labeled_images=len(labeled),
                period=cfg.LOG_PERIOD,
                advice=DENSE_ADVICE if "REGION_RATIO" in cfg.SSOD else ADVICE,
            )
        ]
        if cfg.SSOD.PICTURE_PERIOD:
            folder = Path(cfg.OUTPUT_DIR) / FOLDER
            hooks.append(LabelPictureHook(folder, self.classes, period=cfg.SSOD.PICTURE_PERIOD))
        return hooks

    def fingerprints(self) -> dict[str, Any]:
        labeled, unlabeled = self.data.labeled, self.data.unlabeled
        return {
            "labeled images": content_fingerprint(labeled),
            "unlabeled images": None if unlabeled is None else content_fingerprint(unlabeled),
        }
