"""What lies between two trained networks, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ssod_imwa.averaging.weights import average

State = Mapping[str, torch.Tensor]


def interpolate(
    model: nn.Module,
    first: State,
    second: State,
    shares: Sequence[float] | np.ndarray,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    *,
    recompute: Callable[[nn.Module], object] | None = None,
) -> dict[str, np.ndarray]:
    """Numbers of the networks (1 − λ) A + λ B, statistics of batch norms included.

    Args:
        model: receives the weights and holds the last ones afterwards.
        first: state dict A.
        second: state dict B.
        shares: λ, each in 0..1.
        evaluate: the model in eval mode to numbers by name.
        recompute: re-estimates the batch norms of the model; called for 0 < λ < 1 only, as the two
            networks themselves have their own.

    Returns:
        (shares,) float64 for each name.

    Raises:
        ValueError: the states do not fit each other, or a share is out of range.

    Source: BTM, section 3 and figures 1, 2.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> ends = [{"weight": torch.tensor([[x]])} for x in (0.0, 4.0)]
        >>> interpolate(model, *ends, [0, 0.25, 1], lambda m: {"w": float(m.weight)})
        {'w': array([0., 1., 4.])}
    """
    measured = []
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"share = {share} is not allowed (must be 0..1)")
        model.load_state_dict(average([first, second], coefficients=[1 - share, share]))
        if recompute is not None and 0 < share < 1:
            recompute(model)
        measured.append(evaluate(model))
    return {name: np.array([numbers[name] for numbers in measured]) for name in measured[0]}


def weight_distances(first: State, second: State, names: Collection[str]) -> dict[str, float]:
    """‖θ1 − θ2‖₂ of each layer, by the layer's name.

    Args:
        first: state dict.
        second: state dict.
        names: of the trainable parameters; statistics of batch norms are none.

    Returns:
        In the order of `names`; weight and bias of a layer count together.

    Raises:
        ValueError: a name is missing, or shapes differ.

    Source: IMWA, figure 1 (c).

    Example:
        >>> states = [{"a.weight": torch.zeros(2), "a.bias": torch.tensor([x])} for x in (0.0, 3.0)]
        >>> weight_distances(*states, ["a.weight", "a.bias"])
        {'a': 3.0}
    """
    squares: dict[str, float] = {}
    for name in names:
        if name not in first or name not in second:
            raise ValueError(f"parameter {name!r} is not in both states")
        one, other = first[name], second[name]
        if one.shape != other.shape:
            raise ValueError(f"{name} is {tuple(one.shape)} and {tuple(other.shape)}")
        layer = name.rpartition(".")[0] or name
        difference = one.double() - other.double()
        squares[layer] = squares.get(layer, 0.0) + float(difference.square().sum())
    return {layer: square**0.5 for layer, square in squares.items()}


def total_distance(distances: Mapping[str, float]) -> float:
    """‖θ1 − θ2‖₂ of whole networks, or of some of their layers.

    Example:
        >>> total_distance({"a": 3.0, "b": 4.0})
        5.0
    """
    return sum(distance**2 for distance in distances.values()) ** 0.5
