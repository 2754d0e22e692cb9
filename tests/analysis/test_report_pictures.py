"""Examples of real runs: tiny ones, trained here."""

import pytest

from ssod_imwa.analysis.report import read_runs
from ssod_imwa.analysis.report_pictures import add_examples
from ssod_imwa.runs import run as runs
from ssod_imwa.runs.config import load_config
from ssod_imwa.visualization.page import Page

pytestmark = pytest.mark.usefixtures("one_thread")


def test_detectors_are_shown_at_their_best_and_worst_and_where_they_differ(detection_config):
    folders = []
    for seed in (1, 2):
        cfg = detection_config("SEED", seed, output=f"seed{seed}")
        runs.train(cfg)
        folders.append(cfg.OUTPUT_DIR)
    page = Page("x")
    add_examples(page, read_runs(folders), images=4)
    text = page.render()
    assert "Left out" not in text
    for words in ("seed1 is best on", "seed1 is worst on", "seed1 and seed2 disagree most on"):
        assert words in text
    assert text.count("data:image/jpeg") == 3


def test_a_classifiers_mistakes_are_shown(tmp_path):
    settings = ["SOLVER.MAX_ITER", "3", "OUTPUT_DIR", str(tmp_path / "run"), "MODEL.DEVICE", "cpu"]
    cfg = load_config(
        "configs/digit_images/cross_entropy.yaml", [*settings, "CLS.SCHEDULE.EPOCHS", "0"]
    )
    runs.train(cfg)
    page = Page("x")
    add_examples(page, read_runs([tmp_path / "run"]), images=4)
    text = page.render()
    assert "Left out" not in text
    assert text.count("<svg") == 2  # confusion, calibration
    assert "run is surest and wrong on" in text
    assert text.count("data:image/jpeg") == 1
