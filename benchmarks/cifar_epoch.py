"""Images per second of a ResNet-32's epoch: ours beside that of the public codes.

The usual input is a torchvision data set (one array, a Pillow image for each item), transforms
that run image by image and a DataLoader with processes. Ours is a batch augmented at once where
the images are kept. Both make the same recipes with torchvision's AutoAugment. The usual step is
that of the public codes: contiguous images, SGD as it comes, loss and accuracy read back each time.
Ours is the trainer's: channels last, fused SGD, nothing read back. `public` is the usual input
and step, `usual` the usual input with our step, `ours` our input and step; they run in turn,
several times. Medians over every ten steps are compared. Starting the processes is not counted,
though it comes back every epoch.

    python benchmarks/cifar_epoch.py                             # noise of CIFAR's shape
    python benchmarks/cifar_epoch.py --data FOLDER               # cifar10_lt100 in a folder
    python benchmarks/cifar_epoch.py --device cuda --workers 16 --amp --compile
    python benchmarks/cifar_epoch.py --images 2560 --repeats 1   # a minute on two CPU cores

Columns: `images/s` and `step` are of training, `input` is the time of a batch without training.
`share` is input / step: what the step waits for, where nothing runs beside it (ours, or 0
processes). The rows `ours/...` are ours over another.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.data.class_samplers import BatchSource, class_sampler
from ssod_imwa.data.image_augmentation import CIFAR_STATISTICS
from ssod_imwa.data.image_loader import build_image_batches
from ssod_imwa.data.image_views import small_view
from ssod_imwa.data.images import CIFAR10_CLASSES, ClassificationDataset, load_cifar10_lt100

RECIPES = ("plain", "strong")
HOLE = 16  # pixels, of Cutout
CHUNK = 10  # steps that are timed together, so that a GPU need not be waited for at each

# Inputs and labels, on the device.
Batch = tuple[torch.Tensor, torch.Tensor]


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
) -> Iterator[Batch]:
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
        yield images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)


def our_batches(
    dataset: ClassificationDataset, recipe: str, *, steps: int, args: argparse.Namespace
) -> Iterator[Batch]:
    """Batches of our input."""

    def source(member: int) -> BatchSource:
        return class_sampler(
            "instance",
            dataset.labels,
            len(dataset.classes),
            args.batch_size,
            seed=1,
            member=member,
            iterations=steps,
        )

    view = small_view(recipe, CIFAR_STATISTICS, size=32)
    schedule = EpisodeSchedule(steps)
    batches = build_image_batches(dataset, schedule, source, [view], seed=1, device=args.device)
    return ((batch.views[0], batch.labels) for batch in batches(0))


# ------------------------------------------------------------------------------------- measuring


class _Training:
    """A network and its step, that of our trainer or of the public codes."""

    def __init__(self, classes: int, args: argparse.Namespace, *, public: bool) -> None:
        layout = torch.contiguous_format if public else torch.channels_last
        model = CifarResNet(classes).to(args.device, memory_format=layout)
        settings = {} if public else {"fused": True}
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, **settings
        )
        self.model: nn.Module = torch.compile(model) if args.compile else model
        self.device, self.amp, self.public = args.device, args.amp, public

    def step(self, batch: Batch) -> None:
        images, labels = batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        if self.public:
            loss.item()
            (logits.argmax(1) == labels).float().mean().item()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def seconds(
    batches: Iterator[Batch], use: Callable[[Batch], object], *, skipped: int, device: torch.device
) -> list[float]:
    """Seconds a batch, of every few batches, without those made while the processes started."""
    for batch in itertools.islice(batches, skipped):
        use(batch)
    _wait(device)
    taken = []
    start = time.perf_counter()
    while chunk := [use(batch) for batch in itertools.islice(batches, CHUNK)]:
        _wait(device)
        now = time.perf_counter()
        taken.append((now - start) / len(chunk))
        start = now
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Input and step of each row.
ROWS = {
    "public": (usual_batches, True),
    "usual": (usual_batches, False),
    "ours": (our_batches, False),
}


def measure(
    dataset: ClassificationDataset, recipe: str, args: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Median seconds of a training step and of a batch without training, for each row."""
    steps = args.images // args.batch_size
    # Every process keeps two batches ready; none of those may count as made in no time.
    skipped = 2 * args.workers + 3
    training: dict[str, list[float]] = {name: [] for name in ROWS}
    alone: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(args.repeats):
        for name, (make, public) in ROWS.items():
            train = _Training(len(dataset.classes), args, public=public)
            for use, taken in ((train.step, training), (_drop, alone)):
                batches = make(dataset, recipe, steps=steps + skipped, args=args)
                taken[name] += seconds(batches, use, skipped=skipped, device=args.device)
    return {n: (statistics.median(training[n]), statistics.median(alone[n])) for n in ROWS}


def _drop(batch: Batch) -> None:
    """Use a batch for nothing."""


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
    parser.add_argument("--compile", action="store_true", help="the network, in all rows")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    if args.images < args.batch_size:
        parser.error(f"--images {args.images} is not allowed (must be at least --batch-size)")
    torch.backends.cudnn.benchmark = True
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
    main()
