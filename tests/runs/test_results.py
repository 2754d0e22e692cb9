import json
import math
import os
import statistics

import pytest
import torch

from ssod_imwa.runs.results import (
    Evaluation,
    Results,
    ResultsError,
    main_metrics,
    read_results,
    versions,
    write_results,
)


def evaluation(model="student", stage="average", episode=0, member=None, **metrics):
    return Evaluation(model, stage, episode, member, metrics or {"AP": 10.0, "AP50": 20.0})


def results(seed=1, ap=10.0, **changes):
    evaluations = (
        evaluation("student", "member", 0, 0, AP=ap - 3),
        evaluation("student", "average", 0, AP=ap - 2),
        evaluation("student", "final", 1, AP=ap - 1),
        evaluation("teacher", "final", 1, AP=ap),
    )
    settings = {
        "task": "detection",
        "dataset": "digits_train 5 %",
        "method": "unbiased_teacher",
        "imwa": {"members": 2, "episodes": 4, "first_member": 0, "coefficients": []},
        "seed": seed,
        "iterations": 600,
        "wall_time": 12.5,
        "peak_memory": 1000,
        "evaluations": evaluations,
        "fold": 1,
    }
    return Results(**{**settings, **changes})


def test_what_was_written_is_read(tmp_path):
    written = results()
    write_results(tmp_path / "results.json", written)
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == written


def test_the_file_is_strict_json_with_null_for_nan(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, results(evaluations=(evaluation(AP=1.5, APl=math.nan),)))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    metrics = json.loads(path.read_text(), parse_constant=refuse)["evaluations"][0]["metrics"]
    assert metrics == {"AP": 1.5, "APl": None}
    assert math.isnan(read_results(path).evaluations[0].metrics["APl"])


def test_an_infinite_figure_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, results())
    with pytest.raises(ValueError, match="inf"):
        write_results(path, results(evaluations=(evaluation(AP=math.inf),)))
    assert read_results(path) == results()
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, results())

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_results(path, results(seed=2))
    monkeypatch.undo()
    assert read_results(path).seed == 1
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("seed"), "seed is missing"),
        (lambda x: x.update(color="red"), "color is unknown"),
        (lambda x: x.update(seed="one"), "seed = 'one' is not allowed (must be int)"),
        (lambda x: x.update(imwa={"members": 2}), "imwa.episodes = None is not allowed"),
        (lambda x: x["evaluations"][1].pop("model"), "evaluations[1].model is missing"),
        (
            lambda x: x["evaluations"][0].update(stage="middle"),
            "evaluations[0].stage = 'middle' is not one of ('running', ",
        ),
        (lambda x: x["evaluations"][0].update(metrics={"AP": "high"}), "'high'"),
        (lambda x: x.update(evaluations=[3]), "evaluations[0] is not an object"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "results.json"
    write_results(path, results())
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ResultsError) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "\x00\xff"])
def test_a_damaged_file_is_a_users_error(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(ResultsError, match=r"results\.json"):
        read_results(tmp_path)


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(ResultsError, match=r"does not exist .*OUTPUT_DIR"):
        read_results(tmp_path)


def test_the_headline_is_the_last_averaged_teacher_else_the_student():
    run = results()
    assert run.headline() is run.evaluations[3]
    assert run.headline("student") is run.evaluations[2]
    supervised = results(evaluations=run.evaluations[:3])
    assert supervised.headline() is run.evaluations[2]
    with pytest.raises(ResultsError, match="no evaluation of the teacher"):
        supervised.headline("teacher")
    with pytest.raises(ResultsError, match="no evaluation of an average"):
        results(evaluations=run.evaluations[:1]).headline()


def test_main_metrics_are_ap_and_ap50_of_every_protocol_and_data_set():
    run = results(
        evaluations=(
            evaluation(**{"AP": 1.0, "AP50": 1.0, "APs": 1.0, "AP-cat": 1.0}),
            evaluation(**{"VOC/AP50": 1.0, "VOC/AP50-11pt": 1.0, "VOC/AP": 1.0, "set/AP": 1.0}),
        )
    )
    assert main_metrics([run, run]) == ["AP", "AP50", "VOC/AP50", "VOC/AP", "set/AP"]


def test_versions_name_what_decides_the_figures():
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "ssod_imwa", "torchvision", "faster-coco-eval"} <= found.keys()


def at(t, value, *, stage="running", member=0, model="student", **more):
    return Evaluation(model, stage, 0, member, {"AP": value, "ece": value, **more}, t, t)


def test_the_summary_of_one_member_is_of_all_its_evaluations():
    values = [float(v) for v in (5, 50, *range(10, 28), 3, 4)]
    running = [at(t, v) for t, v in enumerate(values[:-1])]
    run = results(
        imwa={"members": 1, "episodes": 1},
        evaluations=(*running, at(len(values), values[-1], stage="final", member=None)),
    )
    ap, ece = (run.summary()["student"][name] for name in ("AP", "ece"))
    last = values[-20:]
    assert ap == {
        "final": 4.0,
        "best": 50.0,
        "median_of_last_20": statistics.median(last),
        "mean_of_last_20": pytest.approx(sum(last) / 20),
    }
    assert ece["best"] == 3.0
    assert run.headline().metrics["AP"] == 4.0


def test_the_summary_of_members_that_part_late_begins_with_what_they_have_in_common():
    evaluations = (
        at(0, 20.0),
        at(1, 10.0, stage="average", member=None),
        at(2, 90.0, member=1),
        at(3, 30.0, stage="final", member=None),
    )
    imwa = {"members": 2, "episodes": 1, "start": 0.5}
    run = results(imwa=imwa, evaluations=evaluations, iterations=4)
    assert [x.t for x in run.series("student")] == [0, 1, 3]
    assert (run.global_steps, run.episode_number(0), run.episode_number(1)) == (6, 0, 1)
    for start, steps in ((0.0, 8), (1.0, 4)):
        whole = results(imwa={**imwa, "start": start}, iterations=4)
        assert (whole.global_steps, whole.episode_number(0)) == (steps, 1)


def test_the_summary_of_several_members_is_of_their_averages(tmp_path):
    evaluations = (
        at(0, 90.0),
        at(1, 80.0, stage="member", member=1),
        at(1, 10.0, stage="average", member=None),
        at(3, 30.0, stage="final", member=None),
    )
    run = results(imwa={"members": 2, "episodes": 2}, evaluations=evaluations)
    expected = {"final": 30.0, "best": 30.0, "median_of_last_20": 20.0, "mean_of_last_20": 20.0}
    assert run.summary()["student"]["AP"] == expected
    write_results(tmp_path / "results.json", run)
    written = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert written["student"]["AP"] == expected
    assert read_results(tmp_path) == run
