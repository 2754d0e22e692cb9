from pathlib import Path

import pytest
from torch import nn

from ssod_imwa.analysis.build import TrainedRun
from ssod_imwa.runs.open import open_task

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
