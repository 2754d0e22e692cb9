"""Classification, as a run knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.averaging import soups
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.members import Rule
from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.classification import build, networks
from ssod_imwa.classification.data.build import build_data
from ssod_imwa.classification.data.catalog import image_fingerprint
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.feature_sets import FeatureDataset
from ssod_imwa.classification.data.images import ImagesInFiles, ImagesInMemory, open_images
from ssod_imwa.classification.data.imbalance import ImbalanceOptions
from ssod_imwa.classification.data.samplers import SUBSET
from ssod_imwa.classification.data.splits import labeled_among
from ssod_imwa.classification.data.subsets import report_short_classes
from ssod_imwa.classification.data.validation import check_readable
from ssod_imwa.classification.generations import GenerationOptions
from ssod_imwa.classification.keys import MergeOptions
from ssod_imwa.classification.labelers.build import UnlabeledImages
from ssod_imwa.classification.methods import build as methods
from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.methods.erm import ERMOptions
from ssod_imwa.classification.methods.expert_network import ContrastiveBranch
from ssod_imwa.classification.methods.mae import reconstruction_error
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.freezing import StageOptions, set_train_mode
from ssod_imwa.classification.models.mae import MaskedAutoencoder
from ssod_imwa.classification.models.vit import LayerDecayOptions, ViT, layer_decay_groups
from ssod_imwa.classification.prediction import FlipOptions, evaluate_classifier
from ssod_imwa.classification.tracking import (
    CLASSES_FILE,
    SNAPSHOT_FOLDER,
    ClassTrackingHook,
    SnapshotHook,
    TrackingOptions,
    snapshot_files,
)
from ssod_imwa.classification.training_loss import spread_over_classes, training_loss
from ssod_imwa.config.averaging import StoreOptions
from ssod_imwa.config.options import read_options
from ssod_imwa.config.shared import check_shared
from ssod_imwa.data.batches import Batch
from ssod_imwa.data.loader import (
    OnBadRecord,
    TestBatches,
    build_test_batches,
    build_train_batches,
)
from ssod_imwa.data.polling import Poll
from ssod_imwa.data.streams import Stream
from ssod_imwa.engine.device import pick_device
from ssod_imwa.engine.label_hook import LabelAdvice, LabelHook
from ssod_imwa.engine.label_statistics import LabelStatistics
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.modes import undisturbed
from ssod_imwa.engine.precise_bn import build_recomputation
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import ConfigError
from ssod_imwa.task import (
    Batches,
    Evaluator,
    Recompute,
    Task,
    check_batch_sizes,
    evaluate_sets,
    image_counts,
)

ADVICE = LabelAdvice(
    label="label",
    none="a threshold above the network's confidence (lower CLS.LABELER.THRESHOLD), a network that "
    "has learned too little yet (wait), or too few labeled images (add some)",
    many="none: an image has one label at most",
    missing="a network that takes the class for a more frequent one (CLS.LOSS.NAME "
    "balanced_softmax, or another CLS.LABELER.NAME), or unlabeled images without it",
)


class ClassificationTask(Task):
    """Training and test images of a configuration, and the classifier trained on them.

    Raises:
        UserError: the configuration or the data are wrong.
    """

    name = "classification"

    def __init__(self, cfg: CfgNode, ranks: Ranks = Ranks.alone()) -> None:
        super().__init__(cfg, ranks)
        self.data = build_data(cfg)
        build.check_features(cfg, self.data)
        for test in self.data.tests:
            check_readable(test)  # else found when the first episode is over
        self._opened: dict[str, ImagesInFiles | ImagesInMemory] = {}
        train = self.data.train
        self.cfg = build.with_iterations(cfg, train)
        check_shared(self.cfg, "CLS.SCHEDULE")
        self.device = pick_device(cfg.MODEL.DEVICE)
        self.method = methods.method_name(cfg)
        if cfg.CLS.SAMPLER.NAME == SUBSET:
            report_short_classes(train.classes, train.counts, cfg.CLS.SAMPLER.PER_CLASS)
        imbalance = read_options(ImbalanceOptions, cfg.CLS.IMBALANCE)
        ratio = f" at ratio {imbalance.ratio:g}" if imbalance.ratio else ""
        if imbalance.profile == "step" and ratio:
            ratio += " (step)"
        tests = ", ".join(test.name for test in self.data.tests)
        self.dataset = f"{train.name}{ratio}{self._unlabeled_words()}, tested on {tests}"

    def _unlabeled_words(self) -> str:
        images = self.data.unlabeled
        return "" if images is None else f" with {len(images)} unlabeled images of {images.name}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.train.classes

    @property
    def class_counts(self) -> list[int]:
        return self.data.train.counts

    @property
    def images(self) -> dict[str, int]:
        return image_counts(self.data.train, self.data.unlabeled, self.data.tests)

    @property
    def stored_size(self) -> int | None:
        test = self.data.tests[0]
        if test.images is None or isinstance(test, FeatureDataset):
            return None
        return test.images.shape[-1]

    def build_method(self, device: torch.device) -> Method:
        networks.check_weights(self.cfg)
        return self._build_method(device, self.cfg.MODEL.WEIGHTS)

    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Streams and views that batches of the method hold, see `Method`, whatever its weights."""
        return self._build_method(torch.device("cpu"), weights="").reads

    def _build_method(self, device: torch.device, weights: str) -> Method:
        train = self.data.train
        model = networks.build_model(self.cfg, len(train.classes), weights=weights)
        unlabeled = self._unlabeled_images()
        method = methods.build_method(self.cfg, model.to(device), train.counts, unlabeled)
        if unlabeled is not None:
            method.label_statistics = LabelStatistics(len(train.classes))
        return method

    @property
    def initialization(self) -> tuple[int | str, ...]:
        generation = read_options(GenerationOptions, self.cfg.CLS.get("CREST")).generation
        return ("generation", generation) if generation > 1 else ()

    def _unlabeled_images(self) -> UnlabeledImages | None:
        unlabeled = self.data.unlabeled
        if unlabeled is None:
            return None
        is_joint = self.cfg.CLS.UNLABELED.MEMBERSHIP == "joint"
        return UnlabeledImages(
            len(unlabeled),
            self.data.labeled_counts,
            also_labeled=labeled_among(unlabeled, self.data.labeled) if is_joint else None,
            knows_truth=bool((unlabeled.labels >= 0).any()),
        )

    def method_settings(self, method: Method) -> dict[str, Any]:
        return methods.method_settings(self.cfg, method, self.data.train.counts)

    @property
    def _stage(self) -> CfgNode | None:
        return self.cfg.CLS.get("STAGE")

    def load_model(self, weights: str) -> nn.Module:
        cfg = self.cfg
        network = networks.build_model(cfg, len(self.data.train.classes), weights="")
        is_mae = cfg.CLS.ALGORITHM == "mae"
        model = methods.build_autoencoder(cfg, network) if is_mae else network
        networks.load_weights(model, weights)
        return model

    def _open(self, stream: str, dataset: ClassificationDataset) -> ImagesInFiles | ImagesInMemory:
        """The images of a training set, opened once for all members: they may fill the memory."""
        if stream not in self._opened:
            self._opened[stream] = open_images(dataset, self.device)
        return self._opened[stream]

    def build_batches(
        self, schedule: EpisodeSchedule, device: torch.device, reads: Mapping[str, tuple[str, ...]]
    ) -> Batches:
        cfg = self.cfg
        check_batch_sizes(cfg, self.ranks.batch.size)
        return build_train_batches(
            self._build_streams(reads),
            schedule,
            self.ranks.batch,
            seed=cfg.SEED,
            first_member=cfg.IMWA.FIRST_MEMBER,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            on_bad_record=cfg.DATASETS.ON_BAD_RECORD,
            pin_memory=device.type == "cuda",
            own=[self.configured(each)._build_streams(reads) for each in self.own],
        )

    def _build_streams(self, reads: Mapping[str, tuple[str, ...]]) -> list[Stream]:
        return build.build_streams(self.cfg, self.data, reads, self._open)

    def build_evaluator(
        self, processes: Group | None = None, *, poll: Poll | None = None
    ) -> Evaluator:
        together = processes or self.ranks.run
        return lambda model: evaluate_sets(
            self.data.tests, partial(self._evaluate, model, processes=together, poll=poll)
        )

    def _evaluate(
        self,
        model: nn.Module,
        test: ClassificationDataset,
        *,
        processes: Group,
        poll: Poll | None,
    ) -> dict[str, float]:
        batches = self.test_batches(test, processes)
        if isinstance(model, MaskedAutoencoder):
            return reconstruction_error(model, batches, processes, poll=poll)
        return evaluate_classifier(
            model,
            batches,
            processes,
            classes=test.classes,
            train_counts=self.data.labeled_counts,
            group_rule=self.cfg.CLS.GROUP_RULE,
            flip=read_options(FlipOptions, self.cfg.TEST).flip,
            post_hoc_tau=self.cfg.TEST.POST_HOC_TAU,
            poll=poll,
        )

    def hooks(self) -> list[HookBase]:
        cfg, folder = self.cfg, Path(self.cfg.OUTPUT_DIR)
        hooks: list[HookBase] = []
        if self.data.unlabeled is not None:
            counts = self.data.labeled_counts
            hooks.append(
                LabelHook(
                    *(self.classes, counts),
                    labeled_images=sum(counts),
                    period=cfg.LOG_PERIOD,
                    advice=ADVICE,
                )
            )
        first = cfg.IMWA.FIRST_MEMBER
        period = read_options(TrackingOptions, cfg.CLS).track_period
        if period:
            train, test = self.data.train, self.data.tests[0]
            hooks.append(
                ClassTrackingHook(
                    folder / CLASSES_FILE,
                    self.plain_train_batches(processes=self.ranks.batch),
                    self.test_batches(test, self.ranks.batch),
                    classes=len(train.classes),
                    period=period,
                    seed=cfg.SEED,
                    first_member=first,
                )
            )
        period = cfg.CLS.SNAPSHOT_PERIOD
        if period:
            hooks.append(SnapshotHook(folder / SNAPSHOT_FOLDER, period=period, first_member=first))
        return hooks

    def leftovers(self) -> Sequence[Path]:
        cfg, folder = self.cfg, Path(self.cfg.OUTPUT_DIR)
        is_tracked = read_options(TrackingOptions, cfg.CLS).track_period > 0
        rows = [] if is_tracked else [folder / CLASSES_FILE]
        weights = {} if cfg.CLS.SNAPSHOT_PERIOD else snapshot_files(folder / SNAPSHOT_FOLDER)
        return [*rows, *weights.values()]

    def test_batches(
        self, dataset: ClassificationDataset, processes: Group | None = None
    ) -> TestBatches:
        """Batches of a data set as it is tested: not augmented, in order.

        Args:
            dataset: to be read.
            processes: those that share its images; None takes all.
        """
        return self._plain_batches(dataset, open_images(dataset, self.device), "error", processes)

    def unlabeled_batches(self) -> TestBatches:
        """Batches of the unlabeled images, not augmented, in order, by DATASETS.ON_BAD_RECORD."""
        unlabeled = self.data.unlabeled
        assert unlabeled is not None  # for methods that have some
        images = self._open("unlabeled", unlabeled)
        return self._plain_batches(unlabeled, images, self.cfg.DATASETS.ON_BAD_RECORD, None)

    def plain_train_batches(
        self, positions: np.ndarray | None = None, *, processes: Group | None = None
    ) -> TestBatches:
        """Batches of training images, not augmented, in order, by DATASETS.ON_BAD_RECORD.

        Args:
            positions: of the images; None takes all.
            processes: those that share them; None takes all.
        """
        train = self.data.train
        images = self._open("labeled", train)
        if positions is not None:
            train = train.subset(positions)
            images = open_images(train, self.device)
        return self._plain_batches(train, images, self.cfg.DATASETS.ON_BAD_RECORD, processes)

    def _plain_batches(
        self,
        dataset: ClassificationDataset,
        images: ImagesInFiles | ImagesInMemory,
        on_bad_record: OnBadRecord,
        processes: Group | None,
    ) -> TestBatches:
        return build_test_batches(
            images,
            build.build_test_view(self.cfg, dataset),
            processes or self.ranks.run,
            batch_size=self.cfg.TEST.IMS_PER_BATCH,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            on_bad_record=on_bad_record,
            pin_memory=self.device.type == "cuda",
        )

    def build_bn_recomputation(self, batches: Batches, *, count: int) -> Recompute:
        part = read_options(StageOptions, self._stage).part
        move_statistics = read_options(ERMOptions, self._stage).move_statistics

        def set_mode(model: nn.Module) -> None:
            # MoCo's key network is no classifier, but holds experts as one does.
            network = model.deployed if isinstance(model, ContrastiveBranch) else deployed(model)
            if isinstance(network, ImageClassifier | Experts):  # an autoencoder has no batch norms
                set_train_mode(network, part, move_statistics=move_statistics)

        def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
            if "unlabeled" not in batch:
                return deployed(model)(batch["labeled"].views["image"])
            # FixMatch's network sees all views of both streams in one batch.
            views = [view for part in batch.values() for view in part.views.values()]
            return deployed(model)(torch.cat(views))

        return build_recomputation(batches, count=count, set_train_mode=set_mode, forward=classify)

    def build_training_loss(self, images: int) -> Callable[[nn.Module], float]:
        train = self.data.train
        chosen = train.subset(spread_over_classes(train.labels.numpy(), images))
        batches = build_test_batches(
            open_images(chosen, self.device),
            build.build_test_view(self.cfg, chosen),
            batch_size=self.cfg.TEST.IMS_PER_BATCH,
            on_bad_record=self.cfg.DATASETS.ON_BAD_RECORD,
        )
        return partial(training_loss, batches=list(batches))

    def fingerprints(self) -> dict[str, Any]:
        prints = {"training images": image_fingerprint(self.data.train)}
        if self.data.unlabeled is not None:
            prints["unlabeled images"] = image_fingerprint(self.data.unlabeled)
        return prints

    def lr_factor(self, name: str) -> float:
        return build.lr_factor(self.cfg, name)

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]] | None:
        decay, solver = read_options(LayerDecayOptions, self._stage).layer_decay, self.cfg.SOLVER
        if decay == 1:
            return None
        if not isinstance(student, ViT):
            raise ConfigError(
                f"CLS.STAGE.LAYER_DECAY = {decay:g} is not allowed with several experts (must be "
                "1.0)"
            )
        factor = read_options(StageOptions, self._stage).classifier_lr
        for key, value, only in (
            ("CLS.STAGE.CLASSIFIER_LR", factor, 1.0),
            ("SOLVER.WEIGHT_DECAY_NORM", solver.WEIGHT_DECAY_NORM, 0.0),
        ):
            if value != only:
                raise ConfigError(
                    f"{key} = {value:g} is not allowed with CLS.STAGE.LAYER_DECAY = {decay:g} "
                    f"(must be {only})"
                )
        return layer_decay_groups(
            student, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, layer_decay=decay
        )

    def coefficients(self, method: Method) -> Sequence[float] | Rule | None:
        merge = read_options(MergeOptions, self.cfg.CLS).merge
        if merge == "mean":
            return super().coefficients(method)
        if self.cfg.IMWA.COEFFICIENTS:
            raise ConfigError(
                f"IMWA.COEFFICIENTS = {self.cfg.IMWA.COEFFICIENTS} is not allowed with CLS.MERGE = "
                f"{merge!r} (must be []: it weighs members itself)"
            )
        store = read_options(StoreOptions, self.cfg.IMWA).store
        if store != "dict":
            raise ConfigError(
                f"IMWA.STORE = {store!r} is not allowed with CLS.MERGE = {merge!r} "
                "(must be 'dict': it looks at every member)"
            )
        rule, mean = merge.split("_")
        metric = soups.metric_of(
            {"student": method.student},
            partial(self._balanced_mean, method.student, f"{mean}_mean"),
        )
        return partial(soups.greedy if rule == "greedy" else soups.proportional, metric=metric)

    def _balanced_mean(self, model: nn.Module, name: str) -> float:
        """H- or G-mean on the union of the members' balanced subsets (BTM)."""
        cfg, train = self.cfg, self.data.train
        first = cfg.IMWA.FIRST_MEMBER
        subsets = [
            build.member_subset(cfg, train, member)
            for member in range(first, first + cfg.IMWA.MEMBERS)
        ]
        positions = np.unique(np.concatenate(subsets))
        with undisturbed(model), torch.no_grad():
            metrics = evaluate_classifier(
                model,
                self.plain_train_batches(positions),
                self.ranks.run,
                classes=train.classes,
                train_counts=train.counts,
            )
        return metrics[name]
