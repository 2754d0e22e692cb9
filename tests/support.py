"""What tests of several rooms share; `from support import ...`."""

import io
import os
import traceback

import pytest
import torch

from ssod_imwa.engine import launch
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.runs.trained import read_trained

# Forked ranks start at once, where spawned ones import torch for seconds. A process that has
# started CUDA's threads cannot be forked.
needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which CUDA does not bear")


def on_two_ranks(function, folder):
    """Run a function of the rank in two forked processes; what they returned, in rank order."""
    return on_ranks(2, function, folder)


def on_ranks(size, function, folder):
    """Run a function of the rank in forked processes; what they returned, in rank order."""
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _child(function, rank, size, folder)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * size
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(size)]


def _child(function, rank, size, folder):
    code = 1
    try:
        place = f"file://{folder}/rendezvous"
        with launch._process_group(rank, size, rank, place, use_cuda=False):
            torch.save(function(rank), folder / f"result{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class SaveAt(HookBase):
    """Saves the state of the run after a global step, where the checkpoint hook would."""

    def __init__(self, step):
        self.step, self.file = step, io.BytesIO()

    def after_step(self):
        if self.trainer.iter == self.step:
            torch.save(self.trainer.state_dict(), self.file)

    def read(self):
        self.file.seek(0)
        return torch.load(self.file, weights_only=True)


def final_weights(cfg):
    """The weights of all models that a finished run left, by model and name."""
    models = read_trained(cfg.OUTPUT_DIR).models
    return {f"{m}.{k}": v for m, state in models.items() for k, v in state.items()}


def assert_equal(first, second):
    """Assert that two states are equal, bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def mean_of(first, second):
    """The mean of two states; whole numbers are the first's."""
    return {
        k: ((v.double() + second[k].double()) / 2).to(v.dtype) if v.is_floating_point() else v
        for k, v in first.items()
    }
