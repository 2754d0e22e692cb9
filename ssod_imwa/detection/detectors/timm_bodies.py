"""timm's networks as bodies of detectors: chosen levels, frozen stages, folded norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import Conv2dSame, pad_same
from timm.models import group_parameters
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ssod_imwa.engine.modes import evaluating


class FrozenNorm(FrozenBatchNorm2d):
    """A batch norm whose values stay as they are, with the activation that timm puts behind it.

    Args:
        norm: whose values it has.

    Attributes:
        folded: whether the convolution before it does its work, so that only the activation is
            left.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        self.load_state_dict(norm.state_dict())
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.folded = False

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factor and summand of each channel."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(x if self.folded else super().forward(x)))


class FoldedConv2d(nn.Conv2d):
    """A convolution that does the work of the frozen norm behind it, which costs nothing.

    Weights are multiplied at each call, so that both keep their values and their names: a state
    dict does not show it, and the convolution can be trained.

    Args:
        conv: whose weights and settings it has.
        norm: reads its output, alone.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenNorm) -> None:
        same = isinstance(conv, Conv2dSame)  # TensorFlow's padding, more at the right than left
        pairs: Any = conv  # torch types its settings as tuples of any length
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            pairs.kernel_size,
            pairs.stride,
            padding=0 if same else pairs.padding,
            dilation=pairs.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",  # draws no random numbers
        )
        self.same = same
        self.weight, self.bias = conv.weight, conv.bias
        norm.folded = True
        # In a tuple: as an attribute it would be a second owner of the norm's values.
        self._norm = (norm,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, shift = self._norm[0].affine()
        bias = shift if self.bias is None else shift + self.bias * scale
        if self.same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


def make_timm_body(
    name: str, levels: Sequence[int], *, freeze_at: int, norm: str
) -> tuple[nn.Module, list[int]]:
    """A network of timm with random weights that returns the maps of some levels.

    Args:
        name: as timm has it.
        levels: l has stride 2**l.
        freeze_at: how many stages are not trained, the stem first.
        norm: "FrozenBN" fixes all batch norms, "BN" those of frozen stages.

    Returns:
        The network, and the channels of its maps.

    Raises:
        ValueError: timm has no such network, or it has no such levels or not as many stages.
    """
    maps = find_maps(name, levels)
    body: Any = timm.create_model(name, features_only=True, out_indices=maps.indices)
    if maps.stages_kept is not None:
        del body.blocks[maps.stages_kept :]
    stages = _stages(name, body)
    count = max(stages.values()) + 1
    if freeze_at > count:
        raise ValueError(
            f"freeze_at = {freeze_at} is not allowed with {name} (must be 0..{count}, its stages "
            f"up to level {max(levels)})"
        )
    parameters = dict(body.named_parameters())
    for parameter, stage in stages.items():
        parameters[parameter].requires_grad_(stage >= freeze_at)
    _freeze_norms(body, everywhere=norm == "FrozenBN")
    _fold(body)
    return body, maps.channels


@dataclass(frozen=True)
class Maps:
    """Which of the maps of a network of timm are wanted.

    Attributes:
        indices: as timm counts them.
        channels: of each.
        stages_kept: of a network that keeps all its stages in `blocks`, also those behind the last
            map, as many as are needed; None of others.
    """

    indices: list[int]
    channels: list[int]
    stages_kept: int | None


def find_maps(name: str, levels: Sequence[int]) -> Maps:
    """Which of a network's maps have the strides of some levels.

    Raises:
        ValueError: timm has no such network, or it has no such maps.
    """
    try:
        network = _described(name, features_only=True)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"timm:{name} is not allowed (timm {timm.__version__} has no such network that gives "
            f"maps: {error})"
        ) from error
    of_stride = {item["reduction"]: item for item in network.feature_info.info}
    strides = [2**level for level in levels]
    if not of_stride.keys() >= set(strides):
        raise ValueError(
            f"timm:{name} is not allowed with levels {list(levels)} (its maps have the strides "
            f"{sorted(of_stride)}, not {strides})"
        )
    maps = [of_stride[stride] for stride in strides]
    sequence, _, last = maps[-1]["module"].partition(".")
    return Maps(
        [item["index"] for item in maps],
        [item["num_chs"] for item in maps],
        int(last) + 1 if sequence == "blocks" and hasattr(network, "blocks") else None,
    )


def _described(name: str, **options: Any) -> Any:
    """A network to ask for names and shapes, not for its values."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except NotImplementedError:  # torch 2.11 cannot find RegNet's widths there
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return timm.create_model(name, **options)


def _stages(name: str, body: nn.Module) -> dict[str, int]:
    """Which stage each parameter of a body belongs to; 0 is the stem."""
    network = _described(name)
    if not hasattr(network, "group_matcher"):
        raise ValueError(f"timm:{name} is not allowed (timm does not say what its stages are)")
    numbers = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    # As a body, timm names a part of a sequence "stages_0", not "stages.0".
    stages = {parameter.replace(".", "_"): stage for parameter, stage in numbers.items()}
    return {
        parameter: stages[parameter.replace(".", "_")] for parameter, _ in body.named_parameters()
    }


def _freeze_norms(module: nn.Module, *, everywhere: bool) -> None:
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d) and (everywhere or not part.weight.requires_grad):
            setattr(module, name, FrozenNorm(part))
        else:
            _freeze_norms(part, everywhere=everywhere)


def _fold(body: nn.Module) -> None:
    """Let convolutions do the work of the frozen norms that alone read their outputs."""
    pairs = _convolutions_of_norms(body)
    folded = {conv: FoldedConv2d(conv, norm) for conv, norm in pairs.items()}
    for module in list(body.modules()):
        for name, part in module.named_children():
            if part in folded:
                setattr(module, name, folded[part])


@torch.no_grad()
def _convolutions_of_norms(body: nn.Module) -> dict[nn.Conv2d, FrozenNorm]:
    """Each convolution that has a frozen norm to itself, found by watching an image pass."""
    makers: dict[int, nn.Conv2d] = {}
    readers: dict[int, list[Any]] = {}
    tensors = []  # kept: an id could else name a second tensor

    def note(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        readers.setdefault(id(inputs[0]), []).append(module)
        if type(module) in (nn.Conv2d, Conv2dSame) and module.padding_mode == "zeros":
            makers[id(output)] = module
        tensors.append((inputs, output))

    watched = [x for x in body.modules() if isinstance(x, FrozenNorm) or not list(x.children())]
    hooks = [module.register_forward_hook(note) for module in watched]
    with evaluating(body):
        body(torch.zeros(1, 3, 64, 64, device=next(body.parameters()).device))
    for hook in hooks:
        hook.remove()
    calls = Counter(makers.values())
    return {
        conv: readers[tensor][0]
        for tensor, conv in makers.items()
        if calls[conv] == 1 and [*map(type, readers.get(tensor, []))] == [FrozenNorm]
    }
