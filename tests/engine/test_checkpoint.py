"""CheckpointHook, prepare_output and resume around the real trainer."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.engine import checkpoint, faults
from ssod_imwa.engine.algorithm import Algorithm
from ssod_imwa.engine.atomic import WriteError, damage, load_checkpoint
from ssod_imwa.engine.checkpoint import CheckpointHook, prepare_output, resume
from ssod_imwa.engine.output import resume_files
from ssod_imwa.engine.trainer import HookBase, Trainer
from ssod_imwa.errors import CheckpointError

RUN = {"T": 6, "M": 1, "E": 3, "seed": 1, "config": "LOG_PERIOD: 20"}


class Numbers(Algorithm):
    """Fits a line; the teacher trails the student."""

    def __init__(self):
        torch.manual_seed(0)
        student = nn.Linear(2, 1)
        super().__init__(student, copy.deepcopy(student))
        self.seen = 0

    def losses(self, batch, t):
        self.seen += 1
        noise = torch.rand(())
        return {"loss": (self.student(batch) * noise).square().mean()}

    def after_step(self, t):
        with torch.no_grad():
            for teacher, student in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                teacher.lerp_(student, 0.5)

    def state_dict(self):
        return {"seen": np.int64(self.seen)}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Stop(HookBase):
    def __init__(self, at):
        self.at = at

    def after_step(self):
        if self.trainer.iter == self.at:
            self.trainer.stop_requested = True


def build(directory, *, hooks=(), iterations=6, run=RUN, **options):
    def batches(start):
        return (torch.full((3, 2), 1.0 + g) for g in range(start, iterations))

    algorithm = Numbers()
    trainer = Trainer(
        algorithm,
        EpisodeSchedule(iterations, episodes=3),
        batches,
        torch.optim.SGD(algorithm.student.parameters(), lr=0.01, momentum=0.9),
        seed=1,
    )
    trainer.register_hooks([CheckpointHook(directory, run=run, **options), *hooks])
    return trainer


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".json")


@pytest.fixture(autouse=True)
def _no_fault(monkeypatch):
    monkeypatch.setattr(faults, "_reached", {})
    monkeypatch.delenv(faults.VARIABLE, raising=False)


@pytest.fixture
def stopped(tmp_path):
    """A folder of a run that stopped after step 4, with checkpoints of steps 1, 2, 3, 4."""
    build(tmp_path, period=1, keep=3, hooks=[Stop(4)]).train()
    assert list(resume_files(tmp_path)) == [4, 3, 2, 1]
    return tmp_path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------------ writing


def test_writes_at_episode_ends_and_keeps_one_older(tmp_path):
    build(tmp_path).train()
    assert names(tmp_path) == [
        "last_checkpoint",
        "model_0000003.pth",
        "model_0000005.pth",
        "model_averaged.pth",
        "model_final.pth",
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert all(damage(path) is None for path in tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    ("period", "keep", "expected"),
    [(0, 0, [5]), (0, 9, [5, 3, 1]), (4, 9, [5, 3, 1]), (3, 9, [5, 3, 2, 1]), (1, 2, [5, 4, 3])],
)
def test_period_and_keep(tmp_path, period, keep, expected):
    build(tmp_path, period=period, keep=keep).train()
    assert list(resume_files(tmp_path)) == expected
    # What was removed took its digest along.
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.pth")))


def test_save_now_writes_once_per_step(tmp_path, monkeypatch):
    written = []
    write = checkpoint.write_checkpoint
    monkeypatch.setattr(
        checkpoint,
        "write_checkpoint",
        lambda path, state: (written.append(path.name), write(path, state)),
    )

    class Ask(HookBase):
        def after_step(self):
            for _ in range(2):
                self.trainer.hooks[0].save_now()

    build(tmp_path, hooks=[Ask()], iterations=3).train()
    assert [name for name in written if name[6].isdigit()] == [
        f"model_{g:07d}.pth" for g in range(3)
    ]


def test_model_files_hold_plain_models_by_name(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    final = load_checkpoint(tmp_path / "model_final.pth")
    averaged = load_checkpoint(tmp_path / "model_averaged.pth")
    assert final.pop("final") is True
    assert set(final) == set(averaged)
    assert (final["episode"], final["global_step"], final["config"]) == (2, 5, RUN["config"])
    assert final["inference_model"] == "teacher"
    for name in ("student", "teacher"):
        model = nn.Linear(2, 1)
        model.load_state_dict(final[name])
        assert torch.equal(model.weight, getattr(trainer.algorithm, name).weight)
    assert not torch.equal(final["student"]["weight"], final["teacher"]["weight"])


def test_value_that_a_file_cannot_hold_is_named(tmp_path):
    trainer = build(tmp_path)
    trainer.algorithm.state_dict = lambda: {"queue": [object()]}
    with pytest.raises(
        TypeError, match=r"trainer\['algorithm'\]\['queue'\]\[0\] is a builtins.obj"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": -1}, "period = -1 is not allowed"),
        ({"keep": -1}, "keep = -1 is not allowed"),
        ({"on_write_error": "ignore"}, "on_write_error = 'ignore' is not allowed"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointHook(tmp_path, run=RUN, **options)


# ---------------------------------------------------------------------------- failed writes


def test_failed_write_is_tried_again_after_the_next_step(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(faults.VARIABLE, "write:fsync=fail")
    build(tmp_path, hooks=[Stop(2)]).train()
    assert list(resume_files(tmp_path)) == [2]
    assert "model_0000001.pth could not be written" in caplog.text
    assert "no space left" in caplog.text


@pytest.mark.parametrize("period", [0, 1])
def test_three_failures_in_a_row_end_training(tmp_path, monkeypatch, period):
    # The pointer's place is taken by a folder, so every attempt fails at its end.
    (tmp_path / "last_checkpoint").mkdir()
    trainer = build(tmp_path, period=period)
    with pytest.raises(WriteError, match="last_checkpoint could not be written"):
        trainer.train()
    assert trainer.iter == {0: 3, 1: 2}[period]


def test_last_step_is_tried_three_times_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(faults.VARIABLE, "pointer:open=fail@3")
    build(tmp_path).train()
    assert list(resume_files(tmp_path)) == [5, 3]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert caplog.text.count("trying again") == 1


def test_on_write_error_raise_gives_up_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "write:open=fail")
    trainer = build(tmp_path, on_write_error="raise")
    with pytest.raises(WriteError):
        trainer.train()
    assert trainer.iter == 1


# ------------------------------------------------------------------------------- resuming


def test_resumed_run_ends_with_the_same_bits(tmp_path, stopped):
    whole = build(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.train()
    second = build(stopped, period=1)
    assert resume(second, stopped, RUN) == stopped / "model_0000004.pth"
    assert second.start_iter == 5
    second.train()
    for name, tensor in whole.algorithm.student.state_dict().items():
        assert torch.equal(tensor, second.algorithm.student.state_dict()[name])
    for name, tensor in whole.algorithm.teacher.state_dict().items():
        assert torch.equal(tensor, second.algorithm.teacher.state_dict()[name])
    momenta = [t.optimizer.state_dict()["state"][0]["momentum_buffer"] for t in (whole, second)]
    assert torch.equal(*momenta)
    assert whole.algorithm.seen == second.algorithm.seen == 6


def test_without_checkpoint_the_run_starts_from_its_beginning(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = build(tmp_path)
    assert resume(trainer, tmp_path, RUN) is None
    assert resume(trainer, tmp_path / "not yet there", RUN) is None
    assert trainer.start_iter == 0
    assert "training starts from its beginning" in caplog.text


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_damaged_checkpoints_are_passed_over_and_named(stopped, damaged, caplog):
    for path in list(resume_files(stopped).values())[:damaged]:
        flip(path)
    trainer = build(stopped)
    resume(trainer, stopped, RUN)
    assert trainer.start_iter == 5 - damaged
    assert caplog.text.count("SHA-256 is") == damaged
    assert f"falling back to {stopped / f'model_{4 - damaged:07d}.pth'}" in caplog.text
    trainer.train()
    assert all(damage(path) is None for path in resume_files(stopped).values())


def test_no_intact_checkpoint_is_an_error_that_lists_each(stopped):
    before = names(stopped)
    flip(stopped / "model_0000001.pth")
    os.truncate(stopped / "model_0000002.pth", 10)
    (stopped / "model_0000003.pth").write_bytes(b"")
    (stopped / "model_0000004.pth.json").unlink()
    with pytest.raises(CheckpointError) as error:
        resume(build(stopped), stopped, RUN)
    for reason in (
        r"0000001.pth is damaged: its SHA-256",
        "0000002.pth is damaged: it has 10 bytes",
        "0000003.pth is damaged: it has 0 bytes",
        "0000004.pth is damaged: its digest file",
    ):
        assert reason in str(error.value)
    assert names(stopped) == before


@pytest.mark.parametrize(
    "content",
    [None, b"", b"model_0000003.pth", b"model_0000004.pth\n", b"../model.pth", b".", b"\xff\xfe"],
)
def test_pointer_is_repaired_and_not_trusted(stopped, content, caplog):
    pointer = stopped / "last_checkpoint"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert resume(build(stopped), stopped, RUN) == stopped / "model_0000004.pth"
    assert pointer.read_text() == "model_0000004.pth"
    assert "instead of 'model_0000004.pth': repaired" in caplog.text


def test_pointer_that_is_a_folder_does_not_stop_the_run(stopped, caplog):
    (stopped / "last_checkpoint").unlink()
    (stopped / "last_checkpoint").mkdir()
    assert resume(build(stopped), stopped, RUN) == stopped / "model_0000004.pth"
    assert "last_checkpoint could not be written" in caplog.text


def test_intact_pointer_is_not_mentioned(stopped, caplog):
    resume(build(stopped), stopped, RUN)
    assert caplog.text == ""


def test_explicit_file(stopped, caplog):
    assert resume(build(stopped), stopped / "model_0000002.pth", RUN).name == "model_0000002.pth"
    (stopped / "model_0000002.pth.json").unlink()
    resume(build(stopped), stopped / "model_0000002.pth", RUN)
    assert "model_0000002.pth cannot be verified" in caplog.text
    flip(stopped / "model_0000003.pth")
    with pytest.raises(CheckpointError, match=r"0003.pth cannot be resumed: its SHA-256"):
        resume(build(stopped), stopped / "model_0000003.pth", RUN)
    with pytest.raises(CheckpointError, match=r"0009.pth cannot be resumed: it does not exist"):
        resume(build(stopped), stopped / "model_0000009.pth", RUN)


def test_going_back_drops_the_steps_after(stopped):
    trainer = build(stopped, keep=3)
    resume(trainer, stopped / "model_0000002.pth", RUN)
    trainer.register_hooks([Stop(3)])
    trainer.train()
    assert list(resume_files(stopped)) == [3, 2, 1]


def test_other_files_of_the_library_are_not_resumed(tmp_path):
    build(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"model_final.pth is not a resume file"):
        resume(build(tmp_path), tmp_path / "model_final.pth", RUN)


def test_newer_format_is_refused(stopped):
    path = stopped / "model_0000004.pth"
    checkpoint.write_checkpoint(path, load_checkpoint(path) | {"format": 2, "library": "9.0.0"})
    with pytest.raises(CheckpointError, match=r"format 2, written by version 9.0.0 \(.* format 1"):
        resume(build(stopped), stopped, RUN)


def test_state_that_does_not_fit_the_models_is_a_user_error(stopped):
    trainer = build(stopped)
    trainer.algorithm.student = nn.Linear(3, 1)
    with pytest.raises(
        CheckpointError, match=r"0000004.pth does not fit this run: .*size mismatch"
    ):
        resume(trainer, stopped, RUN)


# -------------------------------------------------------------------------- compatibility


@pytest.mark.parametrize(
    "changed", [{"seed": 2}, {"T": 9, "E": 9}, {"M": 2}, {"optimizer": "AdamW"}, {"batch": 4}]
)
def test_changed_run_is_refused_with_exactly_the_changed_keys(stopped, changed):
    trainer = build(stopped, run=RUN | changed)
    with pytest.raises(CheckpointError) as error:
        resume(trainer, stopped, RUN | changed)
    rows = str(error.value).splitlines()[2:-1]
    assert [row.split() for row in rows] == [
        [key, str(RUN.get(key, "(absent)")), str(value)] for key, value in sorted(changed.items())
    ]
    assert trainer.start_iter == 0


def test_changed_config_text_alone_is_no_other_run(stopped):
    assert resume(build(stopped), stopped, RUN | {"config": "LOG_PERIOD: 1"}) is not None


def test_override_is_recorded_in_later_checkpoints(stopped, caplog):
    run = RUN | {"seed": 2}
    trainer = build(stopped, run=run, period=1)
    resume(trainer, stopped, run, allow_inexact=True)
    assert "inexactly" in caplog.text
    trainer.train()
    # From here on the changed identity is the run's own, and the record is carried along.
    again = build(stopped, run=run)
    resume(again, stopped, run)
    assert again.hooks[0].inexact == [{"global_step": 5, "changes": [("seed", 1, 2)]}]


def test_checkpoint_beyond_the_end_is_refused(stopped):
    run = RUN | {"T": 3}
    with pytest.raises(CheckpointError, match="has done 5 global steps, the run has only 3"):
        resume(build(stopped, iterations=3, run=run), stopped, run, allow_inexact=True)


# ---------------------------------------------------------------------------- finished run


def test_finished_run_trains_nothing_and_restores_its_final_files(tmp_path, caplog):
    build(tmp_path).train()
    expected = {p.name: p.read_bytes() for p in tmp_path.glob("model_*.pth")}
    flip(tmp_path / "model_final.pth")
    (tmp_path / "model_averaged.pth").unlink()
    trainer = build(tmp_path)
    resume(trainer, tmp_path, RUN)
    trainer.train()
    assert trainer.algorithm.seen == 6
    assert {p.name: p.read_bytes() for p in tmp_path.glob("model_*.pth")} == expected
    assert "model_final.pth is written again: its SHA-256" in caplog.text
    assert "model_averaged.pth is written again: it does not exist" in caplog.text


def test_retention_that_a_kill_prevented_is_made_up_for(tmp_path):
    build(tmp_path, keep=9).train()
    assert list(resume_files(tmp_path)) == [5, 3, 1]
    trainer = build(tmp_path)
    resume(trainer, tmp_path, RUN)
    trainer.train()
    assert list(resume_files(tmp_path)) == [5, 3]


def test_averaged_file_of_another_episode_is_written_again(tmp_path):
    build(tmp_path, hooks=[Stop(1)]).train()
    old = (tmp_path / "model_averaged.pth").read_bytes()
    old_digest = (tmp_path / "model_averaged.pth.json").read_bytes()
    trainer = build(tmp_path, hooks=[Stop(3)])
    resume(trainer, tmp_path, RUN)
    trainer.train()
    # As if the run had been killed between the two files of step 3.
    (tmp_path / "model_averaged.pth").write_bytes(old)
    (tmp_path / "model_averaged.pth.json").write_bytes(old_digest)
    trainer = build(tmp_path, hooks=[Stop(4)])
    resume(trainer, tmp_path, RUN)
    trainer.train()
    assert load_checkpoint(tmp_path / "model_averaged.pth")["episode"] == 1


def test_wall_clock_adds_up_over_resumes(stopped):
    before = load_checkpoint(stopped / "model_0000004.pth")["trainer"]["hooks"]["checkpoint"]
    assert before["seconds"] > 0
    trainer = build(stopped)
    resume(trainer, stopped, RUN)
    trainer.train()
    after = load_checkpoint(stopped / "model_0000005.pth")["trainer"]["hooks"]["checkpoint"]
    assert after["seconds"] > before["seconds"]


# ------------------------------------------------------------------------ output directory


def test_used_directory_needs_resume_or_overwrite(stopped):
    with pytest.raises(CheckpointError, match=r"earlier run \(model_0000004.pth\).*--overwrite"):
        prepare_output(stopped)
    with pytest.raises(CheckpointError, match="contradict"):
        prepare_output(stopped, resume=True, overwrite=True)
    for option in ("resume", "overwrite"):
        before = names(stopped)
        with prepare_output(stopped, **{option: True}):
            assert names(stopped) == sorted([*before, "run.lock"])


def test_new_directory_is_made_and_locked(tmp_path):
    lock = prepare_output(tmp_path / "a" / "b")
    with pytest.raises(CheckpointError, match="in use by process"):
        prepare_output(tmp_path / "a" / "b")
    lock.release()
    prepare_output(tmp_path / "a" / "b").release()


def test_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not usable"):
        prepare_output(tmp_path / "file" / "folder")


def test_final_file_alone_marks_a_used_directory(tmp_path):
    build(tmp_path).train()
    for path in resume_files(tmp_path).values():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"earlier run \(model_averaged.pth\)"):
        prepare_output(tmp_path)


def test_hook_refuses_the_directory_of_a_run_it_was_not_told_of(stopped):
    before = names(stopped)
    with pytest.raises(CheckpointError, match="neither resumed nor overwritten"):
        build(stopped).train()
    assert names(stopped) == before


def test_overwriting_removes_nothing_before_the_first_step_is_done(stopped):
    class Break(HookBase):
        def after_backward(self):
            raise RuntimeError("no luck")

    before = names(stopped)
    with pytest.raises(RuntimeError, match="no luck"):
        build(stopped, overwrite=True, hooks=[Break()]).train()
    assert names(stopped) == before
    build(stopped, overwrite=True, hooks=[Stop(0)]).train()
    assert names(stopped) == []
    assert not list(stopped.iterdir())


def test_states_in_files_are_readable_by_others(stopped):
    described = json.loads((stopped / "model_0000004.pth.json").read_text())
    assert described["bytes"] == (stopped / "model_0000004.pth").stat().st_size
    state = load_checkpoint(stopped / "model_0000004.pth")
    assert state["run"] == RUN | {"library major version": 0}
    assert state["trainer"]["iteration"] == 5
    assert state["trainer"]["algorithm"] == {"seen": 5}
