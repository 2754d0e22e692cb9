"""Averages that a detectron2 project keeps beside its model, as modules or not."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]


def make(project, folder, *, given=True, members=2, **settings):
    """A trainer with an EMA state, and IMWAHook that knows of it or not."""
    trainer = project.make_trainer(folder, **settings)
    ema = project.EMAHook(trainer.model)
    trainer.register_hooks([ema])
    trainer._hooks.insert(0, trainer._hooks.pop())
    trainer.checkpointer.add_checkpointable("ema_state", trainer.model.ema_state)
    known = {"ema": trainer.model.ema_state} if given else None
    imwa = project.IMWAHook(12, members=members, episodes=3, averaged_state=known)
    imwa.register(trainer)
    return trainer


def clones(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_state_that_is_no_module_is_averaged_like_a_teacher(project, tmp_path):
    trainer = make(project, tmp_path / "state")
    trainer.train()

    reference = project.make_trainer(tmp_path / "module")
    reference.model_teacher = copy.deepcopy(reference.model)
    reference.checkpointer.add_checkpointable("model_teacher", reference.model_teacher)
    reference.register_hooks([project.ModuleEMAHook()])
    reference._hooks.insert(0, reference._hooks.pop())
    project.IMWAHook(12, members=2, episodes=3, teacher="model_teacher").register(reference)
    reference.train()

    assert_equal(trainer.model.state_dict(), reference.model.state_dict())
    assert_equal(trainer.model.ema_state.state, reference.model_teacher.state_dict())


@pytest.mark.parametrize("stop", [2, 6, 10, 12])
def test_a_resumed_state_equals_one_never_stopped(project, tmp_path, stop):
    settings = {"SOLVER__CHECKPOINT_PERIOD": 1}
    whole = make(project, tmp_path / "whole", **settings)
    whole.train()
    stopped = make(project, tmp_path / "stopped", **settings)
    stopped.register_hooks([project.StopAfter(stop)])
    with pytest.raises(project.StoppedError):
        stopped.train()
    resumed = make(project, tmp_path / "stopped", **settings)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert_equal(resumed.model.ema_state.state, whole.model.ema_state.state)


@pytest.mark.parametrize(
    ("given", "members", "warned"), [(False, 2, True), (True, 2, False), (False, 1, False)]
)
def test_a_state_that_would_run_on_across_members_is_named(
    project, tmp_path, caplog, given, members, warned
):
    trainer = make(project, tmp_path, given=given, members=members)
    with caplog.at_level(logging.WARNING, logger="ssod_imwa"):
        trainer.train()
    lines = [r.getMessage() for r in caplog.records if "looks like an average" in r.getMessage()]
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith("model.ema_state looks like an average of the")


def test_a_state_in_a_hook_alone_is_named_by_it(project, tmp_path, caplog):
    trainer = make(project, tmp_path, given=False)
    hook = trainer._hooks[0]
    hook.model = SimpleNamespace(
        ema_state=hook.ema_updater.state, state_dict=trainer.model.state_dict
    )
    del trainer.model.ema_state
    with caplog.at_level(logging.WARNING, logger="ssod_imwa"):
        trainer.train()
    assert "EMAHook.model.ema_state looks like an average" in caplog.text


def test_a_teacher_that_nobody_named_is_found(project, tmp_path, caplog):
    trainer = project.make_trainer(tmp_path, kind=project.UnbiasedTeacherTrainer)
    trainer.checkpointer.add_checkpointable("trainer", trainer)
    hook = project.IMWAHook(12, members=2, run_step="run_step_full_semisup")
    hook.register(trainer)
    with caplog.at_level(logging.WARNING, logger="ssod_imwa"):
        trainer.train()
    lines = [r.getMessage() for r in caplog.records if "looks like an average" in r.getMessage()]
    assert [line.split(" looks")[0] for line in lines] == ["trainer.model_teacher"]


def test_a_state_that_is_filled_too_late_is_refused(project, tmp_path):
    trainer = make(project, tmp_path)
    trainer._hooks.append(trainer._hooks.pop(0))
    with pytest.raises(ValueError, match=r"averaged_state\['ema'\] holds no tensors.*come before"):
        trainer.train()


def test_what_holds_no_tensors_is_refused(project, tmp_path):
    trainer = project.make_trainer(tmp_path)
    hook = project.IMWAHook(12, members=2, averaged_state={"ema": trainer.scheduler})
    trainer.checkpointer.add_checkpointable("scheduler", trainer.scheduler)
    hook.register(trainer)
    with pytest.raises(TypeError, match=r"averaged_state\['ema'\] = .*must be a module, or have"):
        trainer.train()
    with pytest.raises(ValueError, match=r"averaged_state\['teacher'\] is not allowed"):
        project.IMWAHook(12, averaged_state={"teacher": trainer.model})


def test_a_state_that_is_not_saved_is_refused_before_training(project, tmp_path):
    trainer = project.make_trainer(tmp_path)
    trainer.register_hooks([project.EMAHook(trainer.model)])
    hook = project.IMWAHook(12, averaged_state={"ema": trainer.model.ema_state})
    with pytest.raises(ValueError, match=r'add_checkpointable\("ema", averaged_state.ema\)'):
        hook.register(trainer)
