"""Any network of timm or torchvision as an image classifier."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier
from ssod_imwa.errors import WeightsError

logger = logging.getLogger(__name__)

TIMM, TORCHVISION = "timm:", "torchvision:"


def is_library_name(name: str) -> bool:
    """Whether CLS.MODEL.NAME is "timm:NAME" or "torchvision:NAME"."""
    return name.startswith((TIMM, TORCHVISION))


class LibraryClassifier(ImageClassifier):
    """A network of a library without its classifier, which is one group, and a classifier of ours.

    Args:
        name: "timm:NAME" or "torchvision:NAME".
        classes: C, outputs of the classifier.
        image_size: height and width of the images in pixels; vision transformers are bound to it.
        classifier: "linear" or "cosine".
        scale: of the cosine classifier.

    Raises:
        ValueError: the library has no such network of images of this size, or see
            `make_classifier`.

    Example:
        >>> model = LibraryClassifier("timm:tf_efficientnet_lite0", 10, image_size=64)
        >>> model.num_features, model(torch.zeros(2, 3, 64, 64)).shape
        (1280, torch.Size([2, 10]))
    """

    group_names = ("body",)

    def __init__(
        self,
        name: str,
        classes: int,
        *,
        image_size: int,
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        self.library_name = name
        make = _timm_body if name.startswith(TIMM) else _torchvision_body
        try:
            with torch.device("meta"), torch.no_grad():
                trial, _ = make(name.partition(":")[2], image_size)
                trial.eval()
                self.num_features = trial(torch.zeros(1, 3, image_size, image_size)).shape[1]
            self.body, self._left_out = make(name.partition(":")[2], image_size)
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
            first = " ".join(str(error).split())
            raise ValueError(
                f"{name} is not allowed (there is no such classifier of images of {image_size} "
                f"px in timm {timm.__version__} or torchvision {torchvision.__version__}: {first})"
            ) from error
        self.classifier = make_classifier(classifier, self.num_features, classes, scale=scale)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """The features (B, d), which the library's network has pooled."""
        return maps

    def load_library_weights(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """Take the weights of the library's own network, its classifier left out and named.

        Raises:
            WeightsError: they are of another network.
        """
        wanted = self.body.state_dict().keys()
        missing = sorted(name for name in wanted - state.keys() if "num_batches" not in name)
        if missing:
            raise WeightsError(
                f"{source} is of another network than CLS.MODEL.NAME {self.library_name} (it has "
                f"no {missing[0]})"
            )
        left_out = sorted(state.keys() - wanted)
        # A deeper network of the same kind has all that this one has, and more.
        unknown = [name for name in left_out if not name.startswith(self._left_out)]
        if unknown:
            raise WeightsError(
                f"{source} is of another network than CLS.MODEL.NAME {self.library_name} (which "
                f"has no {unknown[0]})"
            )
        try:
            self.body.load_state_dict({k: x for k, x in state.items() if k in wanted}, strict=False)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:300]
            raise WeightsError(f"{source} is of another network: {first}") from error
        if left_out:
            logger.info(
                "%s: the classifier (%s) is left out, a new one is drawn",
                source,
                ", ".join(left_out),
            )


def _timm_body(name: str, image_size: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A network of timm that returns its features, and how names of its classifier begin."""
    body: Any = timm.create_model(name, num_classes=0)
    embedding = getattr(body, "patch_embed", None)
    bound = getattr(embedding, "img_size", None)
    if bound is not None and bound != (image_size, image_size):
        body = timm.create_model(name, num_classes=0, img_size=image_size)
    names = body.pretrained_cfg.get("classifier") or ()
    return body, tuple(f"{x}." for x in ([names] if isinstance(names, str) else names))


def _torchvision_body(name: str, image_size: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A classifier of torchvision without its last linear layer, and how names of that begin."""
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    body = torchvision.models.get_model(name, weights=None, **options)
    linear = [key for key, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("it does not end in a linear layer")
    holder, _, attribute = linear[-1].rpartition(".")
    setattr(body.get_submodule(holder), attribute, nn.Identity())
    return body, (f"{linear[-1]}.",)
