"""Which device a run computes on."""

from __future__ import annotations

import torch

from ssod_imwa.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of MODEL.DEVICE; "auto" is the current GPU if there is one.

    Raises:
        UserError: it names a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"MODEL.DEVICE = {name!r} is not allowed (must be auto, cpu, cuda or cuda:N)"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE = {name!r}: no GPU is found (use auto or cpu)")
    return device
