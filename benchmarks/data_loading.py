"""Training images per second: our loader against the plain torchvision pipeline.

Both read the same files and make a weak and a strong view of each image with the same operations
and probabilities (Unbiased Teacher's). The peers are what one writes with torchvision alone: a
Dataset, transforms.v2 on its own random state and a DataLoader with automatic batching, once with
Pillow images and once with tensors, the boxes as tv_tensors. All are run in turn, several times,
and the medians are compared; starting the processes is not counted.

    python benchmarks/data_loading.py                    # photos made up in a temporary folder
    python benchmarks/data_loading.py --images FOLDER    # photos of your own
    python benchmarks/data_loading.py --workers 0 --edges 128
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.cli import run_main
from ssod_imwa.data.loader import build_train_batches
from ssod_imwa.data.order import BatchStream
from ssod_imwa.data.streams import On, Stream
from ssod_imwa.detection.data.folder import load_folder
from ssod_imwa.detection.data.images import DetectionImages, orientation_groups
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.detection.data.views import (
    BLUR_RADIUS,
    ERASING_AREA,
    ERASING_ASPECT,
    StrongView,
    WeakView,
)

MAX_SIZE = 1333


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """JPEG files with smooth areas, edges and texture."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
        textured = np.clip(smooth + generator.normal(0, 6, smooth.shape), 0, 255)
        Image.fromarray(textured.astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)


def with_boxes(dataset: DetectionDataset) -> DetectionDataset:
    """Seven boxes on each image, about as many as COCO has."""
    flags = np.zeros(7, dtype=bool)
    records = []
    for record in dataset.records:
        corners = np.sort(np.random.default_rng(0).uniform(0, 1, (7, 2, 2)), axis=1)
        boxes = corners.reshape(7, 4) * np.tile([record.width, record.height], 2)
        annotations = Annotations(boxes.astype(np.float32), np.arange(7), flags, flags)
        records.append(replace(record, annotations=annotations))
    return replace(dataset, records=tuple(records))


class _Plain(Dataset):
    """A torchvision data set: file -> weak and strong view."""

    def __init__(self, records: list[ImageRecord], edge: int, *, tensors: bool) -> None:
        self.records = records
        self.tensors = tensors
        self.weak = v2.Compose(
            [
                v2.RandomShortestSize(edge, MAX_SIZE),
                v2.RandomHorizontalFlip(),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(),
            ]
        )
        blur = v2.GaussianBlur(13, BLUR_RADIUS) if tensors else v2.Lambda(_blur_picture)
        self.strong = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([blur], p=0.5),
                v2.PILToTensor() if not tensors else v2.Identity(),
                *(
                    v2.RandomErasing(p, scale=area, ratio=aspect, value="random")
                    for p, area, aspect in zip(
                        (0.7, 0.5, 0.3), ERASING_AREA, ERASING_ASPECT, strict=True
                    )
                ),
            ]
        )
        self.finish = v2.Identity() if tensors else v2.PILToTensor()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[object, object]:
        record = self.records[index]
        if self.tensors:
            image = decode_image(record.file_name, mode=ImageReadMode.RGB)
        else:
            image = Image.open(record.file_name).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(record.annotations.boxes),
            format="XYXY",
            canvas_size=(record.height, record.width),
        )
        targets = {"boxes": boxes, "labels": torch.from_numpy(record.annotations.labels)}
        image, targets = self.weak(image, targets)
        return (self.finish(image), targets), (self.strong(image), targets)


def _blur_picture(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(*BLUR_RADIUS))))


def plain_batches(
    dataset: DetectionDataset, edge: int, *, batch: int, workers: int, steps: int, tensors: bool
) -> Iterator[object]:
    """Batches of the torchvision pipeline."""
    records = [dataset.records[i % len(dataset)] for i in range(steps * batch)]
    reader = _Plain(records, edge, tensors=tensors)
    loader = DataLoader(reader, batch, shuffle=True, num_workers=workers, collate_fn=list)
    return iter(loader)


def our_batches(
    dataset: DetectionDataset, edge: int, *, batch: int, workers: int, steps: int
) -> Iterator[object]:
    """Batches of our loader."""
    stream = Stream(
        "labeled",
        DetectionImages.labeled(dataset),
        partial(BatchStream, orientation_groups(dataset.records)),
        batch_size=batch,
        views={"weak": WeakView([edge], MAX_SIZE), "strong": On("weak", StrongView())},
    )
    return build_train_batches([stream], EpisodeSchedule(steps), seed=1, num_workers=workers)(0)


def images_per_second(batches: Iterator[object], *, batch: int, skipped: int) -> float:
    """Rate after the first batches, which were made while the processes started."""
    for _ in range(skipped):
        next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * batch / (time.perf_counter() - start)


def measure(dataset: DetectionDataset, edge: int, args: argparse.Namespace) -> dict[str, float]:
    """Median images/s of each pipeline at one edge length."""
    # Every process keeps two batches ready; none of those may count as made in no time.
    skipped = 2 * args.workers + 1
    common = {"batch": args.batch, "workers": args.workers, "steps": args.steps + skipped}
    pipelines: dict[str, Callable[[], Iterator[object]]] = {
        "ours": lambda: our_batches(dataset, edge, **common),
        "Pillow": lambda: plain_batches(dataset, edge, tensors=False, **common),
        "tensors": lambda: plain_batches(dataset, edge, tensors=True, **common),
    }
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(args.repeats):
        for name, start in pipelines.items():
            rates[name].append(images_per_second(start(), batch=args.batch, skipped=skipped))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Print one row for each edge length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of photos; default: made up")
    parser.add_argument("--edges", type=int, nargs="+", default=[128, 480, 800], metavar="PIXELS")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="batches that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in worker processes, so that --workers 0 compares, too
    print(f"images/s, weak and strong view, {args.workers} processes, batches of {args.batch}")
    print(f"{'edge':>6} {'ours':>8} {'Pillow':>8} {'tensors':>8}   ours / best peer")
    for edge in args.edges:
        with tempfile.TemporaryDirectory() as temporary:
            if args.images is None:
                width = 128 if edge <= 128 else 640
                make_photos(Path(temporary), 64, width, width * 3 // 4 if edge > 128 else width)
            dataset = with_boxes(load_folder(args.images or temporary, name="photos"))
            rates = measure(dataset, edge, args)
        ratio = rates["ours"] / max(rates["Pillow"], rates["tensors"])
        row = " ".join(f"{rates[name]:8.1f}" for name in ("ours", "Pillow", "tensors"))
        print(f"{edge:>6} {row} {ratio:>12.2f}", flush=True)


if __name__ == "__main__":
    run_main(main)
