"""Microseconds per image of FixMatch's RandAugment, and how far its pixels are from Pillow's.

Two of fourteen operations at strengths of their own and a gray square, the same draws for all:

    pillow      image by image, as the public codes do
    ours        a batch at once
    torchvision the functions of transforms.v2, for each group of images with equal operation and
                strength, as they take one strength for a batch
    kornia      its functions with a strength for each image, for each group of equal operation,
                on floating-point images; needs `pip install kornia`, else it is left out

    python benchmarks/randaugment.py
    python benchmarks/randaugment.py --device cuda --batch-size 448

Images are photographs if `--data` names a folder with cifar10_lt100, else noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ssod_imwa.classification.data import randaugment as reference
from ssod_imwa.classification.data.batched_randaugment import BatchedRandAugment, cut_gray
from ssod_imwa.classification.data.datasets import load_cifar10_lt100
from ssod_imwa.classification.data.randaugment import Draw, draws_of
from ssod_imwa.cli import run_main

CUTOUT = 16
Augment = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_pillow(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The reference, image by image."""
    augmented = [
        pil_to_tensor(reference.randaugment(to_pil_image(image), row, cutout=CUTOUT))
        for image, row in zip(images.cpu(), numbers.tolist(), strict=True)
    ]
    return torch.stack(augmented).to(images.device)


def draws_at(numbers: torch.Tensor) -> Iterator[list[Draw | None]]:
    """The first operation of each image, then the second; None where it has none."""
    drawn = [draws_of(row) for row in numbers.tolist()]
    for place in range(reference.APPLIED):
        yield [draws[place] if place < len(draws) else None for draws in drawn]


def by_torchvision(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The functions of torchvision, group by group of equal draws."""
    images = images.clone()
    for draws in draws_at(numbers):
        groups = defaultdict(list)
        for i, draw in enumerate(draws):
            if draw is not None:
                groups[draw].append(i)
        for draw, those in groups.items():
            rows = torch.tensor(those, device=images.device)
            images[rows] = _of_torchvision(images[rows], draw)
    return cut_gray(images, numbers[:, -2:], length=CUTOUT)


def _of_torchvision(images: torch.Tensor, draw: Draw) -> torch.Tensor:
    name, level, size = draw.operation, draw.level, images.shape[-1]
    sign = -1 if draw.negative else 1
    share, nearest = sign * reference.share(level), InterpolationMode.NEAREST
    if name in ("ShearX", "ShearY", "TranslateX", "TranslateY"):
        shift, degrees = -int(share * size), float(np.degrees(np.arctan(share)))
        moves = {
            "ShearX": ([0, 0], [degrees, 0.0]),
            "ShearY": ([0, 0], [0.0, degrees]),
            "TranslateX": ([shift, 0], [0.0, 0.0]),
            "TranslateY": ([0, shift], [0.0, 0.0]),
        }
        translate, shear = moves[name]
        corner = [0.0, 0.0] if "Shear" in name else None
        return F.affine(images, 0.0, translate, 1.0, shear, interpolation=nearest, center=corner)
    factor = reference.factor(level)
    operations: dict[str, Callable[[], torch.Tensor]] = {
        "AutoContrast": lambda: F.autocontrast(images),
        "Brightness": lambda: F.adjust_brightness(images, factor),
        "Color": lambda: F.adjust_saturation(images, factor),
        "Contrast": lambda: F.adjust_contrast(images, factor),
        "Equalize": lambda: F.equalize(images),
        "Identity": lambda: images,
        "Posterize": lambda: F.posterize(images, reference.bits(level)),
        "Rotate": lambda: F.rotate(images, sign * reference.degrees(level), nearest),
        "Sharpness": lambda: F.adjust_sharpness(images, factor),
        "Solarize": lambda: F.solarize(images, reference.threshold(level)),
    }
    return operations[name]()


def kornia_augment() -> Augment | None:
    """The same with kornia, if it is installed."""
    try:
        import kornia
    except ModuleNotFoundError:
        return None
    enhance, move = kornia.enhance, kornia.geometry.transform

    def change(images: torch.Tensor, name: str, draws: list[Draw]) -> torch.Tensor:
        size, device = images.shape[-1], images.device

        def tensor(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def along(name: str, amounts: list[float]) -> torch.Tensor:
            both = torch.zeros(len(amounts), 2, device=device)
            both[:, "XY".index(name[-1])] = tensor(amounts)
            return both

        signs = [-1.0 if draw.negative else 1.0 for draw in draws]
        factors = tensor([reference.factor(draw.level) for draw in draws])
        shares = [sign * reference.share(d.level) for sign, d in zip(signs, draws, strict=True)]
        if name in ("TranslateX", "TranslateY"):
            shifts = [-float(int(share * size)) for share in shares]
            return move.translate(images, along(name, shifts), mode="nearest")
        if name in ("ShearX", "ShearY"):
            return move.shear(images, along(name, [-share for share in shares]), mode="nearest")
        operations: dict[str, Callable[[], torch.Tensor]] = {
            "AutoContrast": lambda: enhance.normalize_min_max(images),
            "Brightness": lambda: enhance.adjust_brightness_accumulative(images, factors),
            "Color": lambda: enhance.adjust_saturation_with_gray_subtraction(images, factors),
            "Contrast": lambda: enhance.adjust_contrast_with_mean_subtraction(images, factors),
            "Equalize": lambda: enhance.equalize(images),
            "Posterize": lambda: enhance.posterize(
                images, torch.tensor([reference.bits(draw.level) for draw in draws])
            ),
            "Rotate": lambda: move.rotate(
                images,
                tensor([s * reference.degrees(d.level) for s, d in zip(signs, draws, strict=True)]),
                mode="nearest",
            ),
            "Sharpness": lambda: enhance.sharpness(images, factors),
            "Solarize": lambda: enhance.solarize(
                images, tensor([reference.threshold(draw.level) / 255 for draw in draws])
            ),
        }
        return operations[name]()

    def augment(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        values = images.float() / 255
        for draws in draws_at(numbers):
            groups = defaultdict(list)
            for i, draw in enumerate(draws):
                if draw is not None and draw.operation != "Identity":
                    groups[draw.operation].append(i)
            for name, those in groups.items():
                rows = torch.tensor(those, device=images.device)
                drawn = [draw for i in those if (draw := draws[i]) is not None]
                values[rows] = change(values[rows], name, drawn)
        rounded = (values * 255).round().clamp(0, 255).to(torch.uint8)
        return cut_gray(rounded, numbers[:, -2:], length=CUTOUT)

    return augment


def measure(augment: Augment, images: torch.Tensor, numbers: torch.Tensor, repeats: int) -> float:
    """Microseconds per image, the median."""
    augment(images, numbers)
    seconds = []
    for _ in range(repeats):
        _wait(images.device)
        start = time.perf_counter()
        augment(images, numbers)
        _wait(images.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / len(images) * 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="FOLDER", help="that has cifar10_lt100")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    if arguments.data:
        pixels = load_cifar10_lt100(arguments.data, "test").images
        assert pixels is not None
        chosen = generator.choice(len(pixels), arguments.batch_size)
        images = pixels[torch.from_numpy(chosen)]
    else:
        shape = (arguments.batch_size, 3, 32, 32)
        images = torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))
    images = images.to(arguments.device)
    numbers = torch.from_numpy(generator.random((len(images), reference.NUMBERS)))
    candidates: dict[str, Augment | None] = {
        "pillow": by_pillow,
        "ours": BatchedRandAugment(images.shape[-1], cutout=CUTOUT),
        "torchvision": by_torchvision,
        "kornia": kornia_augment(),
    }
    expected = by_pillow(images, numbers)
    columns = f"{'us/image':>9} {'other images':>13} {'other pixels':>13} {'by more than 2':>15}"
    print(f"{'':12} {columns}")
    for name, augment in candidates.items():
        if augment is None:
            continue
        distance = (augment(images, numbers).int() - expected.int()).abs()
        shares = [
            100 * share.float().mean().item()
            for share in (distance.flatten(1).amax(1) > 0, distance > 0, distance > 2)
        ]
        time_ = measure(augment, images, numbers, arguments.repeats)
        print(
            f"{name:12} {time_:>9.1f} {shares[0]:>12.1f}% {shares[1]:>12.1f}% {shares[2]:>14.2f}%"
        )


if __name__ == "__main__":
    run_main(main)
