"""Milliseconds of a FixMatch step of a WRN-28-2, piece by piece, beside the public codes' loop.

    python benchmarks/fixmatch_step.py                           # noise of CIFAR's shape
    python benchmarks/fixmatch_step.py --data FOLDER             # cifar10_lt100 in a folder
    python benchmarks/fixmatch_step.py --device cuda --workers 16 --steps 50
    python benchmarks/fixmatch_step.py --batch-size 2 --steps 2 --workers 0  # half a minute

B labeled images in a weak view, μB unlabeled ones in a weak and a strong view, one forward pass,
SGD with Nesterov's momentum and an EMA, as in DASO's recipe (μ = 2). Rows:

    ours        our input (images in memory, views of whole batches, no process) and our trainer
    usual       the public PyTorch codes: torchvision's transforms and RandAugment in Pillow, image
                by image in the processes of two DataLoaders, and their plain loop
    usb         USB's data sets, augmentation, FixMatch, network and hooks (those of the update and
                the EMA; none that logs), where `semilearn` can be imported, else left out

`input` is what a step costs without training: `data` to choose and copy the images,
`augmentation` to make their views (ours), or all of it while no step competes for the processors
(the others). `share` is input / step; a step of ours waits for its input, that of the others only
where their processes do not keep up. The pieces are timed apart in a loop of their own; `step` is
the whole of an undisturbed one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.data.augmentation import Statistics
from ssod_imwa.classification.data.catalog import register_images
from ssod_imwa.classification.data.datasets import CIFAR10_CLASSES, ClassificationDataset
from ssod_imwa.classification.data.images import open_images
from ssod_imwa.classification.data.imbalance import imbalanced_counts
from ssod_imwa.classification.data.randaugment import NUMBERS, randaugment
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.build import Settings, build_classifier
from ssod_imwa.classification.task import ClassificationTask
from ssod_imwa.cli import run_main
from ssod_imwa.data.order import BatchStream
from ssod_imwa.engine.memory import keep_freed_memory
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.solver import build_optimizer
from ssod_imwa.engine.trainer import HookBase, Trainer
from ssod_imwa.runs.config import load_config

STATISTICS = Statistics((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
PIECES = ("data", "augmentation", "forward", "backward", "optimizer", "EMA")
SKIPPED = 2  # steps that do not count
Seconds = dict[str, list[float]]


def make_noise(root: object) -> ClassificationDataset:
    """Random images with the class counts of cifar10_lt100."""
    counts = imbalanced_counts(10, maximum=5000, ratio=100)
    labels = torch.from_numpy(np.repeat(np.arange(10), counts))
    shape = (len(labels), 3, 32, 32)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ClassificationDataset("noise", labels, CIFAR10_CLASSES, torch.from_numpy(pixels))


def configuration(args: argparse.Namespace) -> CfgNode:
    """Of DASO's recipe for CIFAR-10-LT (N1 = 500, M1 = 4000, ratio 100)."""
    settings = {
        "TASK": "classification",
        "DATASETS.TRAIN": ["cifar10_lt100_train" if args.data else "noise"],
        "DATASETS.TEST": ["cifar10_lt100_test" if args.data else "noise"],
        "DATASETS.ROOT": args.data or "",
        "CLS.ALGORITHM": "fixmatch",
        "CLS.MODEL.NAME": args.model,
        "CLS.EMA_DECAY": 0.999,
        "CLS.IMBALANCE.RATIO": 100,
        "CLS.IMBALANCE.MAXIMUM": 500,
        "CLS.UNLABELED.MAXIMUM": 4000,
        "MODEL.PIXEL_MEAN": [255 * x for x in STATISTICS.mean],
        "MODEL.PIXEL_STD": [255 * x for x in STATISTICS.std],
        "MODEL.DEVICE": str(args.device),
        "SOLVER.MAX_ITER": 1_000_000,
        "SOLVER.IMS_PER_BATCH": args.batch_size,
        "SOLVER.IMS_PER_BATCH_UNLABELED": args.mu * args.batch_size,
    }
    return load_config(overrides=[str(x) for pair in settings.items() for x in pair])


# ------------------------------------------------------------------------------------------- ours


def our_input(task: ClassificationTask, *, copies_alone: bool) -> Iterator[object]:
    """Batches of our input, or only the choice and the copies of their images."""
    cfg, schedule = task.cfg, EpisodeSchedule(1_000_000)
    if not copies_alone:
        yield from task.build_batches(schedule, task.device, READS)(0)
    train, unlabeled = task.data.train, task.data.unlabeled
    assert unlabeled is not None
    sizes = (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED)
    streams = []
    for kind, images, size in zip(READS, (train, unlabeled), sizes, strict=True):
        order = BatchStream([np.arange(len(images))], size, seed=1, member=0, kind=kind)
        streams.append((open_images(images, task.device), order))
    for t in range(len(schedule)):
        copies = []
        for images, order in streams:
            indices = torch.tensor(order.batch(t)).to(task.device)
            copies.append((images.images[indices], images.labels[indices]))
        yield copies


READS = {"labeled": ("weak",), "unlabeled": ("weak", "strong")}


def our_method(task: ClassificationTask) -> tuple[Method, torch.optim.Optimizer]:
    """FixMatch with its EMA, and the optimizer."""
    method = task.build_method(task.device)
    optimizer = build_optimizer(
        method.student,
        name="SGD",
        lr=0.03,
        momentum=0.9,
        weight_decay=5e-4,
        weight_decay_norm=5e-4,
        nesterov=True,
    )
    return method, optimizer


def measure_ours(args: argparse.Namespace) -> Seconds:
    """Pieces and whole steps of our loop."""
    task = ClassificationTask(configuration(args))
    clock = _Clock(task.device)
    seconds: Seconds = {
        "data": clock.of_each(our_input(task, copies_alone=True), 10 * args.steps),
        "input": clock.of_each(our_input(task, copies_alone=False), 10 * args.steps),
    }
    method, optimizer = our_method(task)
    batches = our_input(task, copies_alone=False)
    pieces = {name: [] for name in PIECES[2:]}
    method.set_train_mode()
    for t in range(args.steps + SKIPPED):
        batch = next(batches)
        clock.start()
        losses = method.losses(batch, t)
        total = sum(value for name, value in losses.items() if name.startswith("loss"))
        pieces["forward"].append(clock.lap())
        optimizer.zero_grad()
        total.backward()
        pieces["backward"].append(clock.lap())
        optimizer.step()
        pieces["optimizer"].append(clock.lap())
        method.after_step(t)
        pieces["EMA"].append(clock.lap())
    seconds |= {name: values[SKIPPED:] for name, values in pieces.items()}
    seconds["step"] = our_steps(task, clock, args)
    return seconds


def our_steps(task: ClassificationTask, clock: _Clock, args: argparse.Namespace) -> list[float]:
    """Whole steps of our trainer, with all that it checks and seeds."""
    method, optimizer = our_method(task)
    schedule = EpisodeSchedule(args.steps + SKIPPED)
    batches = task.build_batches(schedule, task.device, method.reads)
    trainer = Trainer(method, schedule, batches, optimizer, seed=1)
    hook = _Steps(clock)
    trainer.register_hooks([hook])
    trainer.train()
    return hook.seconds[SKIPPED:]


class _Steps(HookBase):
    """Seconds from the end of a step to that of the next."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock
        self.seconds: list[float] = []

    def before_train(self) -> None:
        self.clock.start()

    def after_step(self) -> None:
        self.seconds.append(self.clock.lap())


# ----------------------------------------------------------------------------------------- usual


class _Pictures(Dataset):
    """Images from one array, in the views of the public codes."""

    def __init__(self, images: ClassificationDataset, *, views: tuple[str, ...]) -> None:
        assert images.images is not None
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        self.views = views
        self.weak = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            ]
        )
        self.finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*STATISTICS)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int]:
        image = Image.fromarray(self.pixels[index])
        views = []
        for name in self.views:
            view = self.weak(image)
            if name == "strong":
                view = randaugment(view, torch.rand(NUMBERS).tolist())
            views.append(self.finish(view))
        return views, self.labels[index]


def usual_input(task: ClassificationTask, args: argparse.Namespace) -> Iterator[list[Any]]:
    """Batches of two loaders, which never end."""
    data, size = task.data, args.batch_size
    sets = (
        (data.train, READS["labeled"], size),
        (data.unlabeled, READS["unlabeled"], args.mu * size),
    )
    loaders = []
    for images, views, batch in sets:
        assert images is not None
        pictures = _Pictures(images, views=views)
        order = torch.utils.data.RandomSampler(pictures, replacement=True, num_samples=10**7)
        loaders.append(
            DataLoader(
                pictures,
                batch,
                sampler=order,
                num_workers=args.workers,
                pin_memory=task.device.type == "cuda",
            )
        )
    for labeled, unlabeled in zip(*loaders, strict=True):
        parts = [labeled[0][0], labeled[1], *unlabeled[0]]
        yield [part.to(task.device, non_blocking=True) for part in parts]


def measure_usual(args: argparse.Namespace) -> Seconds:
    """Pieces and whole steps of the public codes' loop."""
    task = ClassificationTask(configuration(args))
    clock = _Clock(task.device)
    # Each process keeps two batches ready, which must not count as made in no time.
    ready = 2 * args.workers
    seconds = {"input": clock.of_each(usual_input(task, args), args.steps, skipped=ready + SKIPPED)}
    model = build_classifier(args.model, Settings(10, image_size=32)).to(task.device)
    ema = deepcopy(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    pieces = {name: [] for name in (*PIECES[2:], "step")}
    skipped = ready + SKIPPED
    batches = usual_input(task, args)
    model.train()
    begin = time.perf_counter()
    for _ in range(args.steps + skipped):
        images, labels, weak, strong = next(batches)
        clock.start()
        loss = fixmatch_loss(model, images, labels, weak, strong)
        loss.item()
        pieces["forward"].append(clock.lap())
        model.zero_grad()
        loss.backward()
        pieces["backward"].append(clock.lap())
        optimizer.step()
        pieces["optimizer"].append(clock.lap())
        follow(ema, model)
        pieces["EMA"].append(clock.lap())
        now = time.perf_counter()
        pieces["step"].append(now - begin)
        begin = now
    return seconds | {name: values[skipped:] for name, values in pieces.items()}


def fixmatch_loss(
    model: ImageClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    weak: torch.Tensor,
    strong: torch.Tensor,
) -> torch.Tensor:
    """FixMatch's loss of one batch."""
    logits = model(torch.cat([images, weak, strong]))
    labeled, of_weak, of_strong = logits.split([len(images), len(weak), len(strong)])
    confidence, targets = of_weak.detach().softmax(1).max(1)
    losses = F.cross_entropy(of_strong, targets, reduction="none")
    return F.cross_entropy(labeled, labels) + (losses * (confidence >= 0.95)).mean()


@torch.no_grad()
def follow(ema: nn.Module, model: nn.Module) -> None:
    """Move an EMA, entry by entry, as the public codes do."""
    for mean, value in zip(ema.parameters(), model.parameters(), strict=True):
        mean.mul_(0.999).add_(value, alpha=0.001)
    for mean, value in zip(ema.buffers(), model.buffers(), strict=True):
        mean.copy_(value)


# ------------------------------------------------------------------------------------------- usb


def usb_input(task: ClassificationTask, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches of USB's data sets, as its configurations for CIFAR have them."""
    from semilearn.datasets.augmentation import RandAugment
    from semilearn.datasets.cv_datasets.datasetbase import BasicDataset

    start = [
        transforms.Resize(32),
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
    ]
    finish = [transforms.ToTensor(), transforms.Normalize(*STATISTICS)]
    weak = transforms.Compose([*start, *finish])
    strong = transforms.Compose([*start, RandAugment(3, 5), *finish])
    loaders = []
    for images, is_unlabeled in ((task.data.train, False), (task.data.unlabeled, True)):
        pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        labels = images.labels.numpy()
        data = BasicDataset(
            "fixmatch", pixels, labels, 10, weak, is_unlabeled, strong if is_unlabeled else None
        )
        order = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**7)
        size = args.mu * args.batch_size if is_unlabeled else args.batch_size
        loaders.append(DataLoader(data, size, sampler=order, num_workers=args.workers))
    for labeled, unlabeled in zip(*loaders, strict=True):
        parts = {**labeled, **unlabeled}
        wanted = ("x_lb", "y_lb", "x_ulb_w", "x_ulb_s")
        yield {name: parts[name].to(task.device, non_blocking=True) for name in wanted}


def measure_usb(args: argparse.Namespace) -> Seconds:
    """Whole steps of USB's FixMatch."""
    from semilearn import get_algorithm, get_config, get_net_builder

    task = ClassificationTask(configuration(args))
    clock, skipped = _Clock(task.device), 4 * args.workers + SKIPPED
    seconds = {"input": clock.of_each(usb_input(task, args), args.steps, skipped=skipped)}
    settings = {
        "algorithm": "fixmatch",
        "net": args.model,
        "dataset": "none",  # ours takes its place
        "num_classes": 10,
        "num_train_iter": 1_000_000,
        "epoch": 1,
        "hard_label": True,
        "T": 0.5,
        "p_cutoff": 0.95,
        "gpu": None,
        "rank": 0,
        "distributed": False,
    }
    network = get_net_builder(args.model, from_name=False)
    with redirect_stdout(None):
        algorithm = get_algorithm(get_config(settings), network, None, None)
    algorithm.model.to(task.device)
    algorithm.ema_model.to(task.device)
    hooks = {type(hook).__name__: hook for hook in algorithm._hooks}
    hooks["EMAHook"].before_run(algorithm)
    algorithm.model.train()
    taken, batches = [], usb_input(task, args)
    clock.start()
    for _ in range(args.steps + skipped):
        algorithm.out_dict, algorithm.log_dict = algorithm.train_step(**next(batches))
        hooks["ParamUpdateHook"].after_train_step(algorithm)
        hooks["EMAHook"].after_train_step(algorithm)
        taken.append(clock.lap())
    return seconds | {"step": taken[skipped:]}


# ------------------------------------------------------------------------------------- measuring


class _Clock:
    """Seconds between laps; a GPU is waited for before the clock is read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = 0.0

    def start(self) -> None:
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed

    def of_each(
        self, batches: Iterator[object], count: int, *, skipped: int = SKIPPED
    ) -> list[float]:
        """Seconds of each batch."""
        self.start()
        seconds = []
        for _ in range(count + skipped):
            next(batches)
            seconds.append(self.lap())
        return seconds[skipped:]


ROWS: dict[str, Callable[[argparse.Namespace], Seconds]] = {
    "ours": measure_ours,
    "usual": measure_usual,
    "usb": measure_usb,
}


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each loop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="FOLDER", help="with cifar10_lt100; default: noise")
    parser.add_argument("--model", default="wrn_28_2")
    parser.add_argument("--batch-size", type=int, default=64, help="B, labeled images")
    parser.add_argument("--mu", type=int, default=2, help="unlabeled images for each labeled one")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of each usual loader")
    parser.add_argument("--steps", type=int, default=5, help="that count")
    args = parser.parse_args(arguments)
    if not args.data:
        register_images("noise", make_noise)
    if args.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    where = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    print(
        f"{args.model} on {where}, {torch.get_num_threads()} threads, B = {args.batch_size}, "
        f"μ = {args.mu}: milliseconds, medians of {args.steps} steps"
    )
    columns = (*PIECES, "input", "step")
    print(f"{'':6}" + "".join(f"{name:>13}" for name in columns) + f"{'share':>8}")
    for row, measure in ROWS.items():
        if row == "usb" and importlib.util.find_spec("semilearn") is None:
            continue
        seconds = {name: statistics.median(values) for name, values in measure(args).items()}
        if "data" in seconds:
            seconds["augmentation"] = seconds["input"] - seconds["data"]
        cells = [f"{1e3 * seconds[x]:>13.2f}" if x in seconds else f"{'-':>13}" for x in columns]
        share = seconds["input"] / seconds["step"]
        print(f"{row:6}" + "".join(cells) + f"{share:>8.1%}", flush=True)


if __name__ == "__main__":
    run_main(main)
