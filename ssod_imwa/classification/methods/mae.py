"""Masked generative pre-training on long-tailed images: LiVT's first stage (arXiv 2212.02015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.models.mae import MaskedAutoencoder
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.data.loader import TestBatches
from ssod_imwa.data.polling import Poll, polled
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.seeding import counted_generator

ENCODER = "encoder."
CLASSIFIER = "encoder.classifier."


class MaskedPretraining(Method):
    """Reconstruction of masked patches, without labels; which patches is drawn in each step.

    A run of its own precedes fine-tuning, which begins with the `encoder_state` of its weights and
    is `EmpiricalRisk` with the criterion "balanced_bce" and the mixer "mixup_or_cutmix".

    Args:
        student: the masked autoencoder.
    """

    reads: Mapping[str, tuple[str, ...]] = {"labeled": ("image",)}
    student: MaskedAutoencoder

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        images = batch["labeled"].views["image"]
        # Drawn on the CPU: the masks of a run are the same on every device.
        noise = torch.rand(len(images), _patches(self.student)).to(images.device)
        return {"loss_reconstruction": self.parallel_student(images, noise)}


@torch.no_grad()
def reconstruction_error(
    model: MaskedAutoencoder,
    batches: TestBatches | Sequence[Part],
    processes: Group = Group(),
    *,
    poll: Poll | None = None,
) -> dict[str, float]:
    """The mean squared error of masked patches, each image masked in a way of its own.

    An image's mask is a function of its index in the data set, so the error does not depend on the
    size and order of batches.

    Args:
        model: in eval mode.
        batches: of this process, see `build_test_batches`; brought to the model's device.
        processes: those that have the other images.
        poll: see `polled`.

    Returns:
        `reconstruction_error`, of pixels that have mean 0 and variance 1 in each patch.

    Raises:
        ValueError: there are no images.
    """
    device = next(model.parameters()).device
    total, images = 0.0, 0
    for batch in polled(batches, processes, poll):
        noise = torch.stack([_counted_noise(model, index) for index in batch.indices.tolist()])
        error = model(batch.views["image"].to(device), noise.to(device))
        total += error.item() * len(noise)
        images += len(noise)
    sums = processes.all_gather((total, images))
    total, images = (sum(part) for part in zip(*sums, strict=True))
    if images == 0:
        raise ValueError("0 images are not allowed (must be at least 1)")
    return {"reconstruction_error": total / images}


def is_autoencoder(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights are a masked autoencoder's: only it has a token for masked patches."""
    return "mask_token" in state


def encoder_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's weights, for `load_encoder` (in `models.weights`) of a vision transformer.

    Args:
        state: of a masked autoencoder.

    Returns:
        Weights by the transformer's names, without those of a classifier.

    Raises:
        ValueError: the state has no encoder.

    Example:
        >>> weight = torch.zeros(2, 2)
        >>> list(encoder_state({"encoder.fc_norm.weight": weight, "decoder_embed.bias": weight}))
        ['fc_norm.weight']
    """
    encoder = {
        name.removeprefix(ENCODER): tensor
        for name, tensor in state.items()
        if name.startswith(ENCODER) and not name.startswith(CLASSIFIER)
    }
    if not encoder:
        raise ValueError(
            f"weights {sorted(state)[:3]}... are not allowed (no name has {ENCODER!r})"
        )
    return encoder


def _patches(model: MaskedAutoencoder) -> int:
    return model.visible_patches + model.masked_patches


def _counted_noise(model: MaskedAutoencoder, index: int) -> torch.Tensor:
    generator = counted_generator("reconstruction", index)
    return torch.from_numpy(generator.random(_patches(model)))
