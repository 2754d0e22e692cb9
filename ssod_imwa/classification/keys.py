"""Every key of classification, made of the tree in `config.classification` for the time being."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from ssod_imwa.config.classification import CLS, CLS_CHOICES, CLS_ELEMENTS, CLS_RANGES
from ssod_imwa.config.options import INFINITY, Options, Section, option

CLASSIFICATION = {"TASK": ("classification",)}


@dataclass(frozen=True)
class NetworkOptions(Options):
    """MODEL: what a network begins with."""

    weights: str = option(
        "",
        '"" (random), "imagenet" (torchvision\'s), a run\'s folder, or a file of a run',
        free=True,
    )
    pixel_mean: list[float] = option([123.675, 116.28, 103.53], "subtracted from pixels (0..255)")
    pixel_std: list[float] = option([58.395, 57.12, 57.375], "divided into pixels (0..255)")


def _group(prefix: str, tree: CfgNode) -> type:
    fields: list[tuple[str, Any, Any]] = []
    for key, default in tree.items():
        name = f"{prefix}.{key}"
        if isinstance(default, CfgNode):
            group = _group(name, default)
            fields.append((key.lower(), group, group()))
            continue
        kind: Any = type(default)
        if kind is list:
            kind = list[CLS_ELEMENTS.get(name) or type(default[0])]  # type: ignore[misc]
        low, high = CLS_RANGES.get(name, (-INFINITY, INFINITY))
        choices = CLS_CHOICES.get(name, ())
        entry = option(default, "docs/classification.md", choices=choices, low=low, high=high)
        fields.append((key.lower(), kind, entry))
    return dataclasses.make_dataclass(
        prefix.replace(".", ""), fields, bases=(Options,), frozen=True
    )


SECTIONS = (
    Section("MODEL", NetworkOptions, CLASSIFICATION),
    Section("CLS", _group("CLS", CLS), CLASSIFICATION),
)
