import html
import json
from functools import partial

import pytest

from ssod_imwa.analysis.report import _classes_figure
from ssod_imwa.runs.results import Evaluation, Results, write_results

STEPS = 20


@pytest.fixture
def report(call):
    return partial(call, "report")


def evaluation(model, stage, episode, member, ap, sets=("",)):
    metrics = {"AP": ap, "AP50": ap + 20, "AP-cat": ap + 5, "AP-dog": float("nan")}
    metrics = {f"{name}{x}": metrics[x] + i for i, name in enumerate(sets) for x in metrics}
    step = (episode + 1) * STEPS - 1
    return Evaluation(model, stage, episode, member, metrics, global_step=step, t=step // 2)


def write_run(folder, *, seed=1, members=2, shift=0.0, course=True, sets=("",), fold=None):
    """Two episodes; averages are 3 points above the mean of their members.

    Of several test sets the prefixes of metrics are given, each with a point more than the last.
    """
    folder.mkdir()
    evaluations = [
        evaluation("teacher", "member", episode, member, 40 + 2 * member + shift, sets)
        for episode in range(2)
        for member in range(members)
    ]
    evaluations += [
        *([evaluation("teacher", "average", 0, None, 44 + shift, sets)] if course else []),
        evaluation("teacher", "final", 1, None, 45 + shift, sets),
    ]
    results = Results(
        task="detection",
        dataset="pets, tested on pets_test",
        method="unbiased_teacher",
        imwa={"members": members, "episodes": 2},
        seed=seed,
        fold=fold,
        iterations=STEPS,
        wall_time=61.0,
        peak_memory=2**30,
        evaluations=tuple(evaluations),
        class_counts={"cat": 30, "dog": 3},
    )
    write_results(folder / "results.json", results)
    rows = [
        {"iteration": i, "episode": 0, "member": 0, "t": i, "total_loss": 2.0, "lr": 0.1}
        for i in range(STEPS)
    ]
    rows[-1] |= {"labels/per_image": 2.0, "labels/empty_images": 5.0, "labels/share-cat": 100.0}
    rows[-1] |= {"imwa/distance-teacher": 0.125}
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.yaml").write_text(f"SEED: {seed}\nSOLVER:\n  BASE_LR: {0.1 * seed}\n")
    return folder


def test_a_page_tells_of_one_run(report, tmp_path):
    run = write_run(tmp_path / "run")
    status, out, error = report(run, "--no-models")
    assert (status, out) == (0, f"{run / 'report.html'}\n"), error
    page = (run / "report.html").read_text()
    for words in (
        "unbiased_teacher on pets, tested on pets_test; M = 2 members",
        "<td>41.00</td><td>42.00</td><td>45.00</td><td>+4.00</td><td>+3.00</td>",  # last average
        "What the teacher taught",
        '<td class="text">cat</td><td>30</td><td>50.00</td>',
        '<td class="text">dog</td><td>3</td><td>–</td>',
        "0:01:01",
        "1.00 GiB",
        f"--config-file {run / 'config.yaml'}",
    ):
        assert words in page, words
    assert "Examples" not in page
    assert len(page) < 5e6


def test_classes_are_shown_on_each_of_several_test_sets(report, tmp_path):
    run = write_run(tmp_path / "run", sets=("pets_test/", "folder:a/b/"))
    assert report(run, "--no-models")[0] == 0
    page = (run / "report.html").read_text()
    assert page.count("<h3>Classes</h3>") == 1
    for on, first in (("pets_test", "50.00"), ("folder:a/b", "51.00")):
        _, _, table = page.partition(f"<caption>Of the shipped model, on {on}.</caption>")
        row = f'<td class="text">cat</td><td>30</td><td>{first}</td>'
        assert row in table.partition("</table>")[0]
        assert f"AP (%) of each class on {on}, against" in page


def test_the_command_can_be_copied_whatever_the_folder_is_called(report, tmp_path):
    run = write_run(tmp_path / "my $run")
    assert report(run, "--no-models")[0] == 0
    page = html.unescape((run / "report.html").read_text())
    assert f"--config-file '{run}/config.yaml' OUTPUT_DIR" in page


def test_several_runs_are_compared_key_by_key(report, tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=2, shift=2.0)]
    status, _, error = report(*runs, "--no-models", "--output", tmp_path / "new" / "page.html")
    assert status == 0, error
    page = (tmp_path / "new" / "page.html").read_text()
    assert '<td class="text">SOLVER.BASE_LR</td><td>0.1</td><td>0.2</td>' in page
    assert '<td class="text">SEED</td><td>1</td><td>2</td>' in page
    assert "IMWA.MEMBERS</td>" not in page  # the same in both


def test_folds_that_differ_are_among_the_differences(report, tmp_path):
    runs = [write_run(tmp_path / str(fold), fold=fold) for fold in (1, 2)]
    assert report(*runs, "--no-models", "--output", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert '<td class="text">DATASETS.SPLIT.FOLD</td><td>1</td><td>2</td>' in page
    assert "All settings" not in page


def test_an_average_that_could_not_be_measured_is_not_passed_over(report, tmp_path):
    run = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    numbers = {"members": 2.0, "worst": 2.0, "average": 1.0, "rate": 1.0}
    for episode, average in ((0, 1.0), (1, None)):
        measured = {f"advice/{k}": x for k, x in (numbers | {"average": average}).items()}
        rows.append({"iteration": STEPS, "episode": episode, "member": 0, "t": 9, **measured})
    (run / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    assert report(run, "--no-models")[0] == 0
    assert "After the last average: what averaging gains could not be measured" in (
        html.unescape((run / "report.html").read_text())
    )


OVERLAY = "a line for each run"


@pytest.mark.parametrize("course", [True, False])
def test_lone_final_figures_are_not_drawn_as_curves(report, tmp_path, course):
    runs = [write_run(tmp_path / "a", course=course), write_run(tmp_path / "b", course=False)]
    status, _, error = report(*runs, "--no-models", "--output", tmp_path / "page.html")
    assert status == 0, error
    assert (OVERLAY in (tmp_path / "page.html").read_text()) is course


def test_counts_of_classes_are_plain_numbers_on_their_axis():
    figure = _classes_figure({"cat": 1.0, "dog": 2.0}, {"cat": 2, "dog": 1200}, "AP")
    figure.canvas.draw()
    (axis,) = figure.axes
    shown = [x.get_text() for x in axis.get_xticklabels() if 2 <= x.get_position()[0] <= 1200]
    assert shown == ["2", "5", "10", "20", "50", "100", "200", "500", "1,000"]
    assert not axis.get_xticklabels(minor=True)


def test_models_that_are_gone_are_said_to_be(report, tmp_path):
    run = write_run(tmp_path / "run")
    status, _, error = report(run)
    assert status == 0, error
    assert "Left out: " in (run / "report.html").read_text()


def test_mistakes_are_one_line_and_no_page_is_overwritten(report, tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "page.html").write_text("mine")
    for arguments, message in (
        ((tmp_path / "none",), "does not exist"),
        ((run, "--output", tmp_path / "page.html"), "is there already"),
    ):
        status, _, error = report(*arguments)
        assert (status, message in error) == (2, True)
    assert (tmp_path / "page.html").read_text() == "mine"
    assert report(run, "--images", "0")[0] == 2
