"""The loss of a detector on some of the images that it learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ssod_imwa.data.batches import Part
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.methods.supervised import images_and_targets
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.engine.modes import undisturbed

# Two-stage detectors draw the proposals that they learn from: the same for every model.
SEED = 0


@torch.no_grad()
def training_loss(model: Detector, batches: Sequence[Part]) -> float:
    """The sum of the detector's own losses, the mean over images, with batch norms in eval mode.

    Modes, random generators and what losses depend on besides weights are afterwards as before.

    Args:
        model: the detector.
        batches: labeled images in one view with the name "image"; at least one.
    """
    outside, device = model.outside_state(), next(model.parameters()).device
    total = 0.0
    try:
        with undisturbed(model):
            model.train()  # detectors give losses in training mode only
            for module in model.modules():
                if isinstance(module, _BatchNorm | _DropoutNd):
                    module.eval()
            torch.manual_seed(SEED)
            for batch in batches:
                images, targets = images_and_targets(batch.to(device).views["image"])
                losses = model(images, SupervisedLoss(targets))
                total += len(batch) * float(torch.stack(list(losses.values())).sum())
    finally:
        model.load_outside_state(outside)
    return total / sum(len(batch) for batch in batches)
