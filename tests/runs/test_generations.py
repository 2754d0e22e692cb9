"""Runs of two generations on digits."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode
from support import assert_equal, final_weights, train_in_parts

from ssod_imwa.analysis.build import open_run
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.errors import CheckpointError, ConfigError
from ssod_imwa.runs import generations, run
from ssod_imwa.runs.generations import all_generations
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import read_results

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(digits_fixmatch_config):
    """Two generations of CReST+ with two members in two episodes each."""
    return partial(
        digits_fixmatch_config,
        *("CLS.LABELER.NAME", "alignment", "CLS.LOSS.NAME", "balanced_softmax"),
        *("CLS.CREST.GENERATIONS", 2, "CLS.EMA_DECAY", 0.5, "CLS.UNLABELED.MAXIMUM", 30),
        *("IMWA.MEMBERS", 2, "IMWA.EPISODES", 4, "SOLVER.MAX_ITER", 8),
    )


def test_generations_begin_anew_on_more_labels(config):
    cfg = config()
    assert run.train(cfg) == 0
    first, last = all_generations(cfg)
    assert (f"{cfg.OUTPUT_DIR}/generation1", cfg.OUTPUT_DIR) == (first.OUTPUT_DIR, last.OUTPUT_DIR)
    for own in (first, last):
        results = read_results(own.OUTPUT_DIR)
        assert (results.iterations, results.imwa["episodes"]) == (4, 2)
        assert results.method == "fixmatch + la + crest+"
    before, after = open_task(first).data, open_task(last).data
    labels = json.loads(Path(first.OUTPUT_DIR, "pseudo_labels.json").read_text())
    assert len(after.train) == len(before.train) + len(labels["labels"])
    assert after.labeled_counts == before.train.counts
    assert open_run(cfg.OUTPUT_DIR).counts.tolist() == before.train.counts  # as in evaluation
    for position, label in zip(labels["positions"], labels["labels"], strict=True):
        same = (after.train.images == before.unlabeled.images[position]).flatten(1).all(1)
        assert label in after.train.labels[same].tolist()
    tasks = [open_task(own) for own in (first, last)]
    methods = [task.build_method(torch.device("cpu")) for task in tasks]
    # The loss adjusts by what is learned now, the alignment by the labels that were given.
    counts = torch.tensor(after.train.counts)
    torch.testing.assert_close(methods[1].criterion.log_prior.exp(), counts / counts.sum())
    target = torch.tensor(after.labeled_counts).float() ** 0.5
    torch.testing.assert_close(methods[1].labeler.target, target / target.sum())
    assert tasks[0].initialization != tasks[1].initialization


@pytest.mark.parametrize("step", [3, 11])
def test_a_run_goes_on_in_any_generation_bit_for_bit(config, step):
    """Of 16 global steps, 8 a generation; both steps are in the middle of a member's part."""
    whole, parts = config(output="whole"), config(output="parts")
    run.train(whole)
    train_in_parts(parts, step)
    assert_equal(final_weights(whole), final_weights(parts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("IMWA.EPISODES", 3), "IMWA.EPISODES = 3 is not allowed with CLS.CREST.GENERATIONS = 2"),
        (("IMWA.EPISODES", 1), "across which no average means anything"),
        (("SOLVER.MAX_ITER", 9), "must be a multiple, and EPOCHS 0"),
    ],
)
def test_averages_across_generations_are_refused(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        run.train(config(*settings))


def test_one_member_needs_no_episodes(config):
    cfg = config("IMWA.MEMBERS", 1, "IMWA.EPISODES", 1)
    assert [own.IMWA.EPISODES for own in all_generations(cfg)] == [1, 1]


def test_one_checkpoint_is_no_place_to_go_on_with_several_generations(config):
    with pytest.raises(CheckpointError, match="of one of 2 generations: continue with --resume"):
        run.train(config(), resume_from="model_0000003.pth")


def test_a_used_folder_of_the_last_generation_is_refused_before_the_first_one_trains(config):
    cfg = config()
    Path(cfg.OUTPUT_DIR).mkdir()
    Path(cfg.OUTPUT_DIR, "model_final.pth").touch()
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
        run.train(cfg)
    assert not Path(cfg.OUTPUT_DIR, "generation1").exists()


@pytest.mark.parametrize(
    ("resumes", "age", "labeled"),
    [
        (True, 1, []),
        (False, 1, [1]),
        (True, -1, [1]),  # they are of the run that the model's has overwritten
    ],
)
def test_labels_of_an_earlier_call_are_taken_by_one_that_resumes(
    tmp_path, monkeypatch, resumes, age, labeled
):
    numbers = {str(tmp_path / f"generation{number}"): number for number in (1, 2)}
    (tmp_path / "generation1").mkdir()
    (tmp_path / "generation1" / "model_final.pth").touch()
    path = tmp_path / "generation1" / generations.LABELS_FILE
    path.write_text("{}")
    seconds = (tmp_path / "generation1" / "model_final.pth").stat().st_mtime + age
    os.utime(path, (seconds, seconds))
    trained, made = [], []

    def train_one(cfg):
        trained.append(numbers[cfg.OUTPUT_DIR])
        return 0

    monkeypatch.setattr(
        generations, "_label", lambda cfg, path, ranks: made.append(numbers[cfg.OUTPUT_DIR])
    )
    cfgs = [CfgNode({"OUTPUT_DIR": folder}) for folder in numbers]
    assert generations.train_all(cfgs, Ranks.alone(), train_one, resumes=resumes) == 0
    assert (trained, made) == ([1, 2], labeled)
