"""From the folder of a run to what analyses need: its data, its network, numbers of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from ssod_imwa.analysis.embedding import balanced_sample
from ssod_imwa.analysis.post_hoc import accuracies
from ssod_imwa.classification.build import iterations_per_epoch
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.features import Extracted, extract
from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.prediction import predict
from ssod_imwa.classification.task import ClassificationTask
from ssod_imwa.engine.checkpoint.models import check_classes, newest_model
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import UserError
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.run import CONFIG_FILE
from ssod_imwa.runs.schedule import build_schedule


@dataclass(frozen=True)
class Finding:
    """What an analysis shows.

    Attributes:
        figures: file name -> figure.
        tables: the numbers.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class TrainedRun:
    """A classification run that is looked at.

    Attributes:
        folder: its OUTPUT_DIR.
        weights: the file of the network.
        task: its data.
        model: the network that is shipped, in eval mode on the device of the task.
    """

    folder: Path
    weights: Path
    task: ClassificationTask
    model: nn.Module

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.task.data.train.classes

    @property
    def counts(self) -> np.ndarray:
        """Training images of each class with labels of their own, as in evaluation."""
        return np.array(self.task.data.labeled_counts)

    @property
    def group_rule(self) -> str:
        """How classes are grouped."""
        return self.task.cfg.CLS.GROUP_RULE

    @property
    def iterations_per_epoch(self) -> float:
        """As CLS.SCHEDULE.EPOCHS counts them."""
        return iterations_per_epoch(self.task.cfg, self.task.data.train)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.task.cfg.SEED

    def random(self, *purpose: int | str) -> np.random.Generator:
        """Random numbers that are a function of the run's seed and the purpose."""
        return counted_generator(self.seed, "analysis", *purpose)

    @cached_property
    def _test(self) -> Extracted:
        return extract(self.model, self.task.test_batches(self.task.data.tests[0]))

    def extract_test(self) -> Extracted:
        """Features and logits of the first test set, which is gone through once."""
        return self._test

    def extract_train(self) -> Extracted:
        """The same of the training images, not augmented."""
        return extract(self.model, self.task.plain_train_batches())


def open_run(
    folder: str | Path, *, weights: str | Path | None = None, overrides: Sequence[str] = ()
) -> TrainedRun:
    """Read a classification run's configuration, data and network.

    Args:
        folder: its OUTPUT_DIR.
        weights: file of the network; None takes the folder's final or newest averaged model.
        overrides: KEY VALUE pairs that change the run's configuration, such as DATASETS.TEST.

    Raises:
        UserError: it is not a classification run, something of it is missing, or the network was
            trained on other classes.
    """
    folder = Path(folder)
    # The folder may have been moved since it was written.
    cfg = load_config(folder / CONFIG_FILE, [*overrides, "OUTPUT_DIR", str(folder)])
    if cfg.TASK != "classification":
        raise UserError(f"{folder} is a run of {cfg.TASK} (must be one of classification)")
    weights = newest_model(folder) if weights is None else Path(weights)
    task = ClassificationTask(cfg)
    check_classes(weights, task.classes)
    model = deployed(task.load_model(str(weights))).to(task.device).eval()
    if not isinstance(model, ImageClassifier | Experts):
        raise UserError(
            f"{folder} has trained {type(model).__name__}, which does not classify (fine-tune it, "
            "and analyze that run)"
        )
    return TrainedRun(folder, weights, task, model)


def sample_of_test(run: TrainedRun, images: int) -> ClassificationDataset:
    """The first test set, or a balanced part of about so many images of it.

    Args:
        run: whose.
        images: 0 takes all.
    """
    test = run.task.data.tests[0]
    if images < 0:
        raise UserError(f"--images = {images} is not allowed (must be at least 0)")
    if images == 0 or images >= len(test):
        return test
    per_class = max(1, images // len(test.classes))
    chosen = balanced_sample(test.labels.numpy(), per_class, run.random("test sample"))
    return test.subset(chosen)


def build_evaluate(run: TrainedRun, images: int = 0) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a network in eval mode to its test loss and metrics in percent.

    Args:
        run: whose test images.
        images: see `sample_of_test`.
    """
    sample = sample_of_test(run, images)
    batches = run.task.test_batches(sample)

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits, labels = predict(model, batches)
        loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
        return {"loss": float(loss)} | percent(run, logits, labels)

    return evaluate


def percent(run: TrainedRun, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracies` in percent."""
    shares = accuracies(scores, labels, train_counts=run.counts, group_rule=run.group_rule)
    return {name: 100 * value for name, value in shares.items()}


def build_recompute(run: TrainedRun) -> Callable[[nn.Module], object]:
    """A function that re-estimates a network's batch norms as IMWA.BN recompute does."""
    cfg, task = run.task.cfg, run.task
    schedule = build_schedule(cfg)
    recompute = task.build_bn_recomputation(
        task.build_batches(schedule, task.device, task.reads()),
        count=min(cfg.IMWA.BN_BATCHES, len(schedule)),
    )
    return lambda model: recompute({"student": model})


def numbers_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose first column is text and whose numbers have the digits that matter."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(_digits(x) if isinstance(x, float) else str(x) for x in row))
    return table


def _digits(value: float) -> str:
    # :g would write numbers of images as 1.235e+04.
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"
