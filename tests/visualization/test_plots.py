import json
import math
from dataclasses import replace

import numpy as np
import pytest

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.errors import OutputError
from ssod_imwa.runs.burn_in import BurnIn
from ssod_imwa.runs.results import Evaluation, Results, write_results
from ssod_imwa.visualization.plots import (
    MetricsError,
    classes_figure,
    course_figure,
    episodes_figure,
    read_metrics,
    run_figures,
    save_figures,
    training_figure,
)
from ssod_imwa.visualization.style import plain


def rows(members=2):
    """As the trainer writes them: every second step, evaluations in between."""
    schedule = EpisodeSchedule(12, episodes=3, members=members)
    found = []
    for g in range(1, len(schedule), 2):
        p = schedule.position(g)
        row = {"iteration": g, "episode": p.episode, "member": p.member, "t": p.t}
        row |= {"total_loss": 2.0 + p.t, "loss_cls": 1.0, "loss_box_reg": 1.0 + p.t, "lr": 0.01}
        if p.t >= 4:
            row |= {"loss_cls_pseudo": 0.5, "pseudo_boxes": 2.0, "pseudo_score": 0.9}
        found.append(row)
    evaluation = {"iteration": 7, "episode": 0, "member": None, "t": 3, "average/student/AP": 1.0}
    return [*found, evaluation]


def results(evaluations):
    return Results(
        task="detection",
        dataset="digits",
        method="unbiased_teacher",
        imwa={"members": 2, "episodes": 3},
        seed=1,
        iterations=12,
        wall_time=1.0,
        peak_memory=1,
        evaluations=tuple(evaluations),
    )


def line(axis, label):
    return next(x for x in axis.get_lines() if x.get_label() == label)


def test_rows_are_read_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"itera')
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2}]


@pytest.mark.parametrize(
    ("text", "message"), [('{"a": 1}\nx\n{"a": 2}\n', "line 2, is not JSON"), ("[1]\n", "line 1")]
)
def test_a_damaged_metrics_file_is_a_users_error(tmp_path, text, message):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(MetricsError, match=message):
        read_metrics(tmp_path / "metrics.json")
    with pytest.raises(MetricsError, match="cannot be read"):
        read_metrics(tmp_path / "none.json")
    (tmp_path / "metrics.json").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(MetricsError, match="is not UTF-8 text"):
        read_metrics(tmp_path / "metrics.json")


def test_curves_go_by_global_step_and_by_each_members_own_iteration():
    figure = training_figure(rows())
    left, right = figure.axes[0], figure.axes[1]
    assert left.get_xlabel() == right.get_xlabel() == ""  # shared, on the lowest panels
    assert figure.axes[-2].get_xlabel().startswith("global step")
    assert figure.axes[-1].get_xlabel().startswith("own iteration t")
    written = [row for row in rows() if "total_loss" in row]
    total = line(left, "total_loss")
    np.testing.assert_array_equal(total.get_xdata(), [row["iteration"] + 1 for row in written])
    np.testing.assert_array_equal(total.get_ydata(), [row["total_loss"] for row in written])
    members = [x for x in right.get_lines() if len(x.get_xdata())]
    for member, curve in enumerate(members):
        own = [row for row in written if row["member"] == member]
        np.testing.assert_array_equal(curve.get_xdata(), [row["t"] + 1 for row in own])
        np.testing.assert_array_equal(curve.get_ydata(), [2.0 + row["t"] for row in own])
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["member 1", "member 2"]


def test_panels_are_losses_rate_and_pseudo_labels():
    figure = training_figure(rows())
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == [
        "total loss",
        "losses",
        "pseudo-label losses",
        "learning rate",
        "pseudo-labels per image",
        "mean score of pseudo-labels",
    ]
    losses = [x.get_label() for x in figure.axes[2].get_lines()]
    assert losses == ["loss_box_reg", "loss_cls"]


def test_supervised_training_has_no_empty_panels():
    plain = [{"iteration": g, "t": g, "total_loss": 1.0, "loss_cls": 1.0} for g in range(3)]
    assert [x.get_ylabel() for x in training_figure(plain).axes] == ["total loss", "losses"]


def test_one_member_has_one_column_as_its_iterations_are_the_global_steps():
    figure = training_figure(rows(members=1))
    titles = [axis.get_ylabel() for axis in figure.axes]
    assert len(set(titles)) == len(titles) == 6
    assert figure.axes[-1].get_xlabel() == "iteration (optimizer steps)"


def test_the_learning_rate_starts_at_zero():
    rate = next(x for x in training_figure(rows()).axes if x.get_ylabel() == "learning rate")
    assert rate.get_ylim() == (0, pytest.approx(0.0105))  # above the curve's 0.01


def test_a_single_episode_has_a_single_tick():
    single = [Evaluation("student", "final", 0, None, {"AP": 10.0})]
    axis = episodes_figure(results(single)).axes[0]
    low, high = axis.get_xlim()
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


def test_a_loss_that_was_not_finite_leaves_a_gap():
    plain = [{"iteration": g, "t": g, "total_loss": None if g == 1 else 1.0} for g in range(3)]
    values = np.asarray(line(training_figure(plain).axes[0], "total_loss").get_ydata(), float)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False])


def test_metrics_without_training_are_a_users_error():
    with pytest.raises(MetricsError, match="no row with total_loss"):
        training_figure(rows()[-1:])


def evaluations():
    for episode in range(3):
        for member in range(2):
            metrics = {"AP": 10.0 * episode + member, "AP50": math.nan}
            yield Evaluation("student", "member", episode, member, metrics)
        metrics = {"AP": 10.0 * episode + 2, "AP50": 1.0}
        yield Evaluation("student", "average", episode, None, metrics)
        if episode:
            yield Evaluation("teacher", "average", episode, None, {"AP": 10.0 * episode + 3})


def test_episodes_show_averages_as_lines_and_members_as_dots():
    figure = episodes_figure(results(evaluations()))
    axis = figure.axes[0]
    assert [x.get_ylabel() for x in figure.axes] == ["AP (%)", "AP50 (%)"]
    assert axis.get_xlabel() == "episode"
    student = line(axis, "student, average")
    assert student.get_xydata().tolist() == [[1, 2], [2, 12], [3, 22]]
    assert line(axis, "teacher").get_xydata().tolist() == [[2, 13], [3, 23]]
    dots = {x.get_label(): x.get_offsets().tolist() for x in axis.collections}
    assert dots == {
        "student, member 1": [[1, 0], [2, 10], [3, 20]],
        "student, member 2": [[1, 1], [2, 11], [3, 21]],
    }
    assert "M = 2, E = 3, T = 12, seed 1" in figure.get_suptitle()


def test_the_common_part_is_episode_0_and_lawa_a_star():
    found = [
        Evaluation("student", "average", 0, None, {"AP": 1.0}, 3, 3),
        Evaluation("student", "final", 1, None, {"AP": 2.0}, 19, 11),
        Evaluation("student", "lawa", 1, None, {"AP": 3.0}, 19, 11),
    ]
    imwa = {"members": 2, "episodes": 1, "start": 1 / 3}
    (axis,) = episodes_figure(replace(results(found), imwa=imwa)).axes
    assert line(axis, "student").get_xydata().tolist() == [[0, 1], [1, 2]]
    assert line(axis, "student, LAWA").get_xydata().tolist() == [[1, 3]]
    assert axis.get_xlim() == (-0.5, 1.5)
    course = course_figure(replace(results(found), imwa=imwa)).axes[0]
    (averages,) = (x for x in course.get_lines() if x.get_marker() == "s")
    assert averages.get_xydata().tolist() == [[4, 1], [12, 2]]


def test_one_member_is_not_called_an_average():
    both = [
        Evaluation("student", x, 0, m, {"AP": 1.0}) for x, m in (("member", 0), ("final", None))
    ]
    labels = [x.get_label() for x in episodes_figure(results(both)).axes[0].get_lines()]
    assert labels == ["student"]


def test_three_figures_fill_three_panels():
    figure = episodes_figure(
        results([Evaluation("student", "final", 0, None, {"a": 1.0, "b": 2.0, "c": 3.0})]),
        metrics=["c", "b", "a"],
    )
    assert [x.get_ylabel() for x in figure.axes] == ["c (%)", "b (%)", "a (%)"]


def test_figures_that_were_not_measured_are_a_users_error():
    with pytest.raises(MetricsError, match=r"no figure APx \(choose from AP, AP50\)"):
        episodes_figure(results(evaluations()), metrics=["AP", "APx"])
    with pytest.raises(MetricsError, match="made no evaluation"):
        episodes_figure(results([]))


def test_the_histogram_goes_from_the_most_to_the_least_frequent_class_of_the_first_set():
    counts = {"train (44 boxes)": [3, 40, 1], "test": [1, 1, 2]}
    axis = classes_figure(("cat", "dog", "owl"), counts, what="boxes").axes[0]
    assert [x.get_text() for x in axis.get_xticklabels()] == ["dog", "cat", "owl"]
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert heights == [[40, 3, 1], [1, 1, 2]]
    assert (axis.get_yscale(), axis.get_ylabel()) == ("log", "boxes")
    assert [x.get_text() for x in axis.get_legend().get_texts()] == list(counts)
    alike = classes_figure(("cat", "dog"), {"test": [1, 2]}, what="boxes")
    assert alike.axes[0].get_yscale() == "linear"
    with pytest.raises(ValueError, match="no counts"):
        classes_figure(("cat",), {}, what="boxes")


def test_every_figure_can_be_written(tmp_path):
    for name, figure in {
        "a": training_figure(json.loads(json.dumps(rows()))),
        "b": episodes_figure(results(evaluations())),
        "c": classes_figure(("cat", "dog"), {"x": [1, 2]}, what="boxes"),
    }.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=20)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_course_has_a_line_for_each_member_and_a_marker_for_averages():
    evaluations = [
        Evaluation("student", "running", 0, member, {"AP": 10.0 * t + member}, 2 * t + member, t)
        for member in (0, 1)
        for t in range(3)
    ]
    evaluations.append(Evaluation("student", "final", 0, None, {"AP": 25.0}, 5, 2))
    figure = course_figure(results(evaluations), metrics=["AP"])
    (axis,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines["student, member 2"] == [[1, 1], [2, 11], [3, 21]]
    assert lines["student, average"] == [[3, 25]]


def marks(axis):
    """Where an axis has the vertical lines of burn-in's end."""
    return [
        float(x.get_xdata()[0])
        for x in axis.get_lines()
        if len(x.get_xdata()) == 2 and x.get_xdata()[0] == x.get_xdata()[1]
    ]


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_the_end_of_burn_in_is_marked_on_every_clock():
    schedule = EpisodeSchedule(12, episodes=3, members=2)
    end = BurnIn.of(schedule, 6)
    training = training_figure(rows(), burn_in=end)
    for left, right in zip(training.axes[::2], training.axes[1::2], strict=True):
        # Each member's seventh step, after so many of all members.
        assert (marks(left), marks(right)) == ([10, 14], [6])
        assert legend(left).count("end of burn-in") == legend(right).count("end of burn-in") == 1
    episodes = episodes_figure(results(evaluations()), burn_in=end)
    assert [marks(axis) for axis in episodes.axes] == [[1.5]] * len(episodes.axes)
    inside = [Evaluation("student", "running", 0, 0, {"AP": 1.0}, 2, 2)]
    assert marks(course_figure(results([*evaluations(), *inside]), burn_in=end).axes[0]) == [6]
    assert not marks(training_figure(rows()).axes[0])


def test_each_column_explains_its_own_colors_and_dashes():
    panels = {a.get_ylabel(): a for a in training_figure(rows()).axes[1::2]}
    assert legend(panels["losses"]) == ["loss_box_reg", "loss_cls", "member 1", "member 2"]
    drawn = {x.get_color() for x in panels["losses"].get_lines() if len(x.get_xdata())}
    explained = {x.get_color() for x in panels["losses"].get_lines()[-4:-2]}
    assert drawn == explained
    assert legend(panels["total loss"]) == ["member 1", "member 2"]


def test_figures_carry_the_runs_name(tmp_path):
    folder = tmp_path / "run_$1$_x"
    folder.mkdir()
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows())))
    write_results(folder / "results.json", replace(results(evaluations()), burn_in=6))
    figures = run_figures(folder)
    assert set(figures) == {"training.png", "episodes.png"}
    titles = [figure.get_suptitle().split("\n") for figure in figures.values()]
    assert titles == [
        [plain("run_$1$_x")],
        [plain("run_$1$_x"), "unbiased_teacher on digits, M = 2, E = 3, T = 12, seed 1"],
    ]
    assert marks(figures["training.png"].axes[0]) == [10, 14]
    save_figures(figures, tmp_path)


def test_a_figure_that_cannot_be_written_leaves_the_others_whole(tmp_path):
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").write_bytes(b"of before")
    figures = {name: training_figure(rows()) for name in ("a.png", "b.png", "c.png")}
    with pytest.raises(OutputError, match=r"b.png cannot be written: Is a directory"):
        save_figures(figures, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "c.png").read_bytes() == b"of before"


def test_before_the_first_end_of_an_episode_there_is_a_course_alone(tmp_path):
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows())))
    running = Evaluation("student", "running", 0, 0, {"AP": 10.0}, 1, 1)
    write_results(tmp_path / "results.json", results([running]))
    assert set(run_figures(tmp_path)) == {"training.png", "course.png"}
    with pytest.raises(MetricsError, match="no figure APx"):
        run_figures(tmp_path, metrics=["APx"])
