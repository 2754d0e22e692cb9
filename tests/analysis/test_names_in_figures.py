"""Names that a user chose are shown as they are, wherever they get into a figure."""

import html
import io
import re

import matplotlib as mpl
import numpy as np
import pytest

from ssod_imwa.analysis.class_curves import TITLES, class_curves_figure
from ssod_imwa.analysis.class_figures import (
    class_numbers_figure,
    confusion_figure,
    embedding_figure,
    experts_figure,
    recall_figure,
)
from ssod_imwa.analysis.report import _classes_figure, _gains_figure, _overlay
from ssod_imwa.analysis.weight_space import interpolation_figure
from ssod_imwa.runs.gains import average_gains
from ssod_imwa.runs.results import Evaluation, Results
from ssod_imwa.visualization.label_plots import labels_figure
from ssod_imwa.visualization.plots import (
    classes_figure,
    course_figure,
    episodes_figure,
    training_figure,
)

# Formulas that cannot be read, and what a legend would leave out.
NAMES = ["$a_$", r"\$b^$", "_c"]
COUNTS = np.array([200, 50, 5])
NUMBERS = np.array([0.5, 0.2, 0.9])
METRIC = "folder:$x_$/AP"


def evaluations():
    for t, stage, member in ((4, "running", 0), (8, "member", 0), (8, "member", 1)):
        yield Evaluation("student", stage, 0, member, {METRIC: 1.0}, t, t)
    yield Evaluation("student", "final", 0, None, {METRIC: 2.0}, 9, 8)


RESULTS = Results(
    task="detection",
    dataset="folder:$x_$",
    method="supervised",
    imwa={"members": 2, "episodes": 1},
    seed=1,
    iterations=9,
    wall_time=1.0,
    peak_memory=1,
    evaluations=tuple(evaluations()),
)
GAINS = average_gains(RESULTS.evaluations, METRIC)
POINTS = np.arange(6.0).reshape(3, 2)
TRACKED = [{"member": 0, "t": 1, **{name: [0.5] * 3 for name in TITLES}}]
SHARES = {f"labels/share-{name}": 30.0 for name in NAMES}
STEPS = [{"iteration": 0, "total_loss": 1.0, "loss_$a_$": 1.0, "pseudo_$a_$": 1.0}]
LINE = {"loss": [1.0, 1.0], "top1": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("figure", "names"),
    [
        (recall_figure(NUMBERS, COUNTS, NAMES), NAMES),
        (confusion_figure(np.eye(3, dtype=int), NAMES), NAMES),
        (class_numbers_figure({"n": NUMBERS}, COUNTS, NAMES), NAMES),
        (experts_figure({(0, 1): NUMBERS}, COUNTS, NAMES), NAMES),
        (embedding_figure(POINTS, np.arange(3), NAMES, COUNTS), [*NAMES, "_c (5)"]),
        (
            class_curves_figure(TRACKED, COUNTS, NAMES, iterations_per_epoch=1),
            ["most frequent: $a_$ (200 images)"],
        ),
        (_classes_figure(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 3), "AP"), NAMES),
        (_overlay(NAMES, [[(1, 1.0)]] * 3, METRIC), [*NAMES, METRIC]),
        (_gains_figure(RESULTS, METRIC, GAINS), [f"gain in {METRIC} (points)"]),
        (episodes_figure(RESULTS), [f"{METRIC} (%)"]),
        (course_figure(RESULTS), [f"{METRIC} (%)", "supervised on folder:$x_$, seed 1"]),
        (training_figure(STEPS), ["loss_$a_$", "pseudo $a $"]),
        (classes_figure(NAMES, {"_$x_$": [9, 2, 1]}, what="boxes"), [*NAMES, "_$x_$"]),
        (labels_figure([{"iteration": 0, "labels/per_image": 1.0, **SHARES}], {}), NAMES),
        (
            interpolation_figure([0, 1], LINE, names=("$a_$", "b")),
            ["(1 − λ) A + λ B:  A = $a_$,  B = b"],
        ),
    ],
)
def test_a_name_is_no_formula(figure, names):
    shown = texts(figure)
    assert [name for name in names if name not in shown] == []


def texts(figure):
    """What is written on a figure, without the spaces around it."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    found = re.findall(r"<text[^>]*>([^<]*)</text>", buffer.getvalue())
    return {html.unescape(text).strip() for text in found}
