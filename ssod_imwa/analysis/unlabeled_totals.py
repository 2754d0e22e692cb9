"""How many unlabeled images of each class a run's networks see: the totals that DARP is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from ssod_imwa.analysis.build import Finding, TrainedRun, numbers_table
from ssod_imwa.analysis.class_figures import class_numbers_figure
from ssod_imwa.analysis.weight_commands import read_snapshot
from ssod_imwa.classification.data.build import build_data, build_held_out
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.labelers.darp_totals import soft_confusion, solve_totals
from ssod_imwa.classification.prediction import predict
from ssod_imwa.classification.tracking import SNAPSHOT_FOLDER, snapshot_files
from ssod_imwa.errors import UserError
from ssod_imwa.runs.config import load_config


def totals(run: TrainedRun, *, unlabeled: Sequence[str], per_class: int = 10) -> Finding:
    """CLS.LABELER.TOTALS of unlabeled images, the mean of what a run's snapshots say.

    Args:
        run: of labeled images alone, with snapshots and held-out images.
        unlabeled: configuration files of the run that will read the unlabeled images.
        per_class: held-out images of each class that are looked at; 10 in DARP's code.

    Raises:
        UserError: snapshots or images are missing, the unlabeled images are of another split, or no
            snapshot tells the classes apart well enough.

    Source: DARP's code, as the specification describes it.
    """
    held_out = _balanced(build_held_out(run.task.cfg), per_class)
    others = _unlabeled_images(run, unlabeled)
    files = snapshot_files(run.folder / SNAPSHOT_FOLDER)
    if not files:
        raise UserError(f"{run.folder} has no snapshots (train it with CLS.SNAPSHOT_PERIOD)")
    accepted = []
    for path in files.values():
        run.model.load_state_dict(read_snapshot(path))
        seen = _probabilities(run, held_out)
        confusion = soft_confusion(seen, held_out.labels.numpy(), classes=len(run.classes))
        solution = solve_totals(confusion, _probabilities(run, others).sum(0))
        if solution is not None:
            accepted.append(solution)
    if not accepted:
        raise UserError(
            f"none of {len(files)} snapshots of {run.folder} tells classes apart well enough "
            "(train longer, or hold out more images)"
        )
    estimate = np.mean(accepted, axis=0)
    return _finding(run, estimate, others, f"mean of {len(accepted)} of {len(files)} snapshots")


def _balanced(held_out: ClassificationDataset, per_class: int) -> ClassificationDataset:
    """The first images of each class, which come in the order of classes."""
    least = min(held_out.counts)
    if not 1 <= per_class <= least:
        raise UserError(
            f"--per-class = {per_class} is not allowed (must be 1..{least}, CLS.IMBALANCE.HOLD_OUT "
            "of the run)"
        )
    firsts = np.cumsum([0, *held_out.counts[:-1]])
    return held_out.subset((firsts[:, None] + np.arange(per_class)).ravel())


def _unlabeled_images(run: TrainedRun, files: Sequence[str]) -> ClassificationDataset:
    mine = run.task.cfg
    cfg = load_config(files, ["DATASETS.ROOT", mine.DATASETS.ROOT, "SEED", str(mine.SEED)])
    for name, one, other in (
        ("DATASETS.TRAIN", mine.DATASETS.TRAIN, cfg.DATASETS.TRAIN),
        ("CLS.IMBALANCE", mine.CLS.IMBALANCE, cfg.get("CLS", {}).get("IMBALANCE")),
    ):
        if one != other:
            raise UserError(
                f"--unlabeled: {name} of {', '.join(files)} is not that of {run.folder} (must be "
                "the same, else held-out images may be among the unlabeled)"
            )
    images = build_data(cfg).unlabeled
    if images is None:
        raise UserError(f"--unlabeled: {', '.join(files)} reads no unlabeled images")
    return images


def _probabilities(run: TrainedRun, images: ClassificationDataset) -> np.ndarray:
    logits, _ = predict(run.model, run.task.test_batches(images))
    return softmax(logits.astype(np.float64), 1)


def _finding(
    run: TrainedRun, estimate: np.ndarray, others: ClassificationDataset, how: str
) -> Finding:
    rounded = [max(1, round(x)) for x in estimate.tolist()]  # a total of 0 is refused
    numbers = {"estimated unlabeled images": estimate}
    if bool((others.labels >= 0).all()):
        numbers["unlabeled images"] = np.array(others.counts, dtype=float)
    rows = zip(run.classes, run.counts.tolist(), *numbers.values(), strict=True)
    table = numbers_table(
        f'{how}: CLS.LABELER.TOTALS "{rounded}"', ("class", "labeled", *numbers), rows
    )
    figure = class_numbers_figure(numbers, run.counts, run.classes, rule=run.group_rule)
    return Finding({"totals.png": figure}, [table])
