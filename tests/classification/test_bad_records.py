"""Whole runs on images in files, some of which cannot be read or are missing."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from ssod_imwa.analysis.build import open_run
from ssod_imwa.errors import DataError
from ssod_imwa.runs import run
from ssod_imwa.runs.results import read_results

pytestmark = pytest.mark.usefixtures("one_thread")


MERGED = ("CLS.SAMPLER.NAME", "balanced_subset", "CLS.MERGE", "greedy_h")


@pytest.fixture
def files(config, tmp_path, write_image):
    """A run on two classes of images in files, the second of which is rare."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png", width=32, height=32)

    def load(*overrides):
        return config(
            *("DATASETS.ROOT", tmp_path, "CLS.IMBALANCE.RATIO", 0, "SOLVER.IMS_PER_BATCH", 4),
            *("DATASETS.TRAIN", "['folder:train']", "DATASETS.TEST", "['folder:test']"),
            *("CLS.INPUT.VIEWS", "['test']", "CLS.INPUT.SIZE", 32, "DATALOADER.NUM_WORKERS", 0),
            *overrides,
        )

    return load


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_a_test_image_that_is_cut_off_stops_the_run_before_it_trains(files, tmp_path):
    cut_off(tmp_path / "test" / "dog" / "1.png")
    cfg = files("DATASETS.ON_BAD_RECORD", "skip")
    with pytest.raises(DataError, match=r"data set folder:test cannot be read: image .*dog/1\.png"):
        run.train(cfg)
    assert not os.path.exists(cfg.OUTPUT_DIR)


@pytest.mark.parametrize("in_memory", [False, True])
def test_unreadable_training_images_stop_the_run_or_are_replaced(
    files, tmp_path, caplog, in_memory
):
    cut_off(tmp_path / "train" / "cat" / "2.png")
    settings = ["CLS.INPUT.IN_MEMORY", in_memory]
    settings += ["CLS.INPUT.VIEWS", "['none']"] if in_memory else []
    with pytest.raises(DataError, match=r"cat/2\.png cannot be read"):
        run.train(files(*settings))
    cfg = files(*settings, "DATASETS.ON_BAD_RECORD", "skip")
    caplog.clear()
    assert run.train(cfg, overwrite=True) == 0
    assert len([line for line in caplog.messages if "cat/2.png" in line]) == 1


def test_what_looks_at_training_images_leaves_unreadable_ones_out(files, tmp_path, caplog):
    """Class tracking, BTM's merging by the members' images, and the analysis of the run."""
    cut_off(tmp_path / "train" / "cat" / "2.png")
    settings = ["CLS.TRACK_PERIOD", 4, *MERGED, "CLS.SAMPLER.PER_CLASS", 4, "IMWA.MEMBERS", 2]
    with pytest.raises(DataError, match=r"cat/2\.png cannot be read"):
        run.train(files(*settings))
    cfg = files(*settings, "DATASETS.ON_BAD_RECORD", "skip")
    assert run.train(cfg, overwrite=True) == 0
    lines = Path(cfg.OUTPUT_DIR, "classes.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["member"] for row in rows] == [0, 1]
    # 7 images: 3 cats that can be read and 4 dogs, each predicted as one of them.
    cats, dogs = rows[-1]["ratio"]
    assert cats * 3 + dogs * 4 == pytest.approx(7, abs=1e-4)
    assert any("cat/2.png" in line and "is left out" in line for line in caplog.messages)
    extracted = open_run(cfg.OUTPUT_DIR).extract_train()
    assert extracted.labels.tolist() == [0] * 3 + [1] * 4


def test_an_unreadable_image_gets_no_label_for_the_next_generation(files, tmp_path, write_image):
    for i in range(5):
        write_image(tmp_path / "more" / f"{i}.png", width=32, height=32)
    cut_off(tmp_path / "more" / "2.png")
    cfg = files(
        *("CLS.ALGORITHM", "fixmatch", "CLS.INPUT.VIEWS", "['weak']", "SOLVER.WARMUP_ITERS", 0),
        *("DATASETS.TRAIN_UNLABELED", "['folder:more']", "SOLVER.IMS_PER_BATCH_UNLABELED", 4),
        *("CLS.CREST.GENERATIONS", 2, "DATASETS.ON_BAD_RECORD", "skip"),
    )
    assert run.train(cfg) == 0
    labels = json.loads(Path(cfg.OUTPUT_DIR, "generation1", "pseudo_labels.json").read_text())
    assert labels["positions"] == [0, 1, 3, 4]  # all others: no class is rarer than another


def test_a_class_that_is_not_tested_has_no_figures_and_leaves_the_means_alone(files, tmp_path):
    shutil.rmtree(tmp_path / "test" / "dog")
    for i in range(20):
        shutil.copy(tmp_path / "train/dog/0.png", tmp_path / "train" / "dog" / f"more{i}.png")
    cfg = files()
    run.train(cfg)
    metrics = read_results(cfg.OUTPUT_DIR).headline().metrics
    assert math.isnan(metrics["recall-dog"])
    assert math.isnan(metrics["medium"])
    assert metrics["few"] == metrics["top1"] == metrics["recall-cat"]
    text = Path(cfg.OUTPUT_DIR, "results.json").read_text()
    assert '"recall-dog": null' in text
