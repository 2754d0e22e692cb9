from ssod_imwa.visualization.label_plots import has_labels, labels_figure

CLASSES = ("a", "b")


def rows(count, *, with_truth=True):
    made = []
    for i in range(count):
        row = {"iteration": 10 * i + 9, "labels/per_image": 1.0 + i, "labels/empty_images": 5.0}
        row |= {"labels/share-a": 80.0 - i, "labels/share-b": 20.0 + i}
        row |= {f"labels/scores-0.{tenth}": 10.0 for tenth in range(10)}
        if with_truth:
            row |= {"labels/precision": 90.0, "labels/recall": 50.0}
        made.append(row)
    return [{"iteration": 0, "total_loss": 1.0}, *made]


def heights(axis, label):
    (bars,) = [c for c in axis.containers if c.get_label() == label]
    return [bar.get_height() for bar in bars]


def test_only_rows_with_labels_count():
    assert not has_labels([{"total_loss": 1.0}])
    assert has_labels(rows(1))


def test_courses_go_by_the_global_step():
    number, quality, _, _ = labels_figure(rows(3), {}).axes
    (line,) = number.lines
    assert line.get_xdata().tolist() == [10, 20, 30]
    assert line.get_ydata().tolist() == [1, 2, 3]
    assert [line.get_label() for line in quality.lines] == [
        "labels that are true",
        "true objects with a label",
        "images without a label",
    ]


def test_without_truth_there_is_no_line_of_it():
    _, quality, _, _ = labels_figure(rows(3, with_truth=False), {}).axes
    assert [line.get_label() for line in quality.lines] == ["images without a label"]


def test_shares_stand_beside_those_of_the_labeled_objects_the_most_frequent_first():
    """Of ten rows the last two are the run's end: shares of a are 72 and 71."""
    _, _, classes, _ = labels_figure(rows(10), {"a": 1, "b": 3}).axes
    assert [tick.get_text() for tick in classes.get_xticklabels()] == ["b", "a"]
    assert heights(classes, "of the teacher's labels") == [28.5, 71.5]
    assert heights(classes, "of the labeled objects") == [75, 25]


def test_scores_are_drawn_for_the_beginning_and_the_end():
    *_, scores = labels_figure(rows(10), {}).axes
    assert heights(scores, "beginning") == heights(scores, "end of the run") == [10.0] * 10


def test_a_last_row_without_labels_hides_no_class():
    silent = {"iteration": 99, "labels/per_image": 0.0, "labels/empty_images": 100.0}
    _, _, classes, scores = labels_figure([*rows(9), silent], {}).axes
    assert [tick.get_text() for tick in classes.get_xticklabels()] == ["a", "b"]
    # Of the last two rows one is silent: it has no shares, which would not be 0.
    assert heights(classes, "of the teacher's labels") == [72, 28]
    assert heights(scores, "end of the run") == [10.0] * 10
