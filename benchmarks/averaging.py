"""Time of averaging, re-seeding and EMA steps against PyTorch's helpers and the memory bandwidth.

    python benchmarks/averaging.py [--device auto] [--members 2] [--output averaging.json]

Times are medians. The floor of an operation is the bytes it must read and write, over the bandwidth
of the fastest plain copy measured in the same run; on CPUs that read a line before writing it, an
in-place operation can be a little faster than that. States: Faster R-CNN R50-FPN with 21 outputs
(41.5 M elements) and a small convolutional network; PyTorch's averaged model holds parameters and
buffers, as ours do.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.averaging.weights import RunningAverage, average, copy_, named_state, snapshot
from ssod_imwa.cli import require_new, run_main
from ssod_imwa.errors import writing

DECAY = 0.9996


def small() -> nn.Module:
    """A network of 0.1 M elements, where the number of calls counts and bytes do not."""
    layers = [nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(10)]
    return nn.Sequential(nn.Conv2d(3, 32, 3), *layers, nn.Linear(32, 10))


def detector() -> nn.Module:
    """The paper's detector for 20 classes, with random weights."""
    return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21)


MODELS = {"small": small, "R50-FPN": detector}


def build(name: str, device: torch.device) -> nn.Module:
    """A model whose counters of batches are floats: on CUDA swa_utils fails to average integers."""
    model = MODELS[name]().to(device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = module.num_batches_tracked.float()
    return model


def times(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call, until the device is done."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]  # the first calls allocate


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second that a plain copy reads and writes."""
    source = torch.ones(32 << 20, device=device)
    target = torch.empty_like(source)
    # The fastest, as this is to be a bound.
    seconds = min(times(lambda: target.copy_(source), device, repeats))
    return 2 * source.numel() * source.element_size() / seconds


def per_tensor_ema(teacher: nn.Module, student: nn.Module) -> Callable[[], None]:
    """The common teacher update: a new dictionary, then `load_state_dict`."""

    @torch.no_grad()
    def update() -> None:
        students = student.state_dict()
        mixed = {
            name: DECAY * value + (1 - DECAY) * students[name]
            for name, value in teacher.state_dict().items()
        }
        teacher.load_state_dict(mixed)

    return update


def measure(
    name: str, device: torch.device, *, members: int, repeats: int, bytes_per_second: float
) -> list[dict[str, object]]:
    """Rows of the table for one model."""
    torch.manual_seed(0)
    student, teacher = (build(name, device) for _ in range(2))
    live = named_state({"m": student})
    stored = [snapshot(live) for _ in range(members - 1)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    running = RunningAverage()
    for state in stored:
        running.add(state)
    mean = AveragedModel(student, use_buffers=True)
    mean.update_parameters(student)  # the first call only copies
    ema = ModelEMA(teacher, student, DECAY)
    theirs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    theirs.update_parameters(student)

    def equal_weight_mean() -> None:
        # As SWA does: member after member into a running mean.
        for _ in range(members):
            mean.update_parameters(student)

    # operation, implementation, call, models read and written at least
    cases = [
        ("average", "float64 (default)", lambda: average([*stored, live]), members + 1),
        (
            "average",
            "float32",
            lambda: average([*stored, live], accumulate="float32"),
            members + 1,
        ),
        ("average", "stream, last member", lambda: running.result(last=live), 4),
        ("average", "swa_utils.AveragedModel", equal_weight_mean, members + 1),
        ("re-seed", "copy_", lambda: copy_(live, stored[0]), 2),
        ("re-seed", "load_state_dict", lambda: student.load_state_dict(teacher.state_dict()), 2),
        ("EMA step", "ModelEMA", lambda: ema.update(0), 3),
        ("EMA step", "swa_utils multi_avg_fn", lambda: theirs.update_parameters(student), 3),
        ("EMA step", "new dictionary, load", per_tensor_ema(teacher, student), 3),
    ]
    rows: list[dict[str, object]] = []
    for operation, implementation, work, models in cases:
        seconds = statistics.median(times(work, device, repeats))
        floor = models * size / bytes_per_second
        rows.append(
            {
                "model": name,
                "elements": size // 4,
                "tensors": len(live),
                "operation": operation,
                "implementation": implementation,
                "milliseconds": 1e3 * seconds,
                "floor_milliseconds": 1e3 * floor,
                "times_floor": seconds / floor,
            }
        )
    return rows


def hardware(device: torch.device, bytes_per_second: float) -> dict[str, object]:
    """What the numbers depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_gigabytes_per_second": bytes_per_second / 1e9,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--members", type=int, default=2, help="M, at least 2")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each operation")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--output", type=Path, help="write the table and the hardware as JSON")
    options = parser.parse_args(arguments)
    if options.members < 2:
        parser.error(f"--members {options.members} is not allowed (must be at least 2)")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} is not allowed (must be at least 1)")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the file."""
    options = parse(arguments)
    if options.output is not None:
        require_new(options.output)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(options.device)
    speed = bandwidth(device, options.repeats)
    facts = hardware(device, speed)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'model':8} {'operation':9} {'implementation':24} {'ms':>9} {'floor ms':>9} {'x':>6}")
    rows = []
    for name in options.models:
        rows += measure(
            name,
            device,
            members=options.members,
            repeats=options.repeats,
            bytes_per_second=speed,
        )
    for row in rows:
        print(
            f"{row['model']:8} {row['operation']:9} {row['implementation']:24} "
            f"{row['milliseconds']:9.3f} {row['floor_milliseconds']:9.3f} "
            f"{row['times_floor']:6.1f}"
        )
    if options.output is not None:
        settings = {"members": options.members, "repeats": options.repeats}
        content = {"hardware": facts, "settings": settings, "rows": rows}
        with writing(options.output):
            options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
