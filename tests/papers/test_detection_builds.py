"""Every run of detection's tables can be built, and what they train does a step.

Detectors are on the meta device, which has shapes and no numbers; each pair of method and detector
trains a step on small noise.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssod_imwa.averaging import ema
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.data.streams import select_views
from ssod_imwa.detection import build
from ssod_imwa.detection.data.records import Targets, View
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.papers.reproduction import run_config
from ssod_imwa.papers.tables import needed_runs, read_table

TABLES = Path(__file__).parents[2] / "configs/tables"
CLASSES = 20


def runs_of_detection():
    for path in sorted(TABLES.glob("*.yaml")):
        table = read_table(path)
        for run in needed_runs(table, table.rows):
            cfg = run_config(table, run, seed=1, output=Path("out"))
            if cfg.TASK != "detection":
                break
            yield f"{path.stem}: {run.name}", cfg


RUNS = dict(runs_of_detection())


def without_weights(cfg, **settings):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    for key, value in settings.items():
        cfg.MODEL[key] = value
    cfg.freeze()
    return cfg


def recipe(cfg):
    """What decides detector and method, but not schedule, data or averaging."""
    cfg = without_weights(cfg)
    cfg.defrost()
    for name in ("SOLVER", "IMWA", "TEST", "DATASETS", "OUTPUT_DIR", "SEED", "INPUT", "DATALOADER"):
        del cfg[name]
    return cfg.dump()


def test_there_are_tables_of_detection():
    methods = {cfg.SSOD.ALGORITHM for cfg in RUNS.values()}
    assert {"supervised", "unbiased_teacher", "soft_teacher", "dense_teacher"} <= methods


@pytest.mark.slow
def test_every_run_can_be_built(monkeypatch):
    monkeypatch.setattr(ema, "nonfinite", lambda tensors: [])  # there are no numbers
    reads = {}
    for name, cfg in RUNS.items():
        solver = cfg.SOLVER
        schedule = EpisodeSchedule(
            solver.MAX_ITER, episodes=cfg.IMWA.EPISODES, members=cfg.IMWA.MEMBERS
        )
        assert len(schedule) == solver.MAX_ITER * cfg.IMWA.MEMBERS, name
        assert all(step < solver.MAX_ITER for step in solver.get("STEPS", ())), name
        assert solver.WARMUP_ITERS < solver.MAX_ITER, name
        if (key := recipe(cfg)) not in reads:
            with torch.device("meta"):
                method = build.build_method(cfg, build_detector(without_weights(cfg), CLASSES))
            reads[key] = method.reads
        for views in reads[key].values():
            assert set(select_views(build.build_views(cfg), views)) >= set(views), name


def view(labeled):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 96, 128), np.uint8))
    targets = None
    if labeled:
        targets = Targets(torch.tensor([[10.0, 10, 60, 70]]), torch.tensor([3]))
    return View(image, torch.eye(3, dtype=torch.float64), targets)


def batch(reads):
    return Batch(
        **{
            name: Part({v: [view(name == "labeled")] for v in views}, None, torch.arange(1))
            for name, views in reads.items()
        }
    )


def kinds():
    """A run of each pair of method and detector."""
    pairs = {}
    for cfg in RUNS.values():
        model = cfg.MODEL.get("META_ARCHITECTURE", cfg.MODEL.TOOLKIT)
        pairs.setdefault(f"{cfg.SSOD.ALGORITHM}, {model}", cfg)
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("pair", sorted(kinds()))
def test_a_step_of_each_method_on_each_detector(pair):
    cfg = without_weights(kinds()[pair])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = build.build_method(cfg, build_detector(cfg, CLASSES))
    method.set_train_mode()
    late = cfg.SOLVER.MAX_ITER - 1  # past every burn-in
    losses = method.losses(batch(method.reads), late)
    terms = [value for name, value in losses.items() if name.startswith("loss")]
    torch.stack(terms).sum().backward()
    assert all(torch.isfinite(value) for value in terms)
    assert any(p.grad is not None and p.grad.any() for p in method.student.parameters())
    method.after_step(late)
