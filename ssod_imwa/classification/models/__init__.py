"""Networks for small images, and classifiers; larger networks come from torchvision."""

from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.classifiers import (
    CosineClassifier,
    make_classifier,
    tau_normalised,
)
from ssod_imwa.classification.models.wide_resnet import WideResNet

__all__ = ["CifarResNet", "CosineClassifier", "WideResNet", "make_classifier", "tau_normalised"]
