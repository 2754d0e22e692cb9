"""detectron2's own tools/lazyconfig_train_net.py, as it is and with two lines of ours."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]

MEMBERS = 2
EPISODES = 3


@pytest.fixture
def tool():
    """The module; it is beside detectron2's package, in a checkout and in what pip installs."""
    import detectron2

    path = Path(detectron2.__file__).parents[1] / "tools" / "lazyconfig_train_net.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    specification = importlib.util.spec_from_file_location("lazyconfig_train_net", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def train(tool, project, monkeypatch):
    """A function that runs the tool's do_train and returns the trainer in it."""

    def run(folder, *, members=None, resume=False, stop=None):
        cfg = project.lazy_config(folder)
        trainers = []

        class Trainer(tool.SimpleTrainer):
            """Where a project adds its two lines: after register_hooks, and in train's length."""

            def register_hooks(self, hooks):
                super().register_hooks(hooks)
                if self in trainers:
                    return
                trainers.append(self)
                if members is not None:
                    hook = project.IMWAHook(
                        project.ITERATIONS,
                        members=members,
                        episodes=EPISODES,
                        build_loader=lambda: tool.instantiate(cfg.dataloader.train),
                    )
                    hook.register(self)
                if stop is not None:
                    self.register_hooks([project.StopAfter(stop)])

            def train(self, start_iter, max_iter):
                super().train(start_iter, getattr(self, "max_iter", max_iter))

        project.seed_all_rng(7)
        with monkeypatch.context() as patch:
            patch.setattr(tool, "SimpleTrainer", Trainer)
            tool.do_train(SimpleNamespace(resume=resume), cfg)
        return trainers[0]

    return run


def rates(trainer):
    """Learning rate of each global step."""
    return {int(g): lr for lr, g in trainer.storage.history("lr").values()}


def weights(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def test_members_have_the_rates_of_a_plain_run(train, project, tmp_path):
    plain = rates(train(tmp_path / "plain"))
    assert len(set(plain.values())) > 4  # it warms up and decays
    trainer = train(tmp_path / "imwa", members=MEMBERS)
    schedule = next(h.schedule for h in trainer._hooks if isinstance(h, project.IMWAHook))
    expected = {g: plain[schedule.position(g).t] for g in range(MEMBERS * project.ITERATIONS)}
    assert rates(trainer) == expected


def test_one_member_is_the_plain_run(train, tmp_path):
    plain, one = train(tmp_path / "plain"), train(tmp_path / "imwa", members=1)
    assert rates(one) == rates(plain)
    for name, tensor in weights(plain).items():
        assert torch.equal(weights(one)[name], tensor), name


@pytest.mark.parametrize(("members", "stop"), [(1, 5), (2, 2), (2, 4), (2, 7), (2, 17)])
def test_a_resumed_run_equals_one_never_stopped(train, project, tmp_path, members, stop):
    whole = train(tmp_path / "whole", members=members)
    with pytest.raises(project.StoppedError):
        train(tmp_path / "stopped", members=members, stop=stop)
    resumed = train(tmp_path / "stopped", members=members, resume=True)
    assert resumed.start_iter == stop
    rest = {g: lr for g, lr in rates(whole).items() if g >= stop}
    assert rates(resumed) == rest
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name


def test_a_schedule_of_the_whole_run_is_refused(project):
    """Whoever lists the hooks by hand, or sets a trainer to M * T, gets no other rates silently."""
    trainer = project.TeacherStudentTrainer()
    scheduler = project.param_scheduler(6)
    imwa = project.IMWAHook(6, members=2)
    trainer.register_hooks([project.LRScheduler(scheduler=scheduler), imwa])
    with pytest.raises(ValueError, match=r"learning rates are planned for 12 steps.*of 6"):
        trainer.train(0, 12)
