"""Our trainer with detectron2's detectors, from the configuration to the exported file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss

from ssod_imwa.detection.build import with_classes
from ssod_imwa.detection.data.digits import make_digits
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import FORMAT
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.runs import run
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.results import read_results
from ssod_imwa.runs.trained import read_trained

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]

REPOSITORY = Path(__file__).parents[2]
RECIPE = [
    REPOSITORY / "configs" / name
    for name in ("digits/unbiased_teacher_imwa.yaml", "models/detectron2_r18.yaml")
]
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


class StoppedError(Exception):
    """Stands for a machine that goes down."""


class StopAfter(HookBase):
    """Raises when a number of steps is done and saved."""

    def __init__(self, steps):
        self._steps = steps

    @property
    def name(self):
        return "stop"

    def after_step(self):
        if self.trainer.iter + 1 == self._steps:
            raise StoppedError


@pytest.fixture
def config(tmp_path):
    make_digits(tmp_path / "digits", train_scenes=20, test_scenes=10)

    def load(output, *overrides):
        settings = {
            "OUTPUT_DIR": tmp_path / output,
            "DATASETS.ROOT": tmp_path,
            "DATASETS.SPLIT.PERCENT": 50,
            "SOLVER.MAX_ITER": 4,
            "SOLVER.IMS_PER_BATCH": 1,
            "SOLVER.IMS_PER_BATCH_UNLABELED": 1,
            "SOLVER.CHECKPOINT_PERIOD": 1,
            "SSOD.BURN_IN_ITERS": 1,
            "SSOD.BBOX_THRESHOLD": 0.1,
            "IMWA.EPISODES": 2,
            "MODEL.FPN.OUT_CHANNELS": 8,
            "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        }
        pairs = [str(x) for pair in settings.items() for x in pair]
        return load_config(RECIPE, [*pairs, *overrides])

    return load


def final_weights(cfg):
    models = read_trained(cfg.OUTPUT_DIR).models
    return {f"{m}.{k}": v for m, state in models.items() for k, v in state.items()}


def test_advice_does_not_disturb_what_a_detector_counts_outside_its_weights(config, monkeypatch):
    """RetinaNet's losses are divided by a moving average, which every loss moves."""
    from detectron2.modeling.meta_arch import retinanet

    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)  # as below
    overrides = ("MODEL.DETECTRON2.CONFIG", RETINANET, "MODEL.RESNETS.NORM", "BN")
    overrides += ("SSOD.BURN_IN_ITERS", "4")  # the student is the model that is measured
    runs = [config(f"advise{n}", *overrides, "IMWA.ADVISE", str(n)) for n in (0, 4)]
    assert [run.train(cfg) for cfg in runs] == [0, 0]
    plain, advised = (final_weights(cfg) for cfg in runs)
    assert all(torch.equal(plain[name], advised[name]) for name in plain)
    rows = Path(runs[1].OUTPUT_DIR, "metrics.json").read_text().splitlines()
    assert sum('"advice/recomputed"' in row for row in rows) == 2


@pytest.mark.parametrize("overrides", [(), ("MODEL.DETECTRON2.CONFIG", RETINANET)])
def test_a_resumed_run_equals_one_never_stopped(config, monkeypatch, overrides):
    from detectron2.modeling.meta_arch import retinanet

    # A TorchScript function rounds otherwise from its third call on (docs/detectron2.md).
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)
    whole, stopped = config("whole", *overrides), config("stopped", *overrides)
    assert run.train(whole) == 0

    build_hooks = run._build_hooks

    def build_and_stop(*args, **options):
        hooks, signals = build_hooks(*args, **options)
        return [*hooks, StopAfter(3)], signals

    with monkeypatch.context() as patch:
        patch.setattr(run, "_build_hooks", build_and_stop)
        with pytest.raises(StoppedError):
            run.train(stopped)
    assert run.train(stopped, resume_from=True) == 0

    first, second = final_weights(whole), final_weights(stopped)
    assert all(torch.equal(first[name], second[name]) for name in first)
    final = [e for e in read_results(whole.OUTPUT_DIR).evaluations if e.stage == "final"]
    assert sorted(e.model for e in final) == ["student", "teacher"]


def test_the_trained_model_goes_back_to_detectron2(config, tmp_path):
    cfg = config("run")
    run.train(cfg)
    output = tmp_path / "detector.pth"
    tool = REPOSITORY / "tools" / "export.py"
    printed = subprocess.run(
        [sys.executable, tool, cfg.OUTPUT_DIR, "--output", output],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = {}
    exec(printed[printed.index("import torch") :], names)
    state = names["predictor"].model.state_dict()
    for name, tensor in read_trained(cfg.OUTPUT_DIR).weights.items():
        assert torch.equal(state[name.removeprefix("model.")], tensor)


LAZY = """
from detectron2 import model_zoo

open({marker!r}, "a").write("run")
model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
"""


def test_a_lazy_config_of_a_file_of_weights_is_run_if_the_command_line_names_it(config, tmp_path):
    marker, lazy = tmp_path / "marker", tmp_path / "fcos.py"
    lazy.write_text(LAZY.format(marker=str(marker)))
    cfg = with_classes(config("run", "MODEL.DETECTRON2.CONFIG", str(lazy)), tuple("0123456789"))
    state = build_detector(cfg, 10).state_dict()
    marker.unlink()
    file = tmp_path / "model_final.pth"
    content = {"student": state, "inference_model": "student", "format": FORMAT}
    write_checkpoint(file, {**content, "config": cfg.dump()})

    command = [sys.executable, REPOSITORY / "tools" / "export.py", file, "--output"]
    refused, done = (
        subprocess.run(
            [*command, tmp_path / name, *options],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "1000"},
        )
        for name, options in (("1.pth", ()), ("2.pth", ("--import", lazy)))
    )
    assert (refused.returncode, done.returncode) == (2, 0)
    assert f"names code to run: {lazy} (" in refused.stderr
    assert marker.read_text() == "run"
