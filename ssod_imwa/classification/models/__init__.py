"""Networks that classify images, their heads, and what else is done with them."""

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.build import MODELS, Settings, build_classifier, find_layer
from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.classifiers import (
    CosineClassifier,
    make_classifier,
    tau_normalized,
)
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.heads import ScaledClassifier, projection_head
from ssod_imwa.classification.models.wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "CifarResNet",
    "CosineClassifier",
    "Experts",
    "ImageClassifier",
    "ScaledClassifier",
    "Settings",
    "WideResNet",
    "build_classifier",
    "find_layer",
    "make_classifier",
    "projection_head",
    "tau_normalized",
]
