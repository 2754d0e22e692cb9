"""Training by one loss on one view: cross-entropy, re-weighting, MFW, and second stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssod_imwa.classification.losses.base import Criterion
from ssod_imwa.classification.methods.base import ClassificationMethod, Training, train_accuracy
from ssod_imwa.classification.mixers import Mixer
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.freezing import MovingNorms, set_train_mode
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch


@dataclass(frozen=True)
class ERMOptions(Options):
    """What a stage does beside training its part."""

    move_statistics: MovingNorms = option(
        "none",
        "which batch norms of what is frozen follow the data (MiSLAS's shifted BN; on Places-LT "
        "the last block's)",
    )


class EmpiricalRisk(ClassificationMethod):
    """One loss of the network's logits (empirical risk minimization).

    Which method it is lies in its parts::

        cross-entropy, focal, balanced softmax, ...   the criterion
        LDAM-DRW                    criterion "ldam", weights from 0.8, cosines as logits
        mixup, Remix, MFW           the mixer
        MFW + DRW, Remix-DRW        mixer "mfw" or "remix", weights from 0.8
        cRT, LWS, MiSLAS's stage 2  `part` "classifier", after a first stage
        BTM's fine-tuning           members with balanced subsets of their own

    Args:
        student: the network.
        criterion: moved to the student's device.
        options: see there.
        training: see `ClassificationMethod`.
        mixer: of images or features.

    Raises:
        ValueError: the mixer mixes labels and the criterion does not take shares of classes, a
            number is out of range, or statistics would be let move that move anyway.
    """

    student: ImageClassifier

    def __init__(
        self,
        student: ImageClassifier,
        criterion: Criterion,
        options: ERMOptions = ERMOptions(),
        *,
        training: Training,
        mixer: Mixer,
    ) -> None:
        super().__init__(student, training)
        check_mixture(mixer, criterion)
        if options.move_statistics == "last_block" and self.part.startswith("last_block"):
            raise ValueError(
                f"move_statistics = 'last_block' is not allowed with part = {self.part!r} (its "
                "batch norms move anyway)"
            )
        self.criterion = criterion.to(next(student.parameters()).device)
        self.mixer = mixer
        self.move_statistics = options.move_statistics

    def set_train_mode(self) -> None:
        set_train_mode(self.student, self.part, move_statistics=self.move_statistics)

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        images, labels = batch["labeled"].views["image"], batch["labeled"].targets
        drawn = self.mixer.draw(labels, images.shape)
        with drawn.at_layer():
            logits = self.parallel_student(drawn.images(images))
        loss = self.criterion(logits, drawn.targets, progress=self.progress(t))
        return {"loss": loss, "train_accuracy": train_accuracy(logits, labels)}


def check_mixture(mixer: Mixer, criterion: Criterion) -> None:
    """Raise ValueError if the mixer mixes labels and the criterion takes no shares of classes."""
    if mixer.mixes_labels and not criterion.takes_shares:
        raise ValueError(
            f"{mixer.name} with {criterion.name} is not allowed (it mixes labels, which "
            "cross_entropy, balanced_softmax and balanced_bce can take)"
        )
