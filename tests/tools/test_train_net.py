import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"


@pytest.fixture
def parse(monkeypatch):
    parse_arguments = runpy.run_path(str(TOOL))["parse_arguments"]

    def parse(line):
        monkeypatch.setattr("sys.argv", ["train_net.py", *line.split()])
        return parse_arguments()

    return parse


@pytest.mark.parametrize(
    "line",
    [
        "--config-file a.yaml b.yaml SEED 3 LOG_PERIOD 5 --resume --num-gpus 2",
        "--config-file a.yaml b.yaml SEED 3 --resume LOG_PERIOD 5 --num-gpus 2",
        "--config-file a.yaml b.yaml --resume --num-gpus 2 SEED 3 LOG_PERIOD 5",
        "SEED 3 LOG_PERIOD 5 --resume --num-gpus 2 --config-file a.yaml b.yaml",
        "--num-gpus 2 SEED 3 --resume LOG_PERIOD 5 --config-file a.yaml b.yaml",
    ],
)
def test_files_pairs_and_options_stand_in_any_order(parse, line):
    arguments = parse(line)
    assert arguments.config_file == ["a.yaml", "b.yaml"]
    assert arguments.overrides == ["SEED", "3", "LOG_PERIOD", "5"]
    assert (arguments.resume, arguments.num_gpus) == (True, 2)


def test_a_value_may_end_in_yaml_but_a_file_must(parse):
    arguments = parse("--config-file a.yaml MODEL.DETECTRON2.CONFIG b.yaml")
    assert arguments.config_file == ["a.yaml"]
    assert arguments.overrides == ["MODEL.DETECTRON2.CONFIG", "b.yaml"]
    with pytest.raises(UserError, match=r"^b.yml is neither a file that ends in .yaml nor a key$"):
        parse("--config-file a.yaml b.yml SEED 3")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--resume-from", ""], "--resume-from '' is not allowed (must name a checkpoint)"),
        (["--allow-inexact-resume"], "is of --resume or --resume-from, and none is given"),
        (["--overwrite", "--allow-inexact-resume"], "is of --resume or --resume-from"),
    ],
)
def test_options_that_would_do_nothing_are_refused(monkeypatch, capsys, words, rule):
    tool = runpy.run_path(str(TOOL))
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", "a.yaml", *words])
    with pytest.raises(SystemExit, match="2"):
        tool["parse_arguments"]()
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize("line", ["--overwrite --num-gpus 2", "--resume-from old.pth", "--resume"])
def test_the_command_that_goes_on_keeps_files_and_settings(monkeypatch, line):
    tool = runpy.run_path(str(TOOL))
    words = ["--config-file", "a b.yaml", "c.yaml", *line.split(), "OUTPUT_DIR", "out put"]
    monkeypatch.setattr(sys, "argv", ["train_net.py", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train_net.py", *words])
    command = tool["resume_command"](tool["parse_arguments"]())
    ranks = " --num-gpus 2" if "--num-gpus" in line else ""
    assert command == (
        "python -X dev train_net.py --config-file 'a b.yaml' c.yaml OUTPUT_DIR 'out put' --resume"
        + ranks
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert tool["resume_command"](tool["parse_arguments"]()).startswith("the torchrun command")


def test_a_key_that_is_left_out_is_said_once(tmp_path):
    """In a process of its own: here pytest has set the log up."""
    recipe = TOOL.parents[1] / "configs/digit_images_semi/fixmatch.yaml"
    words = ["SOLVER.OPTIMIZER", "AdamW", "OUTPUT_DIR", str(tmp_path / "none")]
    result = subprocess.run(
        [sys.executable, str(TOOL), "--eval-only", "--config-file", str(recipe), *words],
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("SOLVER.NESTEROV is left out") == 1


def test_the_last_line_of_a_stopped_run_says_what_was_saved_and_how_it_goes_on(
    call, detection_config, monkeypatch, tmp_path
):
    cfg = detection_config()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(cfg.dump())
    trained = SupervisedLoss.__call__
    left = [3]  # losses until the signal

    def stopping(self, parts):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return trained(self, parts)

    monkeypatch.setattr(SupervisedLoss, "__call__", stopping)
    words = ["--config-file", str(recipe), "LOG_PERIOD", "2"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "tools/train_net.py", *words])
    status, _, errors = call("train_net", *words)
    assert status == 130
    line = errors.splitlines()[-1]
    checkpoint = Path(cfg.OUTPUT_DIR, "model_0000001.pth")
    said, _, command = line.partition("; go on with: ")
    assert said == f"{checkpoint} is the checkpoint of global step 2"
    assert checkpoint.exists()
    assert shlex.split(command)[:2] == ["python", "tools/train_net.py"]
    status, _, errors = call("train_net", *shlex.split(command)[2:])
    assert status == 0
    assert f"resuming from {checkpoint} after global step 2" in errors


def test_the_command_that_goes_on_scales_the_batch_again(monkeypatch):
    tool = runpy.run_path(str(TOOL))
    arguments = ["train_net.py", "--config-file", "a.yaml", "SEED", "3", "--scale-batch", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", ["python", "tools/train_net.py", *arguments[1:]])
    command = tool["resume_command"](tool["parse_arguments"]())
    expected = "python tools/train_net.py --config-file a.yaml SEED 3 --resume --scale-batch 4"
    assert command == expected
