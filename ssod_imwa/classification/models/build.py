"""Networks by name, and their layers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.classifiers import ClassifierKind
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.feature_head import NAME as FEATURE_HEAD
from ssod_imwa.classification.models.feature_head import FeatureHead, FeatureHeadOptions
from ssod_imwa.classification.models.feature_tail import NAME as FEATURE_TAIL
from ssod_imwa.classification.models.feature_tail import FeatureTail, FeatureTailOptions
from ssod_imwa.classification.models.library_models import LibraryClassifier, is_library_name
from ssod_imwa.classification.models.resnet12 import ResNet12
from ssod_imwa.classification.models.torchvision_models import NAMES, TorchvisionResNet
from ssod_imwa.classification.models.vit import ViT
from ssod_imwa.classification.models.wide_resnet import WideResNet, WideResNetOptions
from ssod_imwa.config.options import Options, option


@dataclass(frozen=True)
class Settings:
    """What a network is built from besides its name.

    Attributes:
        classes: C.
        image_size: height and width of the images in pixels; only vision transformers are bound
            to it.
        classifier: "linear" or "cosine".
        scale: of the cosine classifier.
        pretrained: begin with torchvision's ImageNet weights, but for the classifier.
        drop_path: of vision transformers, see `ViT`.
        wide_resnet: of wide ResNets.
        feature_head: of "feature_head", which sees cached features in place of images.
        feature_tail: of "feature_tail", which sees cached maps.
    """

    classes: int
    image_size: int
    classifier: ClassifierKind = "linear"
    scale: float = 30.0
    pretrained: bool = False
    drop_path: float = 0.0
    wide_resnet: WideResNetOptions = WideResNetOptions()
    feature_head: FeatureHeadOptions = FeatureHeadOptions()
    feature_tail: FeatureTailOptions = FeatureTailOptions()


Builder = Callable[[Settings], ImageClassifier]


def _cifar_resnet(depth: int) -> Builder:
    return lambda s: CifarResNet(s.classes, depth=depth, classifier=s.classifier, scale=s.scale)


def _wide_resnet(width: int) -> Builder:
    return lambda s: WideResNet(
        s.classes, width=width, options=s.wide_resnet, classifier=s.classifier, scale=s.scale
    )


def _torchvision(name: str, *, small_stem: bool = False) -> Builder:
    return lambda s: TorchvisionResNet(
        name,
        s.classes,
        small_stem=small_stem,
        pretrained=s.pretrained,
        classifier=s.classifier,
        scale=s.scale,
    )


def _feature_head(s: Settings) -> FeatureHead:
    return FeatureHead(s.classes, s.feature_head, classifier=s.classifier, scale=s.scale)


def _feature_tail(s: Settings) -> FeatureTail:
    return FeatureTail(s.classes, s.feature_tail, classifier=s.classifier, scale=s.scale)


def _resnet12(s: Settings) -> ResNet12:
    return ResNet12(s.classes, classifier=s.classifier, scale=s.scale)


def _vit(*, patch_size: int, dim: int, depth: int, heads: int) -> Builder:
    return lambda s: ViT(
        s.classes,
        image_size=s.image_size,
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=heads,
        drop_path=s.drop_path,
        classifier=s.classifier,
        scale=s.scale,
    )


def _library(name: str) -> Builder:
    return lambda s: LibraryClassifier(
        name, s.classes, image_size=s.image_size, classifier=s.classifier, scale=s.scale
    )


VITS: dict[str, Builder] = {
    "vit_base_patch16": _vit(patch_size=16, dim=768, depth=12, heads=12),
    "vit_tiny_patch4_32": _vit(patch_size=4, dim=96, depth=6, heads=3),
}
WIDE_RESNETS: dict[str, Builder] = {f"wrn_28_{width}": _wide_resnet(width) for width in (2, 8)}
MODELS: dict[str, Builder] = {
    **{f"cifar_resnet{depth}": _cifar_resnet(depth) for depth in (20, 32, 44, 56)},
    **WIDE_RESNETS,
    **{name: _torchvision(name) for name in NAMES},
    **{
        f"{name}_small": _torchvision(name, small_stem=True)
        for name in ("resnet18", "resnet34", "resnet50")
    },
    "resnet12": _resnet12,
    **VITS,
    FEATURE_HEAD: _feature_head,
    FEATURE_TAIL: _feature_tail,
}
ON_FEATURES = {FEATURE_HEAD: "cached features", FEATURE_TAIL: "cached maps"}
"""Networks that see no pixels, and what they train on."""


@dataclass(frozen=True)
class NetworkOptions(Options):
    """Which network."""

    name: str = option(
        "cifar_resnet32",
        f"the network: {', '.join(MODELS)}, or timm:NAME or torchvision:NAME, any classifier of "
        "theirs",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)


def check_name(name: str) -> None:
    """Raise ValueError if there is no network of this name."""
    if name not in MODELS and not is_library_name(name):
        raise ValueError(
            f"model = {name!r} is not allowed{_nearest(name, MODELS)} (must be one of "
            f"{list(MODELS)}, or begin with timm: or torchvision:)"
        )


def build_classifier(name: str, settings: Settings) -> ImageClassifier:
    """A network with random weights, or ImageNet's.

    Args:
        name: one of `MODELS`, or "timm:NAME" or "torchvision:NAME".
        settings: see there.

    Raises:
        ValueError: the name is not known, or a setting is out of range or does not go with it.
        WeightsError: the ImageNet weights can be neither found nor downloaded.

    Example:
        >>> model = build_classifier("vit_tiny_patch4_32", Settings(10, image_size=32))
        >>> model.num_features, len(model.groups)
        (96, 7)
    """
    check_name(name)
    check_at_least_1(classes=settings.classes)
    _check_owner(name, settings)
    return _library(name)(settings) if is_library_name(name) else MODELS[name](settings)


def _check_owner(name: str, settings: Settings) -> None:
    """Raise ValueError if a setting is not its default that only other networks read."""
    if settings.pretrained and name not in NAMES:
        raise ValueError(
            f"pretrained = True is not allowed with model = {name!r} (must be one of {list(NAMES)})"
        )
    if settings.drop_path != 0 and name not in VITS:
        raise ValueError(
            f"drop_path = {settings.drop_path} is not allowed with model = {name!r} (must be 0: "
            "only vision transformers have it)"
        )
    if settings.wide_resnet != WideResNetOptions() and name not in WIDE_RESNETS:
        raise ValueError(
            f"{settings.wide_resnet} is not allowed with model = {name!r} (must be one of "
            f"{list(WIDE_RESNETS)})"
        )
    for options, owner in (
        (settings.feature_head, FEATURE_HEAD),
        (settings.feature_tail, FEATURE_TAIL),
    ):
        if options != type(options)() and name != owner:
            raise ValueError(f"{options} is not allowed with model = {name!r} (must be {owner!r})")


def find_layer(model: ImageClassifier | Experts, name: str) -> nn.Module:
    """The layer of a dotted name, whose output methods may mix.

    Args:
        model: of experts, names begin with "experts.0.".
        name: a group, such as "layer3", or a layer in one, such as "layer3.2".

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> model = CifarResNet(10, depth=14)
        >>> find_layer(model, "layer3.1") is model.layer3[1]
        True
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    del layers[""]  # the model itself
    if name not in layers:
        groups = (
            [f"experts.0.{group}" for group in model.experts[0].group_names]
            if isinstance(model, Experts)
            else list(model.group_names)
        )
        raise ValueError(
            f"layer = {name!r} is not allowed{_nearest(name, layers)} (must be one of {groups}, or "
            "a layer in one)"
        )
    return layers[name]


def _nearest(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, names, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
