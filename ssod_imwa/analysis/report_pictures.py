"""What models of finished runs do on single test images, as a section of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from ssod_imwa.analysis.build import open_run
from ssod_imwa.analysis.commands import calibration, confusion
from ssod_imwa.analysis.detection import find_on_dataset
from ssod_imwa.analysis.report import Run
from ssod_imwa.analysis.sheets import detections_picture, evenly_spaced, truth_picture
from ssod_imwa.analysis.subjects import SUBJECTS
from ssod_imwa.data.registration import import_modules
from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, Detections
from ssod_imwa.detection.data.views import read_record
from ssod_imwa.detection.label_truth import judge_labels
from ssod_imwa.engine.checkpoint.models import newest_model
from ssod_imwa.errors import UserError
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.run import CONFIG_FILE
from ssod_imwa.visualization.page import Page
from ssod_imwa.visualization.pictures import contact_sheet

THRESHOLD = 0.5
SHOWN = 3  # images of each kind
MISTAKES = 12
CELL = 320  # pixels, longer side of a picture; keeps the page small


def add_examples(page: Page, runs: Sequence[Run], *, images: int) -> None:
    """Detections on telling test images, or a classifier's mistakes.

    What cannot be shown, because a model or its data are gone, is said in its place.

    Args:
        page: receives the section.
        runs: the first one is looked at, in detection beside the second.
        images: at most so many test images are looked at by a detector; a classifier sees all.
    """
    page.section("Examples")
    add = _add_detections if runs[0].results.task == "detection" else _add_classifications
    try:
        add(page, [run for run in runs if run.results.task == runs[0].results.task], images)
    except UserError as error:
        page.text(f"Left out: {error}")


@dataclass(frozen=True)
class _Seen:
    """A test set in the eyes of one or two models."""

    dataset: DetectionDataset
    truths: list[Annotations]
    names: list[str]
    findings: list[list[Detections]]


def agreement(first: Sequence[Detections], second: Sequence[Annotations]) -> np.ndarray:
    """F1 of each image's detections above the threshold with labels, float64 (N,).

    2 x right / (found + labeled), without what lies on objects that do not count; 1 where there is
    nothing in either.
    """
    scores = []
    for found, truth in zip(first, second, strict=True):
        judged = judge_labels([found], [truth], [found.scores > THRESHOLD])
        counted, labeled = int(judged.judged.sum()), len(judged.objects)
        right = int((judged.right & judged.judged).sum())
        scores.append(2 * right / (counted + labeled) if counted + labeled else 1.0)
    return np.array(scores)


def _add_detections(page: Page, runs: Sequence[Run], images: int) -> None:
    seen = _look(runs[:2], images)
    quality = agreement(seen.findings[0], seen.truths)
    order = np.argsort(quality, kind="stable")
    first = seen.names[0]
    page.text(
        f"Of {len(quality)} test images, detections with a score above {THRESHOLD:g}. An image's "
        "F1 is 2 x right / (found + labeled); right means the class and an overlap (IoU) of 0.5."
    )
    for words, positions in (
        (f"{first} is best on", order[::-1][:SHOWN]),
        (f"{first} is worst on", order[:SHOWN]),
    ):
        page.heading(words)
        _add_sheet(page, seen, positions, quality, models=[0])
    if len(seen.findings) > 1:
        as_truth = [_as_truth(found) for found in seen.findings[1]]
        apart = agreement(seen.findings[0], as_truth)
        page.heading(f"{first} and {seen.names[1]} disagree most on")
        chosen = np.argsort(apart, kind="stable")[:SHOWN]
        _add_sheet(page, seen, chosen, apart, models=[0, 1])


def _look(runs: Sequence[Run], images: int) -> _Seen:
    configs = [
        load_config(run.folder / CONFIG_FILE, ["OUTPUT_DIR", str(run.folder)]) for run in runs
    ]
    if not configs[0].DATASETS.TEST:
        raise UserError(f"the configuration of {runs[0].name} names no test set")
    import_modules(configs[0].DATASETS.IMPORT)
    name, root = configs[0].DATASETS.TEST[0], configs[0].DATASETS.ROOT
    dataset = load_dataset(name, root=root, on_bad_record=configs[0].DATASETS.ON_BAD_RECORD)
    dataset = dataset.subset(evenly_spaced(images, len(dataset)))
    findings, names = [], []
    for run, cfg in zip(runs, configs, strict=True):
        if cfg.DATASETS.TEST[:1] != [name]:  # nothing to compare
            continue
        by_id = find_on_dataset(cfg, newest_model(run.folder), dataset)
        findings.append([by_id[record.image_id] for record in dataset.records])
        names.append(run.name)
    truths = [record.annotations for record in dataset.records]
    return _Seen(dataset, [t for t in truths if t is not None], names, findings)


def _add_sheet(
    page: Page,
    seen: _Seen,
    positions: Sequence[int] | np.ndarray,
    scores: np.ndarray,
    *,
    models: Sequence[int],
) -> None:
    pictures, captions, classes = [], [], seen.dataset.classes
    for i in positions:
        record = seen.dataset.records[i]
        image = read_record(record)
        pictures.append(truth_picture(image, seen.truths[i], classes))
        captions.append(f"{record.image_id}: {len(seen.truths[i])} labeled, F1 {scores[i]:.2f}")
        for model in models:
            found = seen.findings[model][i]
            pictures.append(detections_picture(image, found, classes, threshold=THRESHOLD))
            count = int((found.scores > THRESHOLD).sum())
            captions.append(f"{seen.names[model]}: {count} found")
    sheet = contact_sheet(pictures, captions, group=1 + len(models), columns=1, cell=CELL)
    beside = " and ".join(seen.names[model] for model in models)
    page.picture(sheet, words=f"Labels (dashed) beside detections of {beside}.")


def _as_truth(found: Detections) -> Annotations:
    """Detections above the threshold as if they were labels."""
    keep = (found.scores > THRESHOLD).numpy()
    nothing = np.zeros(int(keep.sum()), dtype=bool)
    return Annotations(found.boxes.numpy()[keep], found.labels.numpy()[keep], nothing, nothing)


def _add_classifications(page: Page, runs: Sequence[Run], images: int) -> None:
    run = open_run(runs[0].folder)
    findings: dict[str, Callable] = {"confusion": confusion, "calibration": calibration}
    for name, analyze in findings.items():
        question, seen = SUBJECTS[name]
        page.heading(f"{runs[0].name}: {question}")
        for figure in analyze(run).figures.values():
            page.figure(figure, words=seen)
    test = run.extract_test()
    probabilities = softmax(test.mean_logits, 1)
    predictions = probabilities.argmax(1)
    sure = np.where(predictions == test.labels, -1.0, probabilities.max(1))
    chosen = [int(i) for i in np.argsort(-sure, kind="stable")[:MISTAKES] if sure[i] >= 0]
    if not chosen:
        return
    dataset = run.task.data.tests[0]
    pictures = [dataset.image(i) for i in chosen]
    captions = [
        f"{run.classes[test.labels[i]]}, taken for {run.classes[predictions[i]]} ({sure[i]:.2f})"
        for i in chosen
    ]
    page.heading(f"{runs[0].name} is surest and wrong on")
    sheet = contact_sheet(pictures, captions, cell=CELL // 2)
    page.picture(sheet, words="Test images with their class, the predicted class and confidence.")
