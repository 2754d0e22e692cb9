from pathlib import Path

import pytest
import torch
from support import assert_equal, copied
from torch import nn

from ssod_imwa.analysis.build import TrainedRun, build_recompute, numbers_table
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.schedule import build_schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(task, model):
    return TrainedRun(Path("run"), Path("run/model_final.pth"), task, model)


def test_epochs_of_balanced_subsets_are_those_of_the_schedule(digits_config):
    cfg = digits_config(
        *("CLS.IMBALANCE.RATIO", 20, "CLS.SAMPLER.NAME", "balanced_subset"),
        *("CLS.SAMPLER.PER_CLASS", 10, "SOLVER.IMS_PER_BATCH", 16, "CLS.SCHEDULE.EPOCHS", 6),
        *("CLS.SCHEDULE.STEPS", [3], "CLS.SCHEDULE.WARMUP", 0),
    )
    task = open_task(cfg)
    epochs = task.cfg.SOLVER.MAX_ITER / opened(task, nn.Identity()).iterations_per_epoch
    assert epochs == pytest.approx(6, abs=0.1)


def test_batch_norms_are_estimated_on_all_that_the_method_reads(digits_fixmatch_config):
    cfg = digits_fixmatch_config("SOLVER.MAX_ITER", 2)
    task = open_task(cfg)
    method = task.build_method(torch.device("cpu"))
    batches = task.build_batches(build_schedule(cfg), torch.device("cpu"), method.reads)
    model, start = method.student.eval(), copied(method.student.state_dict())
    task.build_bn_recomputation(batches, count=2)({"student": model})
    expected = copied(model.state_dict())
    model.load_state_dict(start)
    build_recompute(opened(task, model))(model)
    assert_equal(model.state_dict(), expected)


def test_numbers_of_many_images_are_written_out():
    table = numbers_table("x", ("class", "images", "loss"), [("a", 12345.6, 0.012345)])
    assert [list(column.cells) for column in table.columns] == [["a"], ["12346"], ["0.01235"]]
