"""Analyses of one run's network on its images, each with figures and a table.

Every function takes a run of `open_run` first; metrics are in percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from torch import nn

from ssod_imwa.analysis.build import Finding, TrainedRun, numbers_table, percent
from ssod_imwa.analysis.class_curves import class_curves_figure
from ssod_imwa.analysis.class_figures import (
    class_numbers_figure,
    confusion_figure,
    embedding_figure,
    experts_figure,
    frequency_order,
    groups_of,
    recall_figure,
    reliability_figure,
)
from ssod_imwa.analysis.embedding import balanced_sample, spread_classes, tsne
from ssod_imwa.analysis.post_hoc import (
    adjustment_sweep,
    nearest_mean_scores,
    tau_norm_sweep,
)
from ssod_imwa.analysis.weight_space import tau_figure, title_of
from ssod_imwa.classification.evaluation import (
    class_recalls,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_bins,
)
from ssod_imwa.classification.features import expert_distances, feature_deviation
from ssod_imwa.classification.gradients import by_class, measure_reaction
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.heads import ScaledClassifier
from ssod_imwa.classification.tracking import CLASSES_FILE
from ssod_imwa.errors import UserError
from ssod_imwa.visualization.plots import read_metrics

MOST_ROWS = 20
"""Classes up to which a table has a row for each; above, for each group."""

ADJUSTMENTS = np.arange(0, 2.01, 0.1).round(1)  # ECL finds the best τ at 1.2 to 1.3


def calibration(run: TrainedRun, *, bins: int = 15) -> Finding:
    """Whether a confidence of p means to be right with probability p."""
    test = run.extract_test()
    try:
        reliability = reliability_bins(softmax(test.mean_logits, 1), test.labels, bins=bins)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    ece, mce = expected_calibration_error(reliability), maximum_calibration_error(reliability)
    rows = [
        (f"{i / bins:.2f} to {(i + 1) / bins:.2f}", int(n), 100 * float(conf), 100 * float(right))
        for i, (n, conf, right) in enumerate(
            zip(reliability.images, reliability.confidence, reliability.accuracy, strict=True)
        )
        if n
    ]
    title = f"ECE {100 * ece:.2f} %, largest gap {100 * mce:.2f} %, {bins} bins"
    header = ("confidence", "images", "mean confidence (%)", "accuracy (%)")
    return Finding(
        {"calibration.png": reliability_figure(reliability)}, [numbers_table(title, header, rows)]
    )


def confusion(run: TrainedRun) -> Finding:
    """Which classes are taken for which."""
    test = run.extract_test()
    order = frequency_order(run.counts)
    matrix = confusion_matrix(test.labels, test.mean_logits.argmax(1), labels=order)
    names = [run.classes[c] for c in order]
    wrong = matrix * (1 - np.eye(len(order), dtype=int))
    rows = [
        (names[i], names[j], int(wrong[i, j]), 100 * float(wrong[i, j] / matrix[i].sum()))
        for i, j in (
            divmod(int(k), len(order)) for k in (-wrong).ravel().argsort(kind="stable")[:10]
        )
        if wrong[i, j]
    ]
    header = ("true class", "predicted as", "images", "of the class's (%)")
    table = numbers_table("the most frequent mistakes", header, rows)
    return Finding({"confusion.png": confusion_figure(matrix, names)}, [table])


def classes(run: TrainedRun) -> Finding:
    """How recall goes with the number of training images, and each class's way through training."""
    test = run.extract_test()
    predictions = test.mean_logits.argmax(1)
    recalls = class_recalls(predictions, test.labels, classes=len(run.classes))
    figures = {
        "recall.png": recall_figure(recalls, run.counts, run.classes, rule=run.group_rule),
    }
    if (path := run.folder / CLASSES_FILE).exists():
        figures["class_curves.png"] = class_curves_figure(
            read_metrics(path),
            run.counts,
            run.classes,
            iterations_per_epoch=run.iterations_per_epoch,
        )
    metrics = percent(run, test.mean_logits, test.labels)
    metrics["lowest recall"] = 100 * float(np.nanmin(recalls))
    metrics["classes with recall 0"] = int((recalls == 0).sum())
    rows = [(title_of(name), value) for name, value in metrics.items()]
    table = numbers_table("on the test images", ("metric", "% (or classes)"), rows)
    return Finding(figures, [table])


def features(run: TrainedRun, *, group: str | None = None) -> Finding:
    """Training accuracy, feature gradients, classification ratio and feature deviation (MFW)."""
    try:
        reaction = measure_reaction(run.model, run.task.plain_train_batches(), group=group)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    test = run.extract_test()
    reactions = by_class(reaction, classes=len(run.classes))
    deviation = feature_deviation(
        reaction.features,
        reaction.labels,
        test.joined_features,
        test.labels,
        classes=len(run.classes),
        generator=run.random("deviation"),
    )
    numbers = {
        "training accuracy (%)": 100 * reactions.accuracy,
        "mean norm of feature gradients": reactions.gradient_norm,
        "predicted as c / images of c": reactions.ratio,
        "feature deviation dis(c)": deviation,
    }
    figure = class_numbers_figure(numbers, run.counts, run.classes, rule=run.group_rule)
    header = ["class", "images", "accuracy (%)", "gradient norm", "ratio", "deviation"]
    table = _class_table(run, "on the training images", header, numbers)
    return Finding({"features.png": figure}, [table])


def _class_table(
    run: TrainedRun, title: str, header: list[str], numbers: Mapping[str, np.ndarray]
) -> Table:
    order = frequency_order(run.counts)
    columns = [run.counts, *numbers.values()]
    if len(order) <= MOST_ROWS:
        rows = [
            [run.classes[c], int(run.counts[c]), *(float(x[c]) for x in columns[1:])] for c in order
        ]
        return numbers_table(title, header, rows)
    groups = np.array(groups_of(run.counts, rule=run.group_rule))
    rows = [
        [group, *(float(np.nanmean(x[groups == group])) for x in columns)]
        for group in dict.fromkeys(groups[order])
    ]
    return numbers_table(f"{title}, means of groups", ["classes", *header[1:]], rows)


def experts(run: TrainedRun) -> Finding:
    """How far apart the experts' features are, and what each expert is worth alone (ECL)."""
    if not (isinstance(run.model, Experts) and run.model.num_experts > 1):
        raise UserError(f"{run.folder} has one network (experts need CLS.MODEL.EXPERTS >= 2)")
    test = run.extract_test()
    distances = expert_distances(test.features, test.labels, classes=len(run.classes))
    figure = experts_figure(distances, run.counts, run.classes, rule=run.group_rule)
    alone = {f"expert {k}": x for k, x in enumerate(test.logits, start=1)}
    metrics = {
        name: percent(run, logits, test.labels)
        for name, logits in {**alone, "all": test.mean_logits}.items()
    }
    header = ["", *map(title_of, metrics["all"])]
    rows = [[name, *numbers.values()] for name, numbers in metrics.items()]
    pairs = [
        (f"{m + 1} and {n + 1}", float(np.nanmean(values))) for (m, n), values in distances.items()
    ]
    return Finding(
        {"experts.png": figure},
        [
            numbers_table("accuracy on the test images (%)", header, rows),
            numbers_table("distance of features", ("experts", "mean over classes"), pairs),
        ],
    )


def embedding(
    run: TrainedRun, *, images: int = 50, classes: int = 10, perplexity: float = 30.0
) -> Finding:
    """Test images in the plane, by t-SNE of their features."""
    for name, value in {"images": images, "classes": classes, "perplexity": perplexity}.items():
        if value < 1:
            raise UserError(f"--{name} = {value} is not allowed (must be at least 1)")
    test = run.extract_test()
    drawn = spread_classes(run.counts, classes)
    among = np.flatnonzero(np.isin(test.labels, drawn))
    chosen = among[balanced_sample(test.labels[among], images, run.random("embedding"))]
    labels = test.labels[chosen]
    try:
        points = tsne(test.joined_features[chosen], seed=run.seed % 2**32, perplexity=perplexity)
    except ValueError as error:
        options = f"--images {images} --classes {classes}"
        raise UserError(f"test images of {run.folder} with {options}: {error}") from error
    rows = [(run.classes[c], int(run.counts[c]), int((labels == c).sum())) for c in drawn]
    return Finding(
        {"embedding.png": embedding_figure(points, labels, run.classes, run.counts)},
        [numbers_table("shown", ("class", "training images", "test images"), rows)],
    )


def tau(run: TrainedRun) -> Finding:
    """What post-hoc decisions gain: logit adjustment, τ-normalized weights, nearest class means."""
    test, train = run.extract_test(), run.extract_train()
    options: dict[str, Any] = {"train_counts": run.counts, "group_rule": run.group_rule}
    swept = {
        "logit adjustment": adjustment_sweep(test.mean_logits, test.labels, ADJUSTMENTS, **options)
    }
    if test.logits.ndim == 3:
        for k, logits in enumerate(test.logits, start=1):
            name = f"logit adjustment, expert {k}"
            swept[name] = adjustment_sweep(logits, test.labels, ADJUSTMENTS, **options)
    if (linear := _linear_classifier(run.model)) is not None:
        swept["τ-normalized classifier"] = tau_norm_sweep(
            test.features, test.labels, linear, ADJUSTMENTS, **options
        )
    means = nearest_mean_scores(
        train.joined_features, train.labels, test.joined_features, classes=len(run.classes)
    )
    nearest = percent(run, means, test.labels)
    swept = {
        title: {name: 100 * values for name, values in sweep.items()}
        for title, sweep in swept.items()
    }
    figure = tau_figure(
        {title: (ADJUSTMENTS, sweep) for title, sweep in swept.items()},
        constant={"nearest class mean": nearest["top1"]},
    )
    header = ["decision", "best τ", *map(title_of, nearest)]
    rows = [["as trained", "", *percent(run, test.mean_logits, test.labels).values()]]
    for title, sweep in swept.items():
        best = int(sweep["top1"].argmax())
        rows.append([title, float(ADJUSTMENTS[best]), *(float(x[best]) for x in sweep.values())])
    rows.append(["nearest class mean", "", *nearest.values()])
    title = "accuracy on the test images (%), τ chosen on them, too"
    return Finding({"tau.png": figure}, [numbers_table(title, header, rows)])


def _linear_classifier(model: nn.Module) -> nn.Linear | None:
    """Whose weights can be normalized: none for cosines, which are, and for several experts."""
    classifier = getattr(model, "classifier", None)
    if isinstance(classifier, ScaledClassifier) and isinstance(classifier.classifier, nn.Linear):
        return classifier.folded()
    return classifier if isinstance(classifier, nn.Linear) else None
