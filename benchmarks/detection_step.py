"""Where the time of a detector's training step goes, per recipe and toolkit.

    python benchmarks/detection_step.py                                  # digit scenes, on a CPU
    python benchmarks/detection_step.py --recipes configs/digits/dense_teacher.yaml
    python benchmarks/detection_step.py --toolkits torchvision detectron2 -- MODEL.DEVICE cuda

Each row trains a recipe with this package's trainer, members, views and all, and gives the median
of each part in milliseconds: waiting for data, the teacher's pass, what makes labels and losses of
it, the student's passes, the backward pass, the optimizer, the EMA, and what is left. Where
detectron2 is installed and asked for, its own SimpleTrainer trains the same detector on the same
labeled views in the row below: it has no parts, and no teacher. `--cpu-time` counts seconds of the
processor instead of the clock's, which other programs do not lengthen; threads add up then.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.cli import run_main
from ssod_imwa.config.shared import batch_sizes
from ssod_imwa.detection.methods.supervised import labeled_views
from ssod_imwa.detection.task import DetectionTask
from ssod_imwa.engine.device import pick_device
from ssod_imwa.engine.seeding import seed_everything
from ssod_imwa.engine.trainer import Trainer
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.solver import build_task_optimizer

RECIPES = ["configs/digits/supervised.yaml", "configs/digits/unbiased_teacher.yaml"]
FRAGMENTS = {"torchvision": [], "detectron2": ["configs/models/detectron2_r18_as_torchvision.yaml"]}
PARTS = ("data", "teacher", "labels", "student", "backward", "optimizer", "EMA", "rest")
# Teachers from the first step on, with labels to learn: as in the later part of a run.
STEADY = {
    "SSOD.EMA_START_ITERS": "0",
    "SSOD.BURN_IN_ITERS": "0",
    "SSOD.BBOX_THRESHOLD": "0.05",
}


class Clock:
    """Adds up the seconds of named parts, each without those inside it, step by step."""

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        self.device, self.now = device, now
        self.steps: list[dict[str, float]] = []
        self._inside: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as this part's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._moment()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                seconds = self._moment() - start
                self.steps[-1][part] += seconds - self._inside.pop()
                if self._inside:
                    self._inside[-1] += seconds

        return call

    def begin_step(self) -> None:
        self.steps.append(defaultdict(float))

    def medians(self, warm_up: int) -> dict[str, float]:
        """Milliseconds of each part, and of whole steps."""
        steps = self.steps[warm_up:]
        parts = {p: 1000 * statistics.median(step[p] for step in steps) for p in PARTS}
        return {**parts, "step": 1000 * statistics.median(sum(step.values()) for step in steps)}

    def _moment(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now()


def build_trainer(cfg: Any, device: torch.device, steps: int) -> tuple[Trainer, DetectionTask]:
    """The trainer of a recipe without hooks."""
    task = DetectionTask(cfg)
    schedule = EpisodeSchedule(steps)
    seed_everything(cfg.SEED, "initial weights")
    method = task.build_method(device)
    solver = cfg.SOLVER
    optimizer = build_task_optimizer(task, method.student)
    for group in optimizer.param_groups:  # as in the first step: no hook sets rates
        group["lr"] *= solver.WARMUP_FACTOR
    batches = task.build_batches(schedule, device, method.reads)
    amp = getattr(torch, solver.AMP.DTYPE) if solver.AMP.ENABLED else None
    return Trainer(method, schedule, batches, optimizer, seed=cfg.SEED, amp_dtype=amp), task


def watch(trainer: Trainer, clock: Clock) -> None:
    """Time the parts of a trainer's step."""
    method: Any = trainer.method
    student = method.student
    student.forward = clock.timed("student", student.forward)
    if method.teacher is not None:
        teacher = method.teacher.model
        for name in ("detect", "dense_maps", "score_regions"):
            setattr(teacher, name, clock.timed("teacher", getattr(teacher, name)))
    method.losses = clock.timed("labels", method.losses)
    method.after_step = clock.timed("EMA", method.after_step)
    anything: Any = trainer
    anything._backward = clock.timed("backward", trainer._backward)
    optimizer: Any = trainer.optimizer
    optimizer.step = clock.timed("optimizer", optimizer.step)
    read = trainer._batches

    def timed_batches(start: int) -> Iterator[Any]:
        stream = iter(read(start))
        following = clock.timed("data", lambda: next(stream))
        while True:
            yield following()

    anything._batches = timed_batches
    run_step = clock.timed("rest", trainer.run_step)

    def step() -> None:
        clock.begin_step()
        run_step()

    anything.run_step = step


def measure(files: list[str], arguments: argparse.Namespace) -> tuple[dict[str, float], int]:
    """Medians of a recipe's parts, and images of a step."""
    cfg = recipe(files, arguments.settings)
    device = pick_device(cfg.MODEL.DEVICE)
    clock = Clock(device, time.process_time if arguments.cpu_time else time.perf_counter)
    trainer, _ = build_trainer(cfg, device, arguments.warm_up + arguments.steps)
    watch(trainer, clock)
    trainer.train()
    return clock.medians(arguments.warm_up), sum(batch_sizes(cfg).values())


def measure_peer(files: list[str], arguments: argparse.Namespace) -> tuple[dict[str, float], int]:
    """The same for detectron2's own trainer with the detector of a recipe, on its labeled views."""
    from detectron2.engine import SimpleTrainer
    from detectron2.utils.events import EventStorage

    cfg = recipe(files, arguments.settings)
    device = pick_device(cfg.MODEL.DEVICE)
    steps = arguments.warm_up + arguments.steps
    trainer, _ = build_trainer(cfg, device, steps)
    detector: Any = trainer.method.student

    def inputs() -> Iterator[list[dict[str, Any]]]:
        for batch in trainer._batches(0):
            strong = "strong" in trainer.method.reads["labeled"]
            images, targets = labeled_views(batch.to(device)["labeled"], strong=strong)
            parts = detector.parts(images)
            instances = parts._instances(targets)
            yield [
                {**entry, "instances": boxes}
                for entry, boxes in zip(parts._inputs(), instances, strict=True)
            ]

    clock = Clock(device, time.process_time if arguments.cpu_time else time.perf_counter)
    with EventStorage():
        peer = SimpleTrainer(detector.model.train(), inputs(), trainer.optimizer)
        run_step = clock.timed("rest", peer.run_step)
        for peer.iter in range(steps):
            clock.begin_step()
            run_step()
    return clock.medians(arguments.warm_up), cfg.SOLVER.IMS_PER_BATCH


def recipe(files: list[str], settings: list[str]) -> Any:
    """The configuration of a recipe whose teacher labels from the first step on."""
    known = load_config(files, settings)
    steady = [x for key, value in STEADY.items() if key[5:] in known.SSOD for x in (key, value)]
    return load_config(files, [*steady, *settings])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="FILE")
    parser.add_argument("--toolkits", nargs="+", default=["torchvision"], choices=list(FRAGMENTS))
    parser.add_argument("--steps", type=int, default=20, help="that are counted")
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor")
    parser.add_argument("settings", nargs="*", metavar="KEY VALUE", help="of all recipes")
    return parser.parse_args()


def main() -> None:
    """Print a row for each recipe and toolkit."""
    arguments = parse_arguments()
    table = Table("recipe", "toolkit", "step ms", "images/s", *PARTS)
    for toolkit in arguments.toolkits:
        for file in arguments.recipes:
            files = [file, *FRAGMENTS[toolkit]]
            rows = [(toolkit, measure(files, arguments))]
            if toolkit == "detectron2" and "supervised" in Path(file).stem:
                rows.append(("detectron2's trainer", measure_peer(files, arguments)))
            for name, (medians, images) in rows:
                rate = 1000 * images / medians["step"]
                shares = [f"{medians[part]:.1f}" for part in PARTS]
                recipe_name = str(Path(file).with_suffix("").relative_to("configs"))
                table.add_row(recipe_name, name, f"{medians['step']:.0f}", f"{rate:.1f}", *shares)
    Console(width=None if Console().is_terminal else 140).print(table)


if __name__ == "__main__":
    run_main(main)
