"""Backbones with a feature pyramid, as every detector of torchvision's parts takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter  # as its own detectors do
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from ssod_imwa.detection.detectors.options import TIMM, BackboneOptions, FPNOptions, ResNetOptions
from ssod_imwa.detection.detectors.timm_bodies import make_timm_body

# What each step of freeze_at adds to the frozen part: the stem, then res2..res5.
STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


class Backbone(nn.Module):
    """A body that gives maps of falling size, and a feature pyramid on them.

    Attributes:
        body: normalized images (N, 3, H, W) -> maps from fine to coarse, in a dict or, of timm, a
            list; weights of ImageNet go here.
        fpn: a dict of them -> maps of `out_channels` channels, extra levels last.
        out_channels: channels of every level.
        stride: of the coarsest level that comes from the body, in pixels; H and W have to be
            multiples of it.
    """

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, *, stride: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels: int = fpn.layer_blocks[0][0].out_channels
        self.stride = stride

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The pyramid's maps from fine to coarse: "0", "1", ..., then the extra levels."""
        if isinstance(self.body, IntermediateLayerGetter):
            return self.fpn(self.body(images))
        # The channels of a pixel side by side: with folded norms twice as fast on a CPU.
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        return self.fpn({str(number): x for number, x in enumerate(maps)})


def build_backbone(
    backbone: BackboneOptions,
    resnets: ResNetOptions,
    fpn: FPNOptions,
    *,
    levels: Sequence[int] = (2, 3, 4, 5),
    extra_blocks: ExtraFPNBlock | None = None,
) -> Backbone:
    """A randomly initialized backbone and its pyramid, with the first stages frozen.

    Args:
        backbone: which body, and what of it is frozen.
        resnets: of torchvision's ResNets; timm's bodies do not read them.
        fpn: the pyramid.
        levels: which maps the pyramid stands on: level l has stride 2**l.
        extra_blocks: makes coarser levels of the pyramid; None pools one, as a two-stage detector
            has it.

    Raises:
        ValueError: values do not fit together, or timm has no such body.

    Example:
        >>> resnets, fpn = ResNetOptions(depth=18), FPNOptions(out_channels=8)
        >>> backbone = build_backbone(BackboneOptions(), resnets, fpn, levels=(3, 4))
        >>> {name: tuple(x.shape) for name, x in backbone(torch.zeros(1, 3, 64, 96)).items()}
        {'0': (1, 8, 8, 12), '1': (1, 8, 4, 6), 'pool': (1, 8, 2, 3)}
    """
    if list(levels) != list(range(levels[0], levels[0] + len(levels))):
        raise ValueError(f"levels = {list(levels)} is not allowed (must be one after the other)")
    if backbone.name == "resnet":
        body, channels = _resnet_body(resnets, levels, backbone.freeze_at)
    else:
        body, channels = make_timm_body(
            backbone.name.removeprefix(TIMM),
            levels,
            freeze_at=backbone.freeze_at,
            norm=backbone.norm,
        )
    pyramid = FeaturePyramidNetwork(
        channels, fpn.out_channels, extra_blocks=extra_blocks or LastLevelMaxPool()
    )
    return Backbone(body, pyramid, stride=2 ** max(levels))


def _resnet_body(
    options: ResNetOptions, levels: Sequence[int], freeze_at: int
) -> tuple[nn.Module, list[int]]:
    if freeze_at > len(STAGES):
        raise ValueError(
            f"freeze_at = {freeze_at} is not allowed with a ResNet (must be 0..{len(STAGES)})"
        )
    if not {2, 3, 4, 5} >= set(levels):
        raise ValueError(
            f"levels = {list(levels)} is not allowed with a ResNet (must be among 2, 3, 4, 5)"
        )
    body = _resnet(options, freeze_at)
    channels = [body.inplanes // 8 * 2 ** (level - 2) for level in levels]
    maps = {f"layer{level - 1}": str(number) for number, level in enumerate(levels)}
    return IntermediateLayerGetter(body, maps), channels


def _resnet(options: ResNetOptions, freeze_at: int) -> resnet.ResNet:
    norm_layer = FrozenBatchNorm2d if options.norm == "FrozenBN" else nn.BatchNorm2d
    body = getattr(resnet, f"resnet{options.depth}")(weights=None, norm_layer=norm_layer)
    if options.stride_in_1x1:
        _move_strides(body)
    for stage in STAGES[:freeze_at]:
        for name in stage:
            setattr(body, name, _frozen(getattr(body, name)))
    return body


def _move_strides(body: resnet.ResNet) -> None:
    """Put each bottleneck's stride into its first convolution, where Caffe's ResNets have it."""
    blocks = [part for part in body.modules() if isinstance(part, resnet.Bottleneck)]
    if not blocks:
        raise ValueError("stride_in_1x1 is not allowed at depth 18 (its blocks have no 1x1)")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _frozen(module: nn.Module) -> nn.Module:
    """Stop training of the parameters and of the batch norms' statistics."""
    module.requires_grad_(False)
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, part in module.named_children():
        setattr(module, name, _frozen(part))
    return module
