import gc
import signal
import weakref
from functools import partial
from pathlib import Path

import pytest

from ssod_imwa.engine.hooks import LRHook
from ssod_imwa.papers import reproduction
from ssod_imwa.runs.results import read_results
from ssod_imwa.runs.trained import read_trained

ROOT = Path(__file__).parents[2]

TABLE = f"""
title: Digits
note: Two steps are too few.
metrics: [top1, h_mean]
overrides:
  CLS.SCHEDULE.EPOCHS: 0
  SOLVER.MAX_ITER: 2
  SOLVER.WARMUP_ITERS: 0
  SOLVER.IMS_PER_BATCH: 4
  MODEL.DEVICE: cpu
runs:
  second:
    config: {ROOT}/configs/digit_images/crt.yaml
    overrides: {{CLS.STAGE.RESET_CLASSIFIER: False, CLS.STAGE.MOVE_STATISTICS: none}}
    after: first
  first: {{config: {ROOT}/configs/digit_images/cross_entropy.yaml}}
  never: {{config: {ROOT}/configs/digit_images/mfw.yaml}}
rows:
  - {{label: CE, run: first, paper: {{top1: 71.1}}, source: "MFW, Table 2"}}
  - {{label: cRT, run: second, against: CE}}
  - {{label: MFW, run: never}}
"""


@pytest.fixture
def reproduce(call, tmp_path):
    (tmp_path / "digits.yaml").write_text(TABLE)
    return partial(call, "reproduce", tmp_path / "digits.yaml", "--output", tmp_path / "out")


def refuse(cfg, **options):
    raise AssertionError(f"{cfg.OUTPUT_DIR} is trained")


def test_trains_what_rows_need_once_and_prints_the_table(reproduce, monkeypatch, tmp_path):
    arguments = ("--rows", "CE", "cRT", "--format", "markdown")
    status, out, _ = reproduce(*arguments)
    folder = tmp_path / "out" / "digits"
    assert status == 0
    assert {p.name for p in folder.iterdir()} == {"first_seed1", "second_seed1", "table.md"}
    first, second = (read_results(folder / f"{name}_seed1") for name in ("first", "second"))
    assert (first.iterations, first.seed) == (2, 1)
    # The second stage trained the classifier alone, from the first run's model.
    before, after = (read_trained(folder / f"{n}_seed1").weights for n in ("first", "second"))
    changed = {key.split(".")[0] for key in before if not before[key].equal(after[key])}
    assert changed == {"classifier"}
    top1 = [results.headline().metrics["top1"] for results in (first, second)]
    lines = out.splitlines()
    assert lines[0] == "Digits (ours: seed 1). Two steps are too few."
    assert (
        lines[2]
        == "| method | top1, paper | top1 | gain in top1 ± s.e. | h_mean | seeds | source |"
    )
    assert lines[4].startswith(f"| CE | 71.1 | {top1[0]:.2f} |  | ")
    assert lines[4].endswith("| 1 | MFW, Table 2 |")
    assert lines[5].startswith(f"| cRT |  | {top1[1]:.2f} | {top1[1] - top1[0]:+.2f} | ")
    assert (folder / "table.md").read_text() == out

    monkeypatch.setattr(reproduction, "train", refuse)
    assert reproduce(*arguments)[:2] == (0, out)
    # A third row brings a run that is not there.
    with pytest.raises(AssertionError, match="never_seed1 is trained"):
        reproduce()


def test_print_only_trains_nothing_and_creates_nothing(reproduce, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduction, "train", refuse)
    status, out, _ = reproduce("--print-only", "--seeds", 1, 2)
    assert status == 0
    assert "Digits (ours: seed 1, 2)" in out
    assert "71.1" in out
    assert not (tmp_path / "out").exists()


@pytest.fixture
def trained(monkeypatch):
    """The configurations that would have been trained."""
    configurations = []
    monkeypatch.setattr(
        reproduction, "train", lambda cfg, **options: configurations.append(cfg) or 0
    )
    return configurations


def test_nothing_of_a_run_stays_in_memory_when_the_next_one_begins(reproduce, monkeypatch):
    alive = []

    class Data:
        pass

    def train(cfg, **options):
        alive.append(sum(data() is not None for data in references))
        data = Data()
        data.itself = data
        references.append(weakref.ref(data))
        return 0

    references = []
    monkeypatch.setattr(reproduction, "train", train)
    gc.disable()
    try:
        reproduce("--rows", "CE", "--seeds", 1, 2, 3)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_scale_shortens_every_run_in_a_folder_of_its_own(reproduce, trained, tmp_path):
    epochs = (
        "SOLVER.MAX_ITER",
        500,
        "CLS.SCHEDULE.EPOCHS",
        10,
        "CLS.SCHEDULE.WARMUP",
        2,
        "IMWA.EPISODES",
        500,
    )
    _, out, _ = reproduce(*epochs, "--scale", 0.1, "--rows", "CE")
    (cfg,) = trained
    # 478 images in batches of 4, ten times: 1,195 iterations, and two times: 239.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.IMWA.EPISODES) == (120, 24, 120)
    assert Path(cfg.OUTPUT_DIR) == tmp_path / "out" / "digits_x0.1" / "first_seed1"
    assert "(ours: seed 1, 0.1 times the schedule, SOLVER.MAX_ITER = 500," in out


def test_seeds_data_root_and_overrides_reach_every_run(reproduce, trained, tmp_path):
    reproduce("--rows", "cRT", "--seeds", 3, 5, "--data-root", tmp_path, "LOG_PERIOD", 7)
    folder = tmp_path / "out" / "digits"
    assert [(Path(cfg.OUTPUT_DIR).name, cfg.SEED, cfg.MODEL.WEIGHTS) for cfg in trained] == [
        ("first_seed3", 3, ""),
        ("second_seed3", 3, str(folder / "first_seed3")),
        ("first_seed5", 5, ""),
        ("second_seed5", 5, str(folder / "first_seed5")),
    ]
    assert {(cfg.DATASETS.ROOT, cfg.LOG_PERIOD) for cfg in trained} == {(str(tmp_path), 7)}


def test_rows_that_are_not_shown_may_have_been_trained_with_other_settings(reproduce):
    settings = ("SOLVER.BASE_LR", 0.01, "--rows")
    assert reproduce("--rows", "CE")[0] == 0
    assert reproduce(*settings, "MFW")[0] == 0
    status, _, errors = reproduce(*settings, "cRT")  # its gain is over CE
    assert status == 2
    assert "SOLVER.BASE_LR = 0.1, which is now 0.01" in errors


def test_a_signal_ends_it_with_the_status_of_training_and_it_goes_on(
    reproduce, monkeypatch, tmp_path
):
    original = LRHook.before_step

    def stop(self):
        original(self)
        if self.trainer.iter == 0:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(LRHook, "before_step", stop)
        status, out, _ = reproduce("--rows", "cRT")
    assert (status, out) == (128 + signal.SIGTERM, "")
    folder = tmp_path / "out" / "digits"
    assert {p.name for p in folder.iterdir()} == {"first_seed1"}
    assert "CE" in reproduce("--rows", "CE")[1]
    assert read_results(folder / "first_seed1").headline().stage == "final"


def test_mistakes_are_one_line_and_status_2(reproduce, trained):
    for arguments, message in (
        (("--rows", "CRT"), "'CRT' is not a row; did you mean 'cRT'?"),
        (("--scale", "0"), "--scale 0 is not allowed (must be above 0)"),
        (("SOLVER.MAX_ITR", "3"), "SOLVER.MAX_ITR is not a configuration key"),
    ):
        status, _, error = reproduce(*arguments)
        assert status == 2
        assert message in error.splitlines()[-1]
    reproduce("--rows", "CE")
    status, _, error = reproduce("SOLVER.MAX_ITER", 3, "--rows", "CE")
    assert (status, error.splitlines()[-1].startswith("error: ")) == (2, True)
    assert "SOLVER.MAX_ITER = 2, which is now 3 (remove it, or choose another --output)" in error
