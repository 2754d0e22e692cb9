"""Resuming with the real trainer: from what, how exactly, and when it is refused."""

import os

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint, write_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import FORMAT
from ssod_imwa.engine.checkpoint.output import resume_files
from ssod_imwa.engine.checkpoint.resuming import resume
from ssod_imwa.errors import CheckpointError


def test_resumed_run_ends_with_the_same_bits(line, tmp_path, stopped):
    whole = line.build(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.train()
    second = line.build(stopped, period=1)
    assert resume(second, stopped, line.RUN) == stopped / "model_0000004.pth"
    assert second.start_iter == 5
    second.train()
    for name, tensor in whole.method.student.state_dict().items():
        assert torch.equal(tensor, second.method.student.state_dict()[name])
    for name, tensor in whole.method.models()["teacher"].state_dict().items():
        assert torch.equal(tensor, second.method.models()["teacher"].state_dict()[name])
    momenta = [t.optimizer.state_dict()["state"][0]["momentum_buffer"] for t in (whole, second)]
    assert torch.equal(*momenta)
    assert whole.method.seen == second.method.seen == 6


def test_without_checkpoint_nothing_is_changed(line, tmp_path):
    trainer = line.build(tmp_path)
    assert resume(trainer, tmp_path, line.RUN) is None
    assert resume(trainer, tmp_path / "not yet there", line.RUN) is None
    assert trainer.start_iter == 0


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_damaged_checkpoints_are_passed_over_and_named(line, stopped, damaged, caplog):
    for path in list(resume_files(stopped).values())[:damaged]:
        line.flip(path)
    trainer = line.build(stopped)
    resume(trainer, stopped, line.RUN)
    assert trainer.start_iter == 5 - damaged
    assert caplog.text.count("SHA-256 is") == damaged
    assert f"falling back to {stopped / f'model_{4 - damaged:07d}.pth'}" in caplog.text
    trainer.train()
    assert all(damage(path) is None for path in resume_files(stopped).values())


def test_no_intact_checkpoint_is_an_error_that_lists_each(line, stopped):
    before = line.names(stopped)
    line.flip(stopped / "model_0000001.pth")
    os.truncate(stopped / "model_0000002.pth", 10)
    (stopped / "model_0000003.pth").write_bytes(b"")
    (stopped / "model_0000004.pth.json").unlink()
    with pytest.raises(CheckpointError) as error:
        resume(line.build(stopped), stopped, line.RUN)
    for reason in (
        r"0000001.pth is damaged: its SHA-256",
        "0000002.pth is damaged: it has 10 bytes",
        "0000003.pth is damaged: it has 0 bytes",
        "0000004.pth is damaged: its digest file",
    ):
        assert reason in str(error.value)
    assert line.names(stopped) == before


@pytest.mark.parametrize(
    "content",
    [None, b"", b"model_0000003.pth", b"model_0000004.pth\n", b"../model.pth", b".", b"\xff\xfe"],
)
def test_pointer_is_repaired_and_not_trusted(line, stopped, content, caplog):
    pointer = stopped / "last_checkpoint"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert resume(line.build(stopped), stopped, line.RUN) == stopped / "model_0000004.pth"
    assert pointer.read_text() == "model_0000004.pth"
    assert "instead of 'model_0000004.pth': repaired" in caplog.text


def test_a_folder_in_the_pointers_place_moves_aside(line, stopped, caplog):
    (stopped / "last_checkpoint").unlink()
    (stopped / "last_checkpoint").mkdir()
    (stopped / "last_checkpoint" / "notes.txt").write_text("mine")
    assert resume(line.build(stopped), stopped, line.RUN) == stopped / "model_0000004.pth"
    assert (stopped / "last_checkpoint").read_text() == "model_0000004.pth"
    assert (stopped / "last_checkpoint.folder" / "notes.txt").read_text() == "mine"
    assert "is a folder: moved to last_checkpoint.folder" in caplog.text


def test_intact_pointer_is_not_mentioned(line, stopped, caplog):
    resume(line.build(stopped), stopped, line.RUN)
    assert caplog.text == ""


def test_explicit_file(line, stopped, caplog):
    assert (
        resume(line.build(stopped), stopped / "model_0000002.pth", line.RUN).name
        == "model_0000002.pth"
    )
    (stopped / "model_0000002.pth.json").unlink()
    resume(line.build(stopped), stopped / "model_0000002.pth", line.RUN)
    assert "model_0000002.pth cannot be verified" in caplog.text
    line.flip(stopped / "model_0000003.pth")
    with pytest.raises(CheckpointError, match=r"0003.pth cannot be resumed: its SHA-256"):
        resume(line.build(stopped), stopped / "model_0000003.pth", line.RUN)
    with pytest.raises(CheckpointError, match=r"0009.pth cannot be resumed: it does not exist"):
        resume(line.build(stopped), stopped / "model_0000009.pth", line.RUN)


def test_going_back_drops_the_steps_after(line, stopped):
    trainer = line.build(stopped, keep=3)
    resume(trainer, stopped / "model_0000002.pth", line.RUN)
    trainer.register_hooks([line.Stop(3)])
    trainer.train()
    assert list(resume_files(stopped)) == [3, 2, 1]


def test_other_files_of_the_library_are_not_resumed(line, tmp_path):
    line.build(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"model_final.pth is not a resume file"):
        resume(line.build(tmp_path), tmp_path / "model_final.pth", line.RUN)


@pytest.mark.parametrize("layout", [1, FORMAT + 1])
def test_another_format_is_refused(line, stopped, layout):
    path = stopped / "model_0000004.pth"
    write_checkpoint(path, load_checkpoint(path) | {"format": layout, "library": "9.0.0"})
    with pytest.raises(
        CheckpointError, match=rf"format {layout}, written by version 9.0.0, and format {FORMAT} is"
    ):
        resume(line.build(stopped), stopped, line.RUN)


def test_state_that_does_not_fit_the_models_is_a_user_error(line, stopped):
    trainer = line.build(stopped)
    trainer.method.student = nn.Linear(3, 1)
    with pytest.raises(
        CheckpointError, match=r"0000004.pth does not fit this run: .*size mismatch"
    ):
        resume(trainer, stopped, line.RUN)


# ------------------------------------------------------------------------------------ compatibility


@pytest.mark.parametrize(
    "changed", [{"seed": 2}, {"T": 9, "E": 9}, {"M": 2}, {"optimizer": "AdamW"}, {"batch": 4}]
)
def test_changed_run_is_refused_with_exactly_the_changed_keys(line, stopped, changed):
    trainer = line.build(stopped, run=line.RUN | changed)
    with pytest.raises(CheckpointError) as error:
        resume(trainer, stopped, line.RUN | changed)
    expected = ", ".join(
        f"{key} (saved {line.RUN.get(key, '(absent)')}, now {value})"
        for key, value in sorted(changed.items())
    )
    assert f"belongs to a run that differs in {expected}; undo these changes" in str(error.value)
    assert trainer.start_iter == 0


def test_changed_config_text_alone_is_no_other_run(line, stopped):
    assert resume(line.build(stopped), stopped, line.RUN | {"config": "LOG_PERIOD: 1"}) is not None


def test_override_is_recorded_in_later_checkpoints(line, stopped, caplog):
    run = line.RUN | {"seed": 2}
    trainer = line.build(stopped, run=run, period=1)
    resume(trainer, stopped, run, allow_inexact=True)
    assert "inexactly" in caplog.text
    trainer.train()
    # From here on the changed identity is the run's own, and the record is carried along.
    again = line.build(stopped, run=run)
    resume(again, stopped, run)
    assert again.hooks[0].inexact == [{"global_step": 5, "changes": [("seed", 1, 2)]}]


def test_checkpoint_beyond_the_end_is_refused(line, stopped):
    run = line.RUN | {"T": 3}
    with pytest.raises(CheckpointError, match="has done 5 global steps, the run has only 3"):
        resume(line.build(stopped, iterations=3, run=run), stopped, run, allow_inexact=True)


# ------------------------------------------------------------------------------------ finished runs


def test_finished_run_trains_nothing_and_restores_its_final_files(line, tmp_path, caplog):
    line.build(tmp_path).train()
    expected = {p.name: p.read_bytes() for p in tmp_path.glob("model_*.pth")}
    line.flip(tmp_path / "model_final.pth")
    (tmp_path / "model_averaged.pth").unlink()
    trainer = line.build(tmp_path)
    resume(trainer, tmp_path, line.RUN)
    trainer.train()
    assert trainer.method.seen == 6
    assert {p.name: p.read_bytes() for p in tmp_path.glob("model_*.pth")} == expected
    assert "model_final.pth is written again: its SHA-256" in caplog.text
    assert "model_averaged.pth is written again: it does not exist" in caplog.text


def test_retention_that_a_kill_prevented_is_made_up_for(line, tmp_path):
    line.build(tmp_path, keep=9).train()
    assert list(resume_files(tmp_path)) == [5, 3, 1]
    trainer = line.build(tmp_path)
    resume(trainer, tmp_path, line.RUN)
    trainer.train()
    assert list(resume_files(tmp_path)) == [5, 3]


def test_averaged_file_of_another_episode_is_written_again(line, tmp_path):
    line.build(tmp_path, hooks=[line.Stop(1)]).train()
    old = (tmp_path / "model_averaged.pth").read_bytes()
    old_digest = (tmp_path / "model_averaged.pth.json").read_bytes()
    trainer = line.build(tmp_path, hooks=[line.Stop(3)])
    resume(trainer, tmp_path, line.RUN)
    trainer.train()
    # As if the run had been killed between the two files of step 3.
    (tmp_path / "model_averaged.pth").write_bytes(old)
    (tmp_path / "model_averaged.pth.json").write_bytes(old_digest)
    trainer = line.build(tmp_path, hooks=[line.Stop(4)])
    resume(trainer, tmp_path, line.RUN)
    trainer.train()
    assert load_checkpoint(tmp_path / "model_averaged.pth")["episode"] == 1


def test_wall_clock_adds_up_over_resumes(line, stopped):
    before = load_checkpoint(stopped / "model_0000004.pth")["trainer"]["hooks"]["checkpoint"]
    assert before["seconds"] > 0
    trainer = line.build(stopped)
    resume(trainer, stopped, line.RUN)
    trainer.train()
    after = load_checkpoint(stopped / "model_0000005.pth")["trainer"]["hooks"]["checkpoint"]
    assert after["seconds"] > before["seconds"]


@pytest.mark.parametrize(
    ("ranks", "stop", "frozen", "said"),
    [(2, 2, False, True), (1, 2, False, False), (2, 3, False, False), (2, 2, True, False)],
)
def test_trained_batch_norms_of_several_ranks_are_said_to_be_inexact_inside_an_episode(
    line, tmp_path, caplog, monkeypatch, ranks, stop, frozen, said
):
    def build(*hooks):
        trainer = line.build(tmp_path, period=1, hooks=hooks)
        trainer.method.student.add_module("norm", nn.BatchNorm1d(1))
        if frozen:
            trainer.method.set_train_mode = trainer.method.student.eval
        return trainer

    build(line.Stop(stop)).train()
    trainer = build()
    trainer.ranks = Ranks(batch=Group(0, ranks))
    monkeypatch.setattr(Group, "assert_equal", lambda *_: None)  # the second rank is not there
    resume(trainer, tmp_path, line.RUN)
    messages = [m for m in caplog.messages if "not exact" in m]
    assert ["each of 2 ranks" in m and "such as norm" in m for m in messages] == [True] * said
