"""Examples of real runs: tiny ones, trained here."""

import numpy as np
import pytest
import torch

from ssod_imwa.analysis import report_pictures
from ssod_imwa.analysis.report import read_runs
from ssod_imwa.analysis.report_pictures import add_examples, agreement
from ssod_imwa.detection.data.records import Annotations, Detections
from ssod_imwa.runs import run as runs
from ssod_imwa.runs.config import load_config
from ssod_imwa.visualization.page import Page

pytestmark = pytest.mark.usefixtures("one_thread")


def annotations(boxes, labels):
    nothing = np.zeros(len(labels), bool)
    return Annotations(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), nothing, nothing
    )


def detections(boxes, labels, scores):
    return Detections(
        torch.tensor(boxes).float().view(-1, 4), torch.tensor(labels).long(), torch.tensor(scores)
    )


def test_agreement_is_the_f1_of_what_is_above_the_threshold():
    box, other = [0, 0, 10, 10], [50, 50, 60, 60]
    scores = agreement(
        [
            detections([box], [0], [0.9]),
            detections([box, other], [0, 0], [0.9, 0.8]),
            detections([box], [1], [0.9]),
            detections([box], [0], [0.4]),
            detections([], [], []),
        ],
        [
            annotations([box], [0]),
            annotations([box], [0]),
            annotations([box], [0]),
            annotations([box], [0]),
            annotations([], []),
        ],
    )
    assert scores.tolist() == pytest.approx([1, 2 / 3, 0, 0, 1])


def test_the_best_images_come_first_and_the_worst_next(detection_config, monkeypatch):
    captions = []
    draw = report_pictures.contact_sheet

    def record(pictures, texts, **settings):
        captions.append([float(text.split("F1 ")[1]) for text in texts if "F1 " in text])
        return draw(pictures, texts, **settings)

    known = iter([np.array([0.2, 0.9, 0.5, 0.7])])
    monkeypatch.setattr(report_pictures, "agreement", lambda *_: next(known))
    monkeypatch.setattr(report_pictures, "contact_sheet", record)
    cfg = detection_config("SOLVER.MAX_ITER", 2)
    runs.train(cfg)
    add_examples(Page("x"), read_runs([cfg.OUTPUT_DIR]), images=4)
    assert captions == [[0.9, 0.7, 0.5], [0.2, 0.5, 0.7]]


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
