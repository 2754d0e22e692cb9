"""What tests of several rooms share; `from support import ...`."""

import dataclasses
import io
import os
import signal
import traceback
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.detection.detectors.options import FasterRCNNOptions
from ssod_imwa.engine import launch
from ssod_imwa.engine.hooks import LRHook
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.runs import run
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
        torch.set_num_threads(1)  # a fork has none of the parent's threads and would wait for them
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


@contextmanager
def stopped_in(step, *, rank=None):
    """Runs get SIGTERM in a step, counted from 0 since here: on every rank, or on one."""
    before_step, seen = LRHook.before_step, []

    def interrupted(hook):
        before_step(hook)
        seen.append(hook.trainer.iter)
        if len(seen) == step + 1 and rank in (None, hook.trainer.ranks.run.rank):
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LRHook, "before_step", interrupted)
        yield


def train_in_parts(cfg, stop):
    """Train a run that gets SIGTERM in a step and is resumed."""
    with stopped_in(stop):
        assert run.train(cfg) == 128 + signal.SIGTERM
    assert run.train(cfg, resume_from=True) == 0


def final_weights(cfg):
    """The weights of all models that a finished run left, by model and name."""
    models = read_trained(cfg.OUTPUT_DIR).models
    return {f"{m}.{k}": v for m, state in models.items() for k, v in state.items()}


def assert_equal(first, second):
    """Assert that two states are equal, bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def copied(state):
    """A snapshot of a nested state, whose tensors are live."""
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def same(one, other):
    """Whether two nested states are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@contextmanager
def in_one_thread():
    """PyTorch in one thread: bitwise comparisons and forked ranks want it, tests side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def mean_of(first, second):
    """The mean of two states; whole numbers are the first's."""
    return {
        k: ((v.double() + second[k].double()) / 2).to(v.dtype) if v.is_floating_point() else v
        for k, v in first.items()
    }


def detector_options(base=None, /, **groups):
    """Options with some fields changed: `detector_options(rpn={"nms_thresh": 0.5})`."""
    base = base or FasterRCNNOptions()
    changed = {k: dataclasses.replace(getattr(base, k), **fields) for k, fields in groups.items()}
    return dataclasses.replace(base, **changed)


class Softened:
    """As Soft Teacher trains: weighted classes, and boxes of a second sampling.

    Args:
        confident: targets of classification and of proposals.
        precise: targets of box regression.
        background: weight of background samples.
    """

    def __init__(self, confident, precise, background):
        self.confident, self.precise, self.background = confident, precise, background

    def __call__(self, parts):
        regions = parts.regions
        proposals, losses = regions.propose(self.confident)
        sampled = regions.sample(proposals, self.confident)
        labels = torch.cat([item.labels for item in sampled])
        logits = regions.predict([item.boxes for item in sampled]).logits
        weights = torch.where(labels < logits.shape[1] - 1, 1.0, self.background)
        terms = weights * F.cross_entropy(logits, labels, reduction="none")
        losses["loss_cls"] = terms.sum() / weights.sum().clamp(min=1)
        sampled = regions.sample(proposals, self.precise)
        outputs = regions.predict([item.boxes for item in sampled])
        return {**losses, "loss_box_reg": regions.box_loss(outputs, sampled)}
