"""CReST's generations: which pseudo-labels the next one learns (Wei et al., arXiv 2102.09559).

Each generation is a run of its own with a new network, optimizer, schedule and average. Its final
model labels the unlabeled images once; the labels of rare classes are kept more often, and join the
original labeled images of the next generation. So members are averaged inside a generation, never
across two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ssod_imwa.classification.class_counts import checked_counts
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.splits import join_unlabeled
from ssod_imwa.config.options import Options, Switch, option
from ssod_imwa.engine.checkpoint.atomic import write_text
from ssod_imwa.errors import DataError

LABELS_FILE = "pseudo_labels.json"
_SEVERAL = {
    "generations": Switch("above 1", lambda value: isinstance(value, (int, float)) and value > 1)
}


@dataclass(frozen=True)
class GenerationOptions(Options):
    """CLS.CREST: how often training begins anew on more labels."""

    generations: int = option(
        1,
        "G, how often a new network is trained; SOLVER.MAX_ITER and IMWA.EPISODES are those of all "
        "together, the rate's schedule is each one's own. CReST: 5 (DASO's code) or 6",
        low=1,
    )
    alpha: float = option(
        3.0,
        "α, of class k the share (N_(K+1-k) / N_1)^(1/α) of its pseudo-labels is kept; 0.7 on "
        "ImageNet-127",
        above=0,
        when=_SEVERAL,
    )
    generation: int = option(
        0, "0 trains all in turn, in folders generation1, ... of OUTPUT_DIR; g that one alone",
        low=0,
        when=_SEVERAL,
    )  # fmt: skip
    labels: str = option(
        "",
        "pseudo_labels.json of the generation before, for one from the second on",
        free=True,
        when=_SEVERAL,
    )


def keep_rates(counts: Sequence[int], *, alpha: float) -> torch.Tensor:
    """μ (C,), float64: the share of each class's pseudo-labels that is kept; 1 of the rarest class.

    The class of rank r from the head has (N of rank r from the tail / N_1)^(1/α).

    Args:
        counts: N, labeled images of each class in any order.
        alpha: α.

    Source: CReST, section 3.2.

    Example:
        >>> keep_rates([100, 10, 1], alpha=2.0)
        tensor([0.1000, 0.3162, 1.0000], dtype=torch.float64)
    """
    checked = checked_counts(counts)
    order = checked.argsort(descending=True, stable=True)
    rates = torch.empty_like(checked)
    rates[order] = (checked[order.flip(0)] / checked.max()) ** (1 / alpha)
    return rates


def choose_labels(
    probabilities: torch.Tensor, rates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (n,), ascending, and classes (n,) of the pseudo-labels that are kept.

    Of the n_k images predicted as class k the ⌊μ_k n_k⌋ surest, the earlier ones of equal ones.

    Args:
        probabilities: (N, C) of all unlabeled images.
        rates: μ (C,) of `keep_rates`.
    """
    confidence, predicted = probabilities.max(1)
    chosen = []
    for k, rate in enumerate(rates.tolist()):
        positions = (predicted == k).nonzero()[:, 0]
        # The smallest step above: 0.29 of 100 is 28.9999... in floating point.
        count = int(rate * len(positions) + 1e-9)
        order = confidence[positions].argsort(descending=True, stable=True)
        chosen.append(positions[order[:count]])
    together = torch.cat(chosen).sort().values
    return together, predicted[together]


def write_labels(path: Path, positions: torch.Tensor, labels: torch.Tensor) -> None:
    """Write what the next generation learns; the file is whole or not there."""
    content = {"positions": positions.tolist(), "labels": labels.tolist()}
    write_text(path, json.dumps(content) + "\n", kind="pseudo-labels")


def with_pseudo_labels(
    labeled: ClassificationDataset, unlabeled: ClassificationDataset, path: str
) -> ClassificationDataset:
    """The labeled images and those unlabeled ones that a file of `write_labels` names.

    Raises:
        DataError: the file is missing, is no such file, or is of other unlabeled images.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        positions = np.array(content["positions"], dtype=np.int64)
        labels = torch.tensor(content["labels"], dtype=torch.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = " ".join(str(error).split())
        raise DataError(f"CLS.CREST.LABELS = {path!r} cannot be read ({first})") from error
    if len(positions) != len(labels) or (len(positions) and positions.max() >= len(unlabeled)):
        raise DataError(
            f"CLS.CREST.LABELS = {path!r} is not of {unlabeled.name}'s {len(unlabeled)} images"
        )
    added = replace(unlabeled.subset(positions), labels=labels)
    return replace(join_unlabeled(labeled, added), is_labeled=True)
