import importlib.util
from pathlib import Path

import pytest
import torch

from ssod_imwa.engine.checkpoint.atomic import load_checkpoint, write_checkpoint
from ssod_imwa.errors import CheckpointError, UserError
from ssod_imwa.runs.config import get_cfg

PATH = Path(__file__).parents[2] / "tools" / "average_checkpoints.py"


@pytest.fixture
def command(monkeypatch):
    spec = importlib.util.spec_from_file_location("average_checkpoints", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", [PATH.name, *map(str, arguments)])
        module.main()

    call.module = module
    return call


def write_run(folder, value, **extra):
    folder.mkdir()
    content = {
        "student": {"w": torch.tensor([value, 1.0])},
        "teacher": {"w": torch.tensor([2 * value, 3.0])},
        "inference_model": "teacher",
        "config": get_cfg().dump(),
        **extra,
    }
    write_checkpoint(folder / "model_final.pth", content)
    return folder


def test_an_averaged_model_is_never_written_over(command, tmp_path):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (1, 2)]
    file = runs[0] / "model_final.pth"
    before = file.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        command(*runs, "--output", file)
    assert file.read_bytes() == before


def test_students_and_teachers_are_averaged_apart(command, tmp_path, capsys):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (1, 2, 6)]
    command(*runs, "--output", tmp_path / "soup.pth")
    soup = load_checkpoint(tmp_path / "soup.pth")
    assert soup["student"]["w"].tolist() == [3.0, 1.0]
    assert soup["teacher"]["w"].tolist() == [6.0, 3.0]
    assert soup["inference_model"] == "teacher"
    assert "0.3333" in capsys.readouterr().out


def test_given_weights(command, tmp_path):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (0, 4)]
    command(*runs, "--output", tmp_path / "s.pth", "--rule", "fixed", "--weights", 0.25, 0.75)
    assert load_checkpoint(tmp_path / "s.pth")["student"]["w"].tolist() == [3.0, 1.0]


@pytest.mark.parametrize(("rule", "expected"), [("greedy", 2.0), ("line", 2.0)])
def test_rules_that_measure_look_at_the_shipped_model(
    command, tmp_path, monkeypatch, rule, expected
):
    runs = [write_run(tmp_path / str(value), float(value)) for value in (0, 4)]
    seen = []

    def build_metric(trained, dataset, name, *, show):
        seen.append((dataset, name))
        return lambda state: -abs(float(state["w"][0]) - 4.0)  # best at teacher weight 4

    monkeypatch.setattr(command.module, "build_metric", build_metric)
    command(*runs, "--output", tmp_path / "s.pth", "--rule", rule, "--dataset", "digits_train")
    assert load_checkpoint(tmp_path / "s.pth")["student"]["w"][0] == expected
    assert seen == [("digits_train", None)]


def test_mistakes_are_one_line_and_write_nothing(command, tmp_path):
    first, second = (write_run(tmp_path / str(value), float(value)) for value in (1, 2))
    other = write_run(tmp_path / "other", 1.0, student={"v": torch.zeros(2)})
    output = tmp_path / "soup.pth"
    with pytest.raises(UserError, match="sum"):
        command(first, second, "--output", output, "--rule", "fixed", "--weights", 0.5, 0.4)
    with pytest.raises(UserError, match="cannot be averaged"):
        command(first, other, "--output", output)
    with pytest.raises(CheckpointError, match="does not exist"):
        command(first, tmp_path / "absent.pth", "--output", output)
    with pytest.raises(SystemExit) as caught:
        command(first, second, "--output", output, "--rule", "greedy")
    assert caught.value.code == 2
    assert not output.exists()
