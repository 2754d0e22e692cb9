"""Files of trained models, `model_final.pth` and `model_averaged.pth`: reading them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import check_format
from ssod_imwa.engine.checkpoint.foreign import read_content
from ssod_imwa.engine.checkpoint.output import AVERAGED, FINAL
from ssod_imwa.errors import CheckpointError

MODELS = ("student", "teacher")


@dataclass(frozen=True)
class ModelFile:
    """The content of such a file.

    Attributes:
        path: the file.
        models: "student" and, if the method has one, "teacher" -> its state dict.
        inference_model: the name of the one to evaluate and ship.
        content: everything as it is in the file.
    """

    path: Path
    models: dict[str, dict[str, torch.Tensor]]
    inference_model: str
    content: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order."""
        return tuple(self.content.get("classes", ()))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the model to evaluate and ship."""
        return self.models[self.inference_model]


def read_models(source: str | Path) -> ModelFile:
    """Read a finished run's averaged models, given its OUTPUT_DIR or the file.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    path = Path(source)
    if path.is_dir():
        path = newest_model(path)
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(f"{path} cannot be read: {reason}")
    content = load_checkpoint(path)
    if not isinstance(content, Mapping) or "inference_model" not in content:
        raise CheckpointError(
            f"{path} holds no averaged model (take a run's {FINAL} or {AVERAGED})"
        )
    check_format(path, content)
    models = {name: content[name] for name in MODELS if name in content}
    return ModelFile(path, models, content["inference_model"], dict(content))


def check_classes(source: str | Path, classes: Sequence[str]) -> None:
    """Refuse a run's model whose classes have other names, or another order, than the test set's.

    Files of other programs, which name no classes, pass.

    Args:
        source: as for `read_models`, or any other file of weights.
        classes: names in label order.

    Raises:
        CheckpointError: the names differ.
        WeightsError: the file is not one of weights.
    """
    path = Path(source)
    path = newest_model(path) if path.is_dir() else path
    if path.suffix != ".pth" or not path.is_file():
        return
    content = read_content(path)
    content = content.get("run", content) if isinstance(content, Mapping) else {}
    trained = content.get("classes") if isinstance(content, Mapping) else None
    if not isinstance(trained, list | tuple) or not trained or list(trained) == list(classes):
        return
    pairs = zip_longest(trained, classes)
    label, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise CheckpointError(
        f"{path} was trained on other classes than those of DATASETS: label {label} is "
        f"{ours!r} there and {theirs!r} here (names and order must be the same)"
    )


def newest_model(directory: str | Path) -> Path:
    """The final model of an OUTPUT_DIR or, while its run goes on, the newest average."""
    for name in (FINAL, AVERAGED):
        if (path := Path(directory) / name).is_file():
            return path
    raise CheckpointError(
        f"{directory} holds neither {FINAL} nor {AVERAGED} (one is written at the end of every "
        "episode)"
    )
