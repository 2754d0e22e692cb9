"""Loss and accuracy around trained weights: how flat a minimum is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

Direction = dict[str, torch.Tensor]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


@torch.no_grad()
def random_direction(model: nn.Module, generator: np.random.Generator) -> Direction:
    """A Gaussian direction in which every filter is as long as the model's own.

    So equal steps are equally large for networks whose weights differ in scale only. A filter is
    what makes one output: weights[i] of a convolution or a linear layer. Weights with fewer than
    two dimensions (biases, those of normalization layers) do not move.

    Args:
        model: at the weights that are looked at.
        generator: of the direction.

    Returns:
        A tensor for each parameter, on its device.

    Source: Li et al. (arXiv 1712.09913), section 4; ECL, section VI-B.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> direction = random_direction(layer, np.random.default_rng(0))
        >>> torch.allclose(direction["weight"].norm(dim=1), layer.weight.norm(dim=1))
        True
        >>> direction["bias"]
        tensor([0., 0.])
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        drawn = torch.from_numpy(generator.standard_normal(weight.shape)).to(weight)
        lengths, drawn_lengths = weight.flatten(1).norm(dim=1), drawn.flatten(1).norm(dim=1)
        factor = lengths / drawn_lengths
        direction[name] = drawn * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return direction


@contextmanager
def moved(model: nn.Module, directions: Sequence[Direction]) -> Iterator[Callable[..., None]]:
    """A function that moves the model; afterwards its weights are as before, bit for bit.

    Args:
        model: buffers stay, so batch norms keep their statistics.
        directions: one or several.

    Yields:
        move(a, b, ...) sets the weights to the original ones + a directions[0] + b directions[1].
    """
    parameters = dict(model.named_parameters())
    original = {name: weight.detach().clone() for name, weight in parameters.items()}

    @torch.no_grad()
    def move(*steps: float) -> None:
        for name, weight in parameters.items():
            weight.copy_(original[name])
            for step, direction in zip(steps, directions, strict=True):
                weight.add_(direction[name], alpha=step)

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, weight in parameters.items():
                weight.copy_(original[name])


def landscape_along(
    model: nn.Module, direction: Direction, steps: Sequence[float] | np.ndarray, evaluate: Evaluate
) -> dict[str, np.ndarray]:
    """Numbers of the model moved along one direction.

    Args:
        model: in eval mode; restored.
        direction: see `random_direction`.
        steps: ε; 0 is the model itself.
        evaluate: the model to numbers by name, such as loss and accuracy.

    Returns:
        (steps,) float64 for each name.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> landscape_along(
        ...     model, {"weight": torch.ones(1, 1)}, [-1, 0, 1], lambda m: {"w": float(m.weight)}
        ... )
        {'w': array([1., 2., 3.])}
    """
    with moved(model, [direction]) as move:
        measured = []
        for step in steps:
            move(step)
            measured.append(evaluate(model))
    return {name: np.array([numbers[name] for numbers in measured]) for name in measured[0]}


def landscape_across(
    model: nn.Module,
    first: Direction,
    second: Direction,
    steps: Sequence[float] | np.ndarray,
    evaluate: Evaluate,
) -> dict[str, np.ndarray]:
    """Numbers of the model moved along two directions, (steps, steps) for each name.

    Row i, column j is the model + steps[i] first + steps[j] second; see `landscape_along`.
    """
    with moved(model, [first, second]) as move:
        measured = []
        for a in steps:
            for b in steps:
                move(a, b)
                measured.append(evaluate(model))
    shape = (len(steps), len(steps))
    return {
        name: np.array([numbers[name] for numbers in measured]).reshape(shape)
        for name in measured[0]
    }
