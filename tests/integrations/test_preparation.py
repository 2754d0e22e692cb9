"""What registering the hook checks in a trainer and brings to it."""

import logging

import pytest
import torch

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]

LINE = r'checkpointer\.add_checkpointable\("trainer", trainer\)'


def make(project, folder, *, saves_trainer=True, stop=None):
    """Unbiased Teacher's trainer under the hook."""
    trainer = project.make_trainer(
        folder, kind=project.UnbiasedTeacherTrainer, SOLVER__CHECKPOINT_PERIOD=1
    )
    if saves_trainer:
        trainer.checkpointer.add_checkpointable("trainer", trainer)
    hook = project.IMWAHook(
        12, members=2, episodes=3, teacher="model_teacher", run_step="run_step_full_semisup"
    )
    hook.register(trainer)
    if stop is not None:
        trainer.register_hooks([project.StopAfter(stop)])
    return trainer


def test_a_trainer_that_is_not_saved_is_refused_before_training(project, tmp_path):
    with pytest.raises(ValueError, match=LINE):
        make(project, tmp_path, saves_trainer=False)


def test_the_line_of_the_message_makes_the_resume_exact(project, tmp_path):
    whole = make(project, tmp_path / "whole")
    whole.train()
    with pytest.raises(project.StoppedError):
        make(project, tmp_path / "stopped", stop=7).train()
    resumed = make(project, tmp_path / "stopped")
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 7
    resumed.train()
    for model in ("model", "model_teacher"):
        states = [getattr(trainer, model).state_dict() for trainer in (whole, resumed)]
        assert all(torch.equal(x, y) for x, y in zip(*map(dict.values, states), strict=True))


def test_a_checkpointer_of_a_hook_is_looked_at(project, tmp_path):
    """SimpleTrainer has none itself."""
    trainer = project.TeacherStudentTrainer()
    checkpointer = project.DetectionCheckpointer(trainer.model, str(tmp_path))
    trainer.register_hooks([project.PeriodicCheckpointer(checkpointer, 2)])
    with pytest.raises(ValueError, match=LINE):
        project.IMWAHook(6).register(trainer)
    checkpointer.add_checkpointable("trainer", trainer)
    with pytest.raises(ValueError, match=r'add_checkpointable\("ema", trainer\.ema\)'):
        project.IMWAHook(6, teacher="ema").register(trainer)
    checkpointer.add_checkpointable("ema", trainer.ema)
    project.IMWAHook(6, teacher="ema").register(trainer)


def test_a_list_of_hooks_by_hand_is_looked_at_when_training_begins(project, tmp_path):
    trainer = project.TeacherStudentTrainer()
    checkpointer = project.DetectionCheckpointer(trainer.model, str(tmp_path))
    imwa = project.IMWAHook(6)
    trainer.register_hooks([imwa, project.PeriodicCheckpointer(checkpointer, 2)])
    with pytest.raises(ValueError, match=LINE):
        trainer.train(0, 12)


@pytest.fixture
def loggers():
    """The two packages' loggers, as they were afterwards."""
    named = [logging.getLogger(name) for name in ("detectron2", "ssod_imwa")]
    before = [(list(x.handlers), x.level, x.propagate) for x in named]
    yield named
    for logger, (handlers, level, propagate) in zip(named, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("loggers")
def test_our_lines_are_in_their_log(project, tmp_path):
    from detectron2.utils.logger import setup_logger

    setup_logger(str(tmp_path))
    for name in ("first", "second"):  # handlers are added once
        trainer = project.make_trainer(tmp_path / name)
        project.IMWAHook(12, members=2, episodes=3).register(trainer)
        trainer.train()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    ours = [x for x in lines if " ssod_imwa.averaging." in x and "INFO: IMWA: 2 members" in x]
    assert len(ours) == 2
