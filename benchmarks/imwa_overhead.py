"""What IMWA costs over plain training, in time and in memory, for M = 1..6 members.

Each row trains Unbiased Teacher on synthetic images in a process of its own. The figures stand
beside the paper's (arXiv 2404.16331, Table VIII) and beside the least a member store can need.

    python benchmarks/imwa_overhead.py                   # R50-FPN, as in the paper; for a GPU
    python benchmarks/imwa_overhead.py --small-images    # its weights on 128 px; for a CPU

IMWA's work and memory depend on the weights alone, so small images change only the time of a step.
Columns: `boundary` is the time of all of IMWA's work in an episode, `overhead` its share of the
training time at the paper's 20 episodes of 180,000 iterations. `extra` is the peak over that of
M = 1: allocated GPU memory, or on a CPU the bytes of all tensors alive between two steps
(`resident` is the peak of the process there, which also holds what allocators do not give back).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.cli import require_new, run_main
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Targets, View
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.methods.unbiased_teacher import UnbiasedTeacher, UnbiasedTeacherOptions
from ssod_imwa.engine.hooks import IMWAHook
from ssod_imwa.engine.solver import build_optimizer
from ssod_imwa.engine.trainer import HookBase, Trainer
from ssod_imwa.engine.writers import peak_memory
from ssod_imwa.errors import writing

# Table VIII: GB of Unbiased Teacher on VOC with M = 1..6.
PAPER_GB = (6.63, 7.35, 8.06, 8.76, 9.45, 10.47)
PAPER_ITERATIONS_PER_EPISODE = 180_000 // 20
CLASSES = 20
GB = 1e9


@dataclass(frozen=True)
class Setting:
    """One row: a member count, a store, and the size of everything else."""

    members: int
    store: str
    store_device: str
    episodes: int
    steps: int
    small_images: bool
    device: str


@dataclass(frozen=True)
class Measurement:
    """What one run took, in seconds and bytes."""

    step_seconds: float
    boundary_seconds: float
    peak_bytes: int
    resident_bytes: int
    pair_bytes: int
    momentum_bytes: int


class TimedIMWAHook(IMWAHook):
    """Adds up the time of IMWA's own work, device work included."""

    seconds = 0.0

    def before_step(self) -> None:
        self._timed(super().before_step)

    def after_step(self) -> None:
        self._timed(super().after_step)

    def _timed(self, work: Callable[[], None]) -> None:
        synchronize(self.trainer.device)
        start = time.perf_counter()
        work()
        synchronize(self.trainer.device)
        self.seconds += time.perf_counter() - start


class LiveTensors(HookBase):
    """The largest number of bytes that tensors hold between two steps."""

    peak = 0

    def before_step(self) -> None:
        gc.collect()
        storages = {
            storage.data_ptr(): storage.nbytes()
            for item in gc.get_objects()
            if issubclass(type(item), torch.Tensor)  # isinstance would wake lazy proxies
            for storage in [item.untyped_storage()]
        }
        self.peak = max(self.peak, sum(storages.values()))


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synthetic_batch(*, small: bool) -> Batch:
    """A batch whose images are noise with two boxes each."""
    count, height, width = (2, 128, 128) if small else (4, 600, 1000)
    generator = torch.Generator().manual_seed(0)
    shape = (3, height, width)

    def view(*, labeled: bool) -> View:
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        boxes = torch.tensor([[8.0, 8, 60, 70], [30, 40, 100, 110]])
        targets = Targets(boxes, torch.tensor([0, 3])) if labeled else None
        return View(image, torch.eye(3, dtype=torch.float64), targets)

    def part(*, labeled: bool) -> Part:
        weak, strong = ([view(labeled=labeled) for _ in range(count)] for _ in range(2))
        return Part({"weak": weak, "strong": strong}, None, torch.arange(count))

    return Batch(labeled=part(labeled=True), unlabeled=part(labeled=False))


def build_trainer(setting: Setting) -> Trainer:
    """Unbiased Teacher with the paper's detector."""
    torch.manual_seed(0)
    detector = TorchvisionFasterRCNN(num_classes=CLASSES).to(setting.device)
    method = UnbiasedTeacher(detector, UnbiasedTeacherOptions(burn_in_iters=1))
    optimizer = build_optimizer(
        detector, name="SGD", lr=1e-4, momentum=0.9, weight_decay=1e-4, weight_decay_norm=0.0
    )
    iterations = setting.steps * setting.episodes
    schedule = EpisodeSchedule(iterations, episodes=setting.episodes, members=setting.members)
    batch = synthetic_batch(small=setting.small_images)

    def batches(start: int) -> Iterator[Batch]:
        return itertools.repeat(batch, len(schedule) - start)

    return Trainer(method, schedule, batches, optimizer, seed=1)


def measure(setting: Setting) -> Measurement:
    """Train once and report; runs in a process of its own."""
    trainer = build_trainer(setting)
    models = trainer.method.models()
    imwa = IMWA(
        trainer.schedule,
        models,
        optimizer=trainer.optimizer,
        store=setting.store,
        store_device=setting.store_device,
    )
    hook, live = TimedIMWAHook(imwa), LiveTensors()
    trainer.register_hooks([hook] if trainer.device.type == "cuda" else [live, hook])
    trainer.train()
    steps = [value for value, _ in trainer.storage.history("time").values()]
    pair = sum(x.nbytes for m in models.values() for x in [*m.parameters(), *m.buffers()])
    on_cuda = trainer.device.type == "cuda"
    return Measurement(
        step_seconds=sorted(steps)[len(steps) // 2],
        boundary_seconds=hook.seconds / setting.episodes,
        peak_bytes=peak_memory() if on_cuda else live.peak,
        # Kilobytes on Linux.
        resident_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        pair_bytes=pair,
        momentum_bytes=sum(p.nbytes for p in trainer.parameters),
    )


def floor_bytes(setting: Setting, result: Measurement) -> int:
    """Bytes that must be held beside the live pair: the start pair, and finished members.

    The start is not needed once the last member trains. A stream's sum in float64 counts double.
    Each waiting member's momentum is in host memory.
    """
    waiting = setting.members - 1
    momenta = waiting * result.momentum_bytes if setting.device == "cpu" else 0
    if setting.store_device == "cpu" or waiting == 0:
        return momenta
    if setting.store == "dict":
        return momenta + waiting * result.pair_bytes
    return momenta + (2 if waiting == 1 else 3) * result.pair_bytes


def make_table(rows: list[tuple[Setting, Measurement]]) -> Table:
    """All rows, each beside its floor and the paper."""
    table = Table()
    for name in ("M", "store", "device", "s/step", "boundary ms", "overhead %", "peak GB"):
        table.add_column(name, justify="right")
    for name in ("extra GB", "floor GB", "paper GB", "resident GB"):
        table.add_column(name, justify="right")
    base = {(s.store, s.store_device): m.peak_bytes for s, m in rows if s.members == 1}
    for setting, result in rows:
        store = setting.store, setting.store_device
        training = setting.members * PAPER_ITERATIONS_PER_EPISODE * result.step_seconds
        extra = f"{(result.peak_bytes - base[store]) / GB:.3f}" if store in base else "-"
        table.add_row(
            str(setting.members),
            *store,
            f"{result.step_seconds:.3f}",
            f"{1e3 * result.boundary_seconds:.1f}",
            f"{100 * result.boundary_seconds / training:.4f}",
            f"{result.peak_bytes / GB:.3f}",
            extra,
            f"{floor_bytes(setting, result) / GB:.3f}",
            f"{PAPER_GB[setting.members - 1] - PAPER_GB[0]:.2f}",
            f"{result.resident_bytes / GB:.2f}",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=list(range(1, 7)))
    parser.add_argument("--steps", type=int, default=3, help="of a member in an episode")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small-images", action="store_true", help="2 + 2 of 128 px, for a CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if not set(arguments.members) <= set(range(1, 7)):
        parser.error("--members must be 1..6, as in the paper's table")
    return arguments


def main() -> None:
    """Measure every combination, each in a fresh process, and print the table."""
    arguments = parse_arguments()
    if arguments.output:
        require_new(arguments.output)
    # On a CPU both store devices are the same memory.
    devices = ("same", "cpu") if arguments.device != "cpu" else ("same",)
    settings = [
        Setting(m, store, device, arguments.episodes, arguments.steps, arguments.small_images,
                arguments.device)
        for store, device in itertools.product(("dict", "stream"), devices)
        for m in arguments.members
    ]  # fmt: skip
    console = Console(width=120)
    rows = []
    # A peak never falls, so each row needs a process of its own.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for setting, result in zip(settings, pool.imap(measure, settings), strict=True):
            rows.append((setting, result))
            console.log(
                f"M={setting.members} {setting.store}/{setting.store_device}: boundary "
                f"{1e3 * result.boundary_seconds:.1f} ms, peak {result.peak_bytes / GB:.3f} GB"
            )
    console.print(make_table(rows))
    if arguments.output:
        hardware = platform.processor() or platform.machine()
        if arguments.device != "cpu":
            hardware = torch.cuda.get_device_name()
        figures = [asdict(setting) | asdict(result) for setting, result in rows]
        report = {"hardware": hardware, "torch": torch.__version__, "rows": figures}
        with writing(arguments.output):
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
