"""Images per second of a ResNet-32's epoch: ours beside that of the public codes.

The usual input is a torchvision data set (one array, a Pillow image for each item), transforms
that run image by image and a DataLoader with processes. Ours is a batch augmented at once where
the images are kept. Both make the same recipes with torchvision's AutoAugment. The usual step is
that of the public codes: contiguous images, SGD as it comes, loss and accuracy read back each time.
Our step is `Trainer`'s, with all that it checks and seeds, in a process that keeps its memory, as
`run.train` does (the public codes' process does not). `public` is the usual input and step,
`usual` the usual input with our step, `ours` our input and step; they run in turn, several times.
Medians over every ten steps are compared. Starting the processes is not counted, though it comes
back every epoch, nor is compiling.

    python benchmarks/cifar_epoch.py                             # noise of CIFAR's shape
    python benchmarks/cifar_epoch.py --data FOLDER               # cifar10_lt100 in a folder
    python benchmarks/cifar_epoch.py --device cuda --workers 16 --amp --compile reduce-overhead
    python benchmarks/cifar_epoch.py --images 2560 --repeats 1   # two minutes on two CPU cores

Columns: `images/s` and `step` are of training, `input` is the time of a batch without training.
`share` is input / step: what the step waits for, where nothing runs beside it (ours, or 0
processes). The rows `ours/...` are ours over another.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.data.augmentation import CIFAR_STATISTICS
from ssod_imwa.classification.data.datasets import (
    CIFAR10_CLASSES,
    ClassificationDataset,
    load_cifar10_lt100,
)
from ssod_imwa.classification.data.images import open_images
from ssod_imwa.classification.data.samplers import class_sampler
from ssod_imwa.classification.data.small_views import small_view
from ssod_imwa.classification.losses.cross_entropy import CrossEntropy, CrossEntropyOptions
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.build import CompileOptions
from ssod_imwa.classification.methods.erm import EmpiricalRisk
from ssod_imwa.classification.mixers import NoMixing
from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.cli import run_main
from ssod_imwa.config.options import Options, options_of
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.data.loader import build_train_batches
from ssod_imwa.data.streams import Stream
from ssod_imwa.engine.memory import keep_freed_memory
from ssod_imwa.engine.solver import build_optimizer
from ssod_imwa.engine.trainer import HookBase, Trainer

RECIPES = ("plain", "strong")
HOLE = 16  # pixels, of Cutout
CHUNK = 10  # steps that are timed together, so that a GPU need not be waited for at each
MODES = [mode for mode in options_of(CompileOptions)["COMPILE"].choices if mode]

Batches = Iterator[Batch]


def make_noise(count: int) -> ClassificationDataset:
    """Random images, as many of each class as of the others."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = torch.arange(count) % len(CIFAR10_CLASSES)
    return ClassificationDataset("noise", labels, CIFAR10_CLASSES, images=torch.from_numpy(pixels))


# ------------------------------------------------------------------------------ the usual input


class _Pictures(Dataset):
    """As torchvision's CIFAR10: pixels in one array, a picture and a transform for each item."""

    def __init__(self, dataset: ClassificationDataset, recipe: str) -> None:
        self.pixels = dataset.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = dataset.labels.tolist()
        strong = recipe == "strong"
        policy = transforms.AutoAugmentPolicy.CIFAR10
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                *([transforms.AutoAugment(policy, fill=128)] if strong else []),
                transforms.ToTensor(),
                *([_cut_out] if strong else []),
                transforms.Normalize(*CIFAR_STATISTICS),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def _cut_out(image: torch.Tensor) -> torch.Tensor:
    y, x = torch.randint(32, (2,)).tolist()
    image[:, max(0, y - HOLE // 2) : y + HOLE // 2, max(0, x - HOLE // 2) : x + HOLE // 2] = 0
    return image


def usual_batches(
    dataset: ClassificationDataset, recipe: str, *, steps: int, args: argparse.Namespace
) -> Batches:
    """Batches of the usual input."""
    # One pass for all steps: processes are started once.
    order = torch.arange(steps * args.batch_size) % len(dataset)
    order = order[torch.randperm(len(order))].tolist()
    loader = DataLoader(
        _Pictures(dataset, recipe),
        args.batch_size,
        sampler=order,
        num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
    )
    for images, labels in loader:
        yield Batch(labeled=Part({"image": images}, labels, labels)).to(args.device)


def our_batches(
    dataset: ClassificationDataset, recipe: str, *, steps: int, args: argparse.Namespace
) -> Batches:
    """Batches of our input."""
    labels, classes = dataset.labels, len(dataset.classes)
    stream = Stream(
        "labeled",
        open_images(dataset, args.device),
        partial(class_sampler, "instance", labels, classes, iterations=steps),
        batch_size=args.batch_size,
        views={"image": small_view(recipe, CIFAR_STATISTICS, size=32)},
    )
    return build_train_batches([stream], EpisodeSchedule(steps), seed=1)(0)


# ------------------------------------------------------------------------------------- measuring


class _Clock(HookBase):
    """Seconds a step, of every few steps, without the first ones.

    Args:
        skipped: steps that do not count: batches made while the processes started.
        device: waited for before the clock is read.
    """

    def __init__(self, skipped: int, device: torch.device) -> None:
        self.remaining = skipped
        self.device = device
        self.taken: list[float] = []
        self._start: float | None = None

    def after_step(self) -> None:
        self.remaining -= 1
        if self.remaining > 0:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._start is not None:
            self.taken.append((now - self._start) / CHUNK)
        self.remaining = CHUNK
        self._start = now


def train_as_public(
    batches: Batches, clock: _Clock, *, steps: int, args: argparse.Namespace
) -> None:
    """Train with the step of the public codes."""
    model = CifarResNet(len(CIFAR10_CLASSES)).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    for batch in batches:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(batch["labeled"].views["image"])
            loss = F.cross_entropy(logits, batch["labeled"].targets)
        loss.item()
        (logits.argmax(1) == batch["labeled"].targets).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.after_step()


def train_as_ours(batches: Batches, clock: _Clock, *, steps: int, args: argparse.Namespace) -> None:
    """Train with our trainer."""
    if args.device.type == "cpu":
        keep_freed_memory()
    counts = [1] * len(CIFAR10_CLASSES)
    model = CifarResNet(len(counts)).to(args.device, memory_format=torch.channels_last)
    method = EmpiricalRisk(
        model,
        CrossEntropy(counts, CrossEntropyOptions()),
        training=Training(steps),
        mixer=NoMixing(counts, Options(), model),
    )
    if args.compile:
        method.parallel_student = torch.compile(model, mode=args.compile)
    optimizer = build_optimizer(
        model, name="SGD", lr=0.1, momentum=0.9, weight_decay=2e-4, weight_decay_norm=2e-4
    )
    trainer = Trainer(
        method,
        EpisodeSchedule(steps),
        lambda start: batches,
        optimizer,
        seed=1,
        amp_dtype=torch.bfloat16 if args.amp else None,
    )
    trainer.register_hooks([clock])
    trainer.train()


def read_alone(batches: Batches, clock: _Clock) -> None:
    """Use batches for nothing."""
    for _ in batches:
        clock.after_step()


# Input and step of each row.
ROWS = {
    "public": (usual_batches, train_as_public),
    "usual": (usual_batches, train_as_ours),
    "ours": (our_batches, train_as_ours),
}


def measure_row(
    name: str, dataset: ClassificationDataset, recipe: str, args: argparse.Namespace
) -> list[list[float]]:
    """Seconds of training steps, and of batches without training."""
    torch.backends.cudnn.benchmark = True
    make, train = ROWS[name]
    # Every process keeps two batches ready; none of those may count as made in no time.
    skipped = 2 * args.workers + 3
    steps = skipped + max(args.images // args.batch_size, CHUNK)
    found = []
    for use in (partial(train, steps=steps, args=args), read_alone):
        clock = _Clock(skipped, args.device)
        use(make(dataset, recipe, steps=steps, args=args), clock)
        found.append(clock.taken)
        # What the trainer's cycle of references keeps would else be freed in a loader's process.
        gc.collect()
    return found


def measure(
    dataset: ClassificationDataset, recipe: str, args: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Median seconds of a training step and of a batch without training, for each row."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ROWS}
    # Each in a process of its own, as ours changes how a process holds memory.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for _ in range(args.repeats):
            for name, rows in taken.items():
                found = processes.submit(measure_row, name, dataset, recipe, args).result()
                for row, seconds in zip(rows, found, strict=True):
                    row += seconds
    return {name: tuple(map(statistics.median, rows)) for name, rows in taken.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print rows for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with cifar10_lt100; default: noise")
    parser.add_argument("--images", type=int, default=12_406, help="images of an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the usual input")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--amp", action="store_true", help="bfloat16, in all rows")
    parser.add_argument("--compile", choices=MODES, help="the network, in our step")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    if args.images < args.batch_size:
        parser.error(f"--images {args.images} is not allowed (must be at least --batch-size)")
    dataset = (
        make_noise(args.images) if args.data is None else load_cifar10_lt100(args.data, "train")
    )
    where = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    print(f"ResNet-32 on {where}, {threads} threads, {args.workers} processes of the usual input")
    print(f"{'recipe':<8}{'row':<13}{'images/s':>10}{'step ms':>10}{'input ms':>10}{'share':>8}")
    for recipe in args.recipes:
        found = measure(dataset, recipe, args)
        for name, (step, alone) in found.items():
            rate = args.batch_size / step
            row = f"{rate:>10.0f}{1e3 * step:>10.1f}{1e3 * alone:>10.2f}{alone / step:>8.1%}"
            print(f"{recipe:<8}{name:<13}{row}", flush=True)
        for other in ("public", "usual"):
            step, alone = (a / b for a, b in zip(found[other], found["ours"], strict=True))
            print(
                f"{recipe:<8}{f'ours/{other}':<13}{step:>10.2f}{'':>10}{alone:>10.1f}", flush=True
            )


if __name__ == "__main__":
    run_main(main)
