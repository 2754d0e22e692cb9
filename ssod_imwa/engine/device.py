"""Which device a run computes on."""

from __future__ import annotations

import contextlib
import logging
import time

import torch

from ssod_imwa.errors import UserError

logger = logging.getLogger(__name__)
# Of the time in float32: processors with instructions for a type take less than all of it.
SLOW = 1.5


def pick_device(name: str) -> torch.device:
    """The device of MODEL.DEVICE; "auto" is the current GPU if there is one, "cuda:N" becomes it.

    Raises:
        UserError: it names a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(
            f"MODEL.DEVICE = {name!r} is not allowed (must be auto, cpu, cuda or cuda:N)"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE = {name!r}: no GPU is found (use auto or cpu)")
    if device.index is not None and device.type == "cuda":
        found = torch.cuda.device_count()
        if device.index >= found:
            raise UserError(f"MODEL.DEVICE = {name!r}: {found} GPUs are found, counted from 0")
        torch.cuda.set_device(device)  # or memory would be measured on the first one
    return device


def warn_if_slower_than_float32(device: torch.device, dtype: torch.dtype | None) -> None:
    """Say that mixed precision costs time here: a CPU may have no instructions for its type.

    Args:
        device: that a run computes on; GPUs are not looked at.
        dtype: of mixed precision, None for none.
    """
    if device.type != "cpu" or dtype is None:
        return
    plain, mixed = convolution_seconds(torch.float32), convolution_seconds(dtype)
    if mixed > SLOW * plain:
        logger.warning(
            "a convolution takes %.1f times as long in %s as in float32 (%.1f ms, %.1f ms): this "
            "CPU has no instructions for it (set SOLVER.AMP.ENABLED False)",
            mixed / plain,
            str(dtype).removeprefix("torch."),
            1000 * mixed,
            1000 * plain,
        )


def convolution_seconds(dtype: torch.dtype) -> float:
    """The shortest time of a 3 x 3 convolution and its gradients on the CPU.

    Args:
        dtype: of autocast; float32 for none.
    """
    images = torch.ones(2, 32, 48, 48, requires_grad=True)
    weight = torch.ones(32, 32, 3, 3, requires_grad=True)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            maps = torch.nn.functional.conv2d(images, weight, padding=1)
        torch.autograd.grad(maps.float().sum(), [images, weight])
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
