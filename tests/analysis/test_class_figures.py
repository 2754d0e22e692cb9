import numpy as np
import pytest

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
from ssod_imwa.classification.evaluation import reliability_bins
from ssod_imwa.visualization.plots import MetricsError

COUNTS, NAMES = [50, 500, 5], ["cat", "dog", "owl"]


def line(axis, label):
    return next(x for x in axis.get_lines() if x.get_label() == label)


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def ticks(axis):
    return [text.get_text() for text in axis.get_xticklabels()]


def test_groups_are_those_of_the_metrics():
    assert groups_of([101, 100, 20, 19]) == ["many", "medium", "medium", "few"]
    assert groups_of([20], rule="mislas") == ["few"]
    assert frequency_order(COUNTS).tolist() == [1, 0, 2]


def test_reliability_has_a_bar_for_each_bin_and_the_gap_to_confidence():
    probabilities = np.array([[0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
    bins = reliability_bins(probabilities, np.array([0, 0, 1]), bins=2)
    upper, lower = reliability_figure(bins).axes
    accuracy, gaps = upper.containers
    assert accuracy[1].get_height() == pytest.approx(2 / 3)
    # Mean confidence 2.2 / 3, above the accuracy.
    assert gaps[1].get_y() == pytest.approx(2 / 3)
    assert gaps[1].get_y() + gaps[1].get_height() == pytest.approx(2.2 / 3)
    assert [bar.get_height() for bar in lower.containers[0]] == [0, 3]
    assert upper.get_title() == "ECE 6.67 %, largest gap 6.7 %"
    assert lower.get_xlabel() == "confidence (highest probability)"
    texts = [text.get_text() for text in reliability_figure(bins).legends[0].get_texts()]
    assert texts == ["calibrated", "accuracy", "gap to mean confidence"]
    assert line(upper, "calibrated").get_xydata().tolist() == [[0, 0], [1, 1]]


def images_of(figure):
    return [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()]


def test_confusion_is_shown_raw_in_shares_of_rows_and_on_a_log_scale():
    matrix = np.array([[8, 2, 0], [1, 4, 5], [0, 0, 0]])
    figure = confusion_figure(matrix, NAMES)
    raw, shares, logarithmic = images_of(figure)
    np.testing.assert_array_equal(raw, matrix)
    np.testing.assert_array_equal(np.asarray(shares)[:2], [[80, 20, 0], [10, 40, 50]])
    assert np.isnan(np.asarray(shares, dtype=float)[2]).all()  # no image of this class
    assert logarithmic.mask.tolist() == (matrix == 0).tolist()
    axis = figure.axes[0]
    assert ticks(axis) == NAMES
    assert axis.get_xlabel() == "predicted class, most frequent first"
    assert axis.get_ylabel() == "true class, most frequent first"
    assert sorted(text.get_text() for text in axis.texts) == ["1", "2", "4", "5", "8"]


def test_numbers_of_a_confusion_are_read_on_their_cells_in_light_and_dark_pages():
    figure = confusion_figure(np.array([[3, 4, 3], [2, 5, 3], [0, 0, 10]]), NAMES)
    shares = {text.get_text(): text.get_color() for text in figure.axes[1].texts}
    assert shares["100"] not in ("black", "#000000", "white")  # a page's own color is not black
    assert shares["50"] == "white"  # of 100, which is the brightest
    figure = confusion_figure(np.array([[3, 4, 3], [2, 5, 3], [3, 3, 4]]), NAMES)
    assert {text.get_color() for text in figure.axes[1].texts} == {"white"}


def test_confusion_of_many_classes_is_summed_in_blocks():
    matrix = np.arange(1000 * 1000).reshape(1000, 1000)
    figure = confusion_figure(matrix, [str(c) for c in range(1000)])
    raw = images_of(figure)[0]
    assert raw.shape == (200, 200)
    assert raw[3, 7] == matrix[15:20, 35:40].sum()
    assert figure.axes[0].get_xlabel() == "predicted class, most frequent first (blocks of 5)"
    # The tick of class 200 stands at block 40.
    assert ticks(figure.axes[0]) == ["0", "200", "400", "600", "800"]
    assert figure.axes[0].get_xticks().tolist() == [0, 40, 80, 120, 160]


def test_recalls_go_from_the_most_to_the_least_frequent_class():
    recalls = np.array([0.5, 0.9, 0.0])
    figure = recall_figure(recalls, COUNTS, NAMES)
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.containers[0]] == [500, 50, 5]
    assert upper.get_yscale() == "log"
    assert ticks(lower) == ["dog", "cat", "owl"]
    dots = np.concatenate([x.get_offsets() for x in lower.collections if len(x.get_offsets())])
    shown = {(x, y) for x, y in dots.tolist() if (x, y) != (0, 0)}
    assert shown == {(0, 90), (1, 50), (2, 0)}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "many: 90.0 % (1 of 3 classes)",
        "medium: 50.0 % (1 of 3 classes)",
        "few: 0.0 % (1 of 3 classes)",
    ]
    assert lower.get_title() == "mean 46.7 %, classes with recall 0: 1"


def test_recalls_of_classes_without_test_images_are_left_out():
    figure = recall_figure(np.array([0.5, 0.9, np.nan]), COUNTS, NAMES)
    assert figure.axes[1].get_title() == "mean 70.0 %, classes with recall 0: 0"


def test_numbers_stand_against_training_images():
    numbers = {"accuracy (%)": np.array([50, 90, np.nan]), "norm": np.array([1.0, 2, 3])}
    figure = class_numbers_figure(numbers, COUNTS, NAMES)
    left, right = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["accuracy (%)", "norm"]
    assert left.get_xlabel() == "training images of the class"
    assert left.get_xscale() == "log"
    dots = {x.get_label(): x.get_offsets().tolist() for x in right.collections}
    assert dots == {
        "many: mean 2": [[500, 2]],
        "medium: mean 1": [[50, 1]],
        "few: mean 3": [[5, 3]],
    }
    assert sorted(text.get_text() for text in left.texts) == ["cat", "dog"]


def test_a_third_panel_takes_a_second_row():
    numbers = {name: np.ones(3) for name in "abc"}
    assert [x.get_ylabel() for x in class_numbers_figure(numbers, COUNTS, NAMES).axes] == [
        "a",
        "b",
        "c",
    ]


def test_pairs_of_experts_have_a_bar_for_each_class():
    distances = {(0, 1): np.array([1.0, 2, 3]), (0, 2): np.array([4.0, 5, np.nan])}
    axis = experts_figure(distances, COUNTS, NAMES).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert heights[0] == [2, 1, 3]
    assert heights[1][:2] == [5, 4]
    assert legend(axis) == ["experts 1 and 2: mean 2", "experts 1 and 3: mean 4.5"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == (
        "class, most frequent first",
        "mean distance of features",
    )


def test_many_classes_have_a_bar_for_each_group():
    counts = [500] * 10 + [50] * 20 + [5] * 10
    distances = {(0, 1): np.array([1.0] * 10 + [2.0] * 20 + [3.0] * 10)}
    axis = experts_figure(distances, counts, [str(c) for c in range(40)]).axes[0]
    assert [bar.get_height() for bar in axis.containers[0]] == [1, 2, 3]
    assert ticks(axis) == ["many", "medium", "few"]


def test_an_embedding_names_the_classes_that_are_in_it():
    points = np.array([[0.0, 0], [2, 2], [5, 5]])
    axis = embedding_figure(points, np.array([2, 2, 1]), NAMES, COUNTS).axes[0]
    assert legend(axis) == ["dog (500)", "owl (5)"]
    texts = {text.get_text(): text.get_position() for text in axis.texts}
    assert texts == {"dog": (5, 5), "owl": (1, 1)}
    assert axis.get_xlabel().startswith("t-SNE")


def rows(classes=3, members=2):
    return [
        {
            "member": member,
            "t": t,
            "accuracy": [0.1 * (member + 1) * t] * classes,
            "gradient_norm": [float(c) for c in range(classes)],
            "ratio": [1.0] * classes,
            "deviation": [None] + [0.5] * (classes - 1),
        }
        for member in range(members)
        for t in (1, 3)
    ]


def test_class_curves_have_a_line_for_each_class_and_a_column_for_each_member():
    figure = class_curves_figure(rows(), COUNTS, NAMES, iterations_per_epoch=2)
    panels = figure.axes[:8]
    assert [axis.get_ylabel() for axis in panels[::2]] == [
        "training accuracy (%)",
        "norm of feature gradients",
        "predicted as c / images of c",
        "feature deviation dis(c)",
    ]
    assert [axis.get_title() for axis in panels[:2]] == ["member 1", "member 2"]
    assert panels[-1].get_xlabel() == "epochs of a member"
    second = panels[1].get_lines()
    assert len(second) == 3
    np.testing.assert_allclose(second[0].get_xydata(), [[1, 20], [2, 60]])
    # Lines in the order of frequency: the classes 1, 0, 2.
    assert [x.get_ydata()[0] for x in panels[2].get_lines()] == [1, 0, 2]
    assert np.isnan(panels[6].get_lines()[1].get_ydata()).all()  # class 0 has none
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["most frequent: dog (500 images)", "least frequent: owl (5 images)"]
    assert figure.axes[8].get_ylabel() == "training images of the class"


def test_many_classes_are_drawn_in_ten_bands():
    counts = np.arange(100, 0, -1)
    figure = class_curves_figure(
        rows(100, 1), counts, [str(c) for c in range(100)], iterations_per_epoch=2
    )
    norms = [x.get_ydata()[0] for x in figure.axes[1].get_lines()]
    np.testing.assert_allclose(norms, 4.5 + 10 * np.arange(10))
    # The first band has class 0, which is missing: the mean is of the others.
    assert figure.axes[3].get_lines()[0].get_ydata()[0] == pytest.approx(0.5)


def test_rows_of_other_classes_are_a_users_error():
    with pytest.raises(MetricsError, match="no rows of classes"):
        class_curves_figure([], COUNTS, NAMES, iterations_per_epoch=2)
    with pytest.raises(MetricsError, match="are not of 3 classes"):
        class_curves_figure(rows(4), COUNTS, NAMES, iterations_per_epoch=2)


EQUAL = [7, 7, 7]  # step data can have groups of one size


@pytest.mark.parametrize(
    "make",
    [
        lambda: reliability_figure(reliability_bins(np.array([[0.6, 0.4]]), np.array([0]))),
        lambda: confusion_figure(np.eye(3, dtype=int), NAMES),
        lambda: confusion_figure(np.zeros((3, 3), dtype=int), NAMES),
        lambda: recall_figure(np.zeros(3), EQUAL, NAMES),
        lambda: class_curves_figure(rows(members=1), EQUAL, NAMES, iterations_per_epoch=2),
    ],
    ids=["reliability", "confusion", "no images", "recall", "curves"],
)
def test_figures_can_be_written(make, tmp_path):
    make().savefig(tmp_path / "a.png", dpi=20)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
