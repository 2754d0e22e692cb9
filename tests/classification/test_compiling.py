"""Whole runs of compiled networks."""

import re
import shutil

import pytest
import torch
from support import assert_equal, final_weights

from ssod_imwa.errors import ConfigError
from ssod_imwa.runs import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The graphs that torch.compile captures, which run as they are: nothing is generated."""
    graphs, torch_compile = [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda x, mode=None: torch_compile(x, backend=keep))
    yield graphs
    torch.compiler.reset()


def test_a_compiled_run_trains_and_saves_the_plain_network(config, compiled_graphs):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "CLS.EMA_DECAY", 0.9)
    plain = config(*settings, output="plain")
    compiled = config(*settings, "CLS.MODEL.COMPILE", "default", output="compiled")
    run.train(plain)
    assert not compiled_graphs
    run.train(compiled)
    # The trial, and one for all members, episodes and evaluations.
    assert len(compiled_graphs) == 2
    assert_equal(final_weights(plain), final_weights(compiled))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_training_differs_by_rounding(config):
    settings = ("SOLVER.MAX_ITER", 2, "SOLVER.BASE_LR", 0.01)
    plain = config(*settings, output="plain")
    compiled = config(*settings, "CLS.MODEL.COMPILE", "default", output="compiled")
    for cfg in (plain, compiled):
        run.train(cfg)
    expected, found = final_weights(plain), final_weights(compiled)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["mfw", "manifold"])
def test_mixing_inside_a_compiled_network_is_refused(config, kind):
    cfg = config(
        *("CLS.MODEL.COMPILE", "default", "CLS.MIX.KIND", kind, "CLS.MIX.LAYERS", ["layer3"])
    )
    message = f"CLS.MODEL.COMPILE = 'default' is not allowed with CLS.MIX.KIND = '{kind}'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        run.train(cfg)


def test_a_machine_without_compiler_is_told_in_one_line(config, monkeypatch):
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/compiler"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch.compiler.reset()
    with pytest.raises(ConfigError, match=r"nothing can be compiled here \(.+\)$") as caught:
        run.train(config("CLS.MODEL.COMPILE", "default"))
    assert "\n" not in str(caught.value)
