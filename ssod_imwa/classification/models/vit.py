"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929), of timm's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier
from ssod_imwa.config.options import Options, option

WEIGHT_STD = 0.02
# MAE's and LiVT's classifiers begin near 0, so that the first logits say nothing.
CLASSIFIER_STD = 2e-5
NOT_DECAYED = ("cls_token", "pos_embed")


@dataclass(frozen=True)
class ViTOptions(Options):
    """Of vision transformers."""

    drop_path: float = option(
        0.0,
        "probability with which the last block is left out (stochastic depth)",
        low=0,
        below=1,
    )


@dataclass(frozen=True)
class LayerDecayOptions(Options):
    """Of rates in fine-tuning."""

    layer_decay: float = option(
        1.0,
        "factor of the rate from one layer to the one below; 0.75 in LiVT; below 1 no bias or norm "
        "has a weight decay",
        above=0,
        high=1,
    )


class ViTStem(nn.Module):
    """Images (B, 3, H, W) to tokens (B, 1 + N, d): class token, then patches row by row."""

    def __init__(self, source: TimmTransformer) -> None:
        super().__init__()
        # timm also has transformers without a class token or learned positions.
        assert source.cls_token is not None
        assert source.pos_embed is not None
        self.patch_embed = source.patch_embed
        self.cls_token = source.cls_token
        self.pos_embed = source.pos_embed

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, d) of the patches, with their positions."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def with_class_token(self, patches: torch.Tensor) -> torch.Tensor:
        """Any of the patches' tokens (B, n, d) behind the class token."""
        token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([token.expand(len(patches), -1, -1), patches], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.with_class_token(self.patches(images))


class ViT(ImageClassifier):
    """A vision transformer whose features are the layer-normalized mean of its patches' tokens.

    The groups are the stem and each block; the class token takes part in attention, but not in the
    mean. `exported_state` (in `models.weights`) gives the weights timm's names, for models that
    timm makes with `global_pool="avg"`. `load_encoder` takes weights of another image size.

    Args:
        classes: C, outputs of the classifier.
        image_size: height and width of the images, a multiple of `patch_size`.
        patch_size: height and width of a patch in pixels.
        dim: d, width of a token, a multiple of `heads`.
        depth: number of blocks.
        heads: of each attention.
        drop_path: the part of the images for which the last block is left out in training, 0..1;
            smaller for earlier blocks in proportion.
        classifier: "linear" or "cosine".
        scale: of the cosine classifier.

    Raises:
        ValueError: a number is out of range, or see `make_classifier`.

    Example:
        >>> with torch.device("meta"):
        ...     model = ViT(1000)  # ViT-B/16
        >>> sum(p.numel() for p in model.parameters()), model.num_features
        (86567656, 768)
    """

    library_names: Mapping[str, str] = {"stem.": "", "classifier.": "head."}

    def __init__(
        self,
        classes: int,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_path: float = 0.0,
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        _check_numbers(image_size, patch_size, dim, heads, drop_path)
        source = TimmTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            drop_path_rate=drop_path,
            global_pool="avg",
            num_classes=0,
        )
        self.num_features = dim
        self.group_names = ("stem", *(f"blocks.{i}" for i in range(depth)))
        self.stem = ViTStem(source)
        self.blocks = source.blocks
        self.fc_norm = source.fc_norm
        self.classifier = make_classifier(classifier, dim, classes, scale=scale)
        self.initialize(self.classifier)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """Features (B, d) of tokens (B, 1 + N, d)."""
        return self.fc_norm(maps[:, 1:].mean(1))

    def initialize(self, part: nn.Module) -> None:
        """Truncated normal weights and biases of 0 for linear layers, as timm and LiVT have."""
        last = set(self.classifier.modules())
        for module in part.modules():
            if isinstance(module, nn.Linear):
                std = CLASSIFIER_STD if module in last else WEIGHT_STD
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)


def layer_decay_groups(
    model: ImageClassifier, *, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer in which earlier layers learn more slowly.

    Of L groups of layers, group i = 0..L-1 has the rate lr * layer_decay^(L - i); what follows
    them has lr. Vectors (biases, norms), the class token and position embeddings do not decay.

    Args:
        model: its groups are the layers; parameters without `requires_grad` are left out.
        lr: of the classifier.
        weight_decay: of all that decays.
        layer_decay: in (0, 1]; 0.75 for ViT-B in LiVT, 0.65 at 384 px.

    Returns:
        Groups with params, lr, initial_lr and weight_decay, for AdamW or SGD.

    Raises:
        ValueError: `layer_decay` is out of range, or nothing is trained.

    Example:
        >>> from ssod_imwa.classification.models.cifar_resnet import CifarResNet
        >>> groups = layer_decay_groups(
        ...     CifarResNet(10, depth=8), lr=0.1, weight_decay=0.05, layer_decay=0.5)
        >>> sorted({group["lr"] for group in groups})
        [0.00625, 0.0125, 0.025, 0.05, 0.1]
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay = {layer_decay} is not allowed (must be in 0..1, not 0)")
    layers = len(model.groups)
    layer_of = {p: i for i, group in enumerate(model.groups) for p in group.parameters()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not name.endswith(NOT_DECAYED)
            key = (layer_of.get(parameter, layers), decays)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("the model has no parameter with requires_grad (nothing to train)")
    return [
        {
            "params": parameters,
            "lr": lr * layer_decay ** (layers - i),
            "initial_lr": lr * layer_decay ** (layers - i),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (i, decays), parameters in groups.items()
    ]


def _check_numbers(
    image_size: int, patch_size: int, dim: int, heads: int, drop_path: float
) -> None:
    if image_size < 1 or image_size % patch_size:
        raise ValueError(
            f"image_size = {image_size} is not allowed (must be a multiple of the patch size, "
            f"{patch_size})"
        )
    if dim % heads:
        raise ValueError(f"dim = {dim} is not allowed (must be a multiple of heads = {heads})")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path = {drop_path} is not allowed (must be 0 or more, below 1)")
