"""Which tensors of some modules are averaged, and a watch over those that are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.linalg import vector_norm

from ssod_imwa.averaging.batchnorm import statistics_names
from ssod_imwa.averaging.checks import check_models, fingerprints, is_averaged, nonfinite
from ssod_imwa.averaging.weights import State, frozen_parameters, named_state, snapshot


class WatchedWeights:
    """The tensors of some modules that are averaged, and a watch over the frozen ones.

    Args:
        modules: name -> module, not wrapped for data parallelism.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        check_models(self.modules)
        self._frozen = frozen_parameters(self.modules)
        self._fingerprints: dict[str, int] | None = None
        # Constants such as attention masks; anything else that is not finite has diverged.
        buffers = {f"{k}.{n}": b for k, m in self.modules.items() for n, b in m.named_buffers()}
        self._infinite = set(nonfinite(buffers))
        if not self.live():
            raise ValueError(
                f"no parameter or buffer of {sorted(self.modules)} can be averaged "
                "(parameters that require no gradient in any module stay as they are)"
            )

    def live(self) -> State:
        """The live tensors that are averaged."""
        return named_state(self.modules, frozen=self._frozen)

    def batchnorm(self, live: State) -> State:
        """Clones of the running statistics."""
        pairs = [pair for pair in statistics_names(self.modules) if set(pair) <= live.keys()]
        return snapshot({name: live[name] for pair in pairs for name in pair})

    def diverged(self, live: State) -> list[str]:
        """Names of tensors that became NaN or infinite."""
        return nonfinite({n: t for n, t in live.items() if n not in self._infinite})

    def distances(self, live: State, mean: State) -> dict[str, float]:
        """How far the live parameters of each module are from a mean, relative to its length.

        The Euclidean norm of the difference over that of the mean: with two members that of either,
        with more the one of the live member.

        Args:
            live: of a member, see `live`.
            mean: of the same tensors, on any device.
        """
        distances = {}
        for prefix, module in self.modules.items():
            names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
            pairs = [(live[name], mean[name]) for name in names if name in live]
            # One tensor after the other: all differences at once would be a copy of the model.
            apart = [vector_norm(member.to(average.device) - average) for member, average in pairs]
            lengths = [vector_norm(average) for _, average in pairs]
            if lengths and (length := torch.stack(lengths).norm()) > 0:
                distances[prefix] = float(torch.stack(apart).norm() / length)
        return distances

    def clear_gradients(self) -> None:
        """Set all gradients to None."""
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)

    def check_frozen(self) -> None:
        """Raise ValueError if a parameter that is not averaged has changed since the first call."""
        if not self._frozen:
            return
        prints = fingerprints(
            {
                f"{prefix}.{name}": parameter.detach()
                for prefix, module in self.modules.items()
                for name, parameter in module.named_parameters()
                if name in self._frozen
            }
        )
        before = self._fingerprints
        if before is not None and (changed := [n for n in prints if prints[n] != before.get(n)]):
            raise ValueError(
                f"{changed[0]} has changed although it required no gradient when training began; "
                "such parameters are not averaged, so set requires_grad before building IMWA"
            )
        self._fingerprints = prints

    def state_dict(self) -> dict[str, Any]:
        """Fingerprints of the frozen parameters."""
        return {"fingerprints": self._fingerprints}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._fingerprints = state["fingerprints"]


def floating_buffers(modules: Mapping[str, nn.Module], live: State) -> State:
    """Those of the live tensors that data parallelism may leave different on every rank."""
    names = {f"{k}.{n}" for k, m in modules.items() for n, _ in m.named_buffers()}
    return {n: t for n, t in live.items() if n in names and is_averaged(t)}
