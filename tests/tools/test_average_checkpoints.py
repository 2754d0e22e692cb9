from functools import partial

import pytest
import torch

from ssod_imwa.engine.checkpoint.atomic import load_checkpoint, write_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import FORMAT
from ssod_imwa.runs import soups
from ssod_imwa.runs.config import get_cfg
from ssod_imwa.runs.results import Evaluation, Results, write_results


@pytest.fixture
def average(call):
    return partial(call, "average_checkpoints")


def write_run(folder, value, **extra):
    folder.mkdir()
    content = {
        "student": {"w": torch.tensor([value, 1.0])},
        "teacher": {"w": torch.tensor([2 * value, 3.0])},
        "inference_model": "teacher",
        "format": FORMAT,
        "config": get_cfg().dump(),
        **extra,
    }
    write_checkpoint(folder / "model_final.pth", content)
    return folder


def test_an_averaged_model_is_never_written_over(average, tmp_path):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (1, 2)]
    file = runs[0] / "model_final.pth"
    before = file.read_bytes()
    status, _, error = average(*runs, "--output", file)
    assert (status, "is there already" in error) == (2, True)
    assert file.read_bytes() == before


def test_students_and_teachers_are_averaged_apart(average, tmp_path):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (1, 2, 6)]
    status, out, _ = average(*runs, "--output", tmp_path / "soup.pth")
    soup = load_checkpoint(tmp_path / "soup.pth")
    assert soup["student"]["w"].tolist() == [3.0, 1.0]
    assert soup["teacher"]["w"].tolist() == [6.0, 3.0]
    assert soup["inference_model"] == "teacher"
    assert (status, "0.3333" in out) == (0, True)


def test_weights_of_the_command_line(average, tmp_path):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (0, 4)]
    average(*runs, "--output", tmp_path / "s.pth", "--rule", "fixed", "--weights", 0.25, 0.75)
    assert load_checkpoint(tmp_path / "s.pth")["student"]["w"].tolist() == [3.0, 1.0]


@pytest.mark.parametrize(("rule", "expected"), [("greedy", 2.0), ("line", 2.0)])
def test_rules_that_measure_look_at_the_shipped_model(
    average, tmp_path, monkeypatch, rule, expected
):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (0, 4)]
    seen = []

    def build_metric(trained, dataset, name, *, asked, show):
        seen.append((dataset, name))
        return lambda state: -abs(float(state["w"][0]) - 4.0)  # best at teacher weight 4

    monkeypatch.setattr(soups, "build_metric", build_metric)
    average(*runs, "--output", tmp_path / "s.pth", "--rule", rule, "--dataset", "digits_train")
    assert load_checkpoint(tmp_path / "s.pth")["student"]["w"][0] == expected
    assert seen == [("digits_train", None)]


@pytest.mark.parametrize("rule", ["greedy", "line"])
def test_a_module_is_imported_if_the_command_line_names_it_and_not_if_a_file_does(
    average, tmp_path, monkeypatch, rule
):
    marker = tmp_path / "imported"
    user = f"of_the_user_{rule}"  # imported once in a process
    for name in ("of_the_file", user):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write('{name}\\n')\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = get_cfg()
    cfg.defrost()
    cfg.DATASETS.IMPORT, cfg.DATASETS.TRAIN = ["of_the_file"], ["no_such_set"]
    runs = [write_run(tmp_path / str(v), float(v), config=cfg.dump()) for v in (1, 2)]
    measure = ("--rule", rule, "--dataset", "no_such_set")

    status, _, error = average(*runs, "--output", tmp_path / "s.pth", *measure)
    assert status == 2
    assert "names code to run: of_the_file (" in error.splitlines()[-1]
    assert "give --import of_the_file)" in error.splitlines()[-1]
    assert not marker.exists()

    _, _, error = average(*runs, "--output", tmp_path / "s.pth", *measure, "--import", user)
    assert "no_such_set" in error.splitlines()[-1]
    assert marker.read_text() == f"{user}\n"
    assert average(*runs, "--output", tmp_path / "s.pth")[0] == 0  # uniform reads no data


def test_mistakes_are_one_line_and_write_nothing(average, tmp_path):
    first, second = (write_run(tmp_path / str(value), float(value)) for value in (1, 2))
    other = write_run(tmp_path / "other", 1.0, student={"v": torch.zeros(2)})
    for sources, options, message in (
        ((first, second), ("--rule", "fixed", "--weights", 0.5, 0.4), "sum"),
        ((first, other), (), "cannot be averaged"),
        ((first, tmp_path / "absent.pth"), (), "does not exist"),
        ((first, second), ("--rule", "greedy"), "--dataset belong together"),
    ):
        status, _, error = average(*sources, "--output", tmp_path / "soup.pth", *options)
        assert (status, message in error.splitlines()[-1]) == (2, True)
    assert not (tmp_path / "soup.pth").exists()


def test_runs_with_and_without_a_teacher_are_refused_with_what_each_has(average, tmp_path):
    both = write_run(tmp_path / "both", 1.0)
    metrics = {"student": {"AP": 31.0}, "teacher": {"AP": 35.25}}
    evaluations = tuple(Evaluation(m, "final", 0, None, metrics[m]) for m in metrics)
    imwa = {"members": 1, "episodes": 1}
    results = Results("detection", "some", "some", imwa, 1, 1, 1.0, 1, evaluations)
    write_results(both / "results.json", results)
    alone = write_run(tmp_path / "alone", 2.0, inference_model="student")
    content = load_checkpoint(alone / "model_final.pth")
    del content["teacher"]
    write_checkpoint(alone / "model_final.pth", content)
    status, _, error = average(alone, both, "--output", tmp_path / "soup.pth")
    assert (status, error.count("\n")) == (2, 1)
    assert "alone/model_final.pth has student and ships the student" in error
    assert "has student (AP 31.00) and teacher (AP 35.25) and ships the teacher" in error
    assert not (tmp_path / "soup.pth").exists()


def test_runs_of_other_classes_are_refused(average, tmp_path):
    runs = [write_run(tmp_path / f"{c}", 1.0, classes=[c, "d"]) for c in "ab"]
    status, _, error = average(*runs, "--output", tmp_path / "soup.pth")
    assert (status, "other classes" in error) == (2, True)
