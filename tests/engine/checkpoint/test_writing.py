"""What CheckpointHook writes around the real trainer, and what it keeps."""

import json
import math

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.engine.checkpoint import faults, output
from ssod_imwa.engine.checkpoint import writing as checkpoint
from ssod_imwa.engine.checkpoint.atomic import WriteError, damage, load_checkpoint, write_checkpoint
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.engine.checkpoint.output import resume_files
from ssod_imwa.engine.checkpoint.writing import CheckpointHook
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import CheckpointError, NonFiniteError


def test_writes_at_episode_ends_and_keeps_one_older(line, tmp_path):
    line.build(tmp_path).train()
    assert line.names(tmp_path) == [
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
def test_period_and_keep(line, tmp_path, period, keep, expected):
    line.build(tmp_path, period=period, keep=keep).train()
    assert list(resume_files(tmp_path)) == expected
    # What was removed took its digest along.
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.pth")))


@pytest.mark.parametrize(("episodes", "expected"), [(2, [5, 3]), (3, [5]), (4, [5])])
def test_episodes_between_checkpoints(line, tmp_path, episodes, expected):
    # Three episodes of two steps; the last step always has one.
    line.build(tmp_path, episodes=episodes, keep=9).train()
    assert list(resume_files(tmp_path)) == expected


def test_save_now_writes_once_per_step(line, tmp_path, monkeypatch):
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

    line.build(tmp_path, hooks=[Ask()], iterations=3).train()
    assert [name for name in written if name[6].isdigit()] == [
        f"model_{g:07d}.pth" for g in range(3)
    ]


def test_model_files_hold_plain_models_by_name(line, tmp_path):
    trainer = line.build(tmp_path)
    trainer.train()
    final = load_checkpoint(tmp_path / "model_final.pth")
    averaged = load_checkpoint(tmp_path / "model_averaged.pth")
    assert final.pop("final") is True
    assert set(final) == set(averaged)
    assert (final["episode"], final["global_step"], final["config"]) == (2, 5, line.RUN["config"])
    assert final["inference_model"] == "teacher"
    for name in ("student", "teacher"):
        model = nn.Linear(2, 1)
        model.load_state_dict(final[name])
        assert torch.equal(model.weight, trainer.method.models()[name].weight)
    assert not torch.equal(final["student"]["weight"], final["teacher"]["weight"])


def test_value_that_a_file_cannot_hold_is_named(line, tmp_path):
    trainer = line.build(tmp_path)
    trainer.method.state_dict = lambda: {"queue": [object()]}
    with pytest.raises(TypeError, match=r"trainer\['method'\]\['queue'\]\[0\] is a builtins.obj"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": -1}, "period = -1 is not allowed"),
        ({"keep": -1}, "keep = -1 is not allowed"),
    ],
)
def test_arguments_are_checked(line, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointHook(tmp_path, run=line.RUN, **options)


# ------------------------------------------------------------------------------------ failed writes


def test_failed_write_is_tried_again_after_the_next_step(line, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(faults.VARIABLE, "write:fsync=fail")
    line.build(tmp_path, hooks=[line.Stop(2)]).train()
    assert list(resume_files(tmp_path)) == [2]
    assert "model_0000001.pth could not be written" in caplog.text
    assert "no space left" in caplog.text


@pytest.mark.parametrize("period", [0, 1])
def test_three_failures_in_a_row_end_training(line, tmp_path, monkeypatch, period):
    # The pointer cannot be written, so every attempt fails at its end.
    def fail(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(output, "write_text", fail)
    trainer = line.build(tmp_path, period=period)
    with pytest.raises(WriteError, match="last_checkpoint could not be written"):
        trainer.train()
    assert trainer.iter == {0: 3, 1: 2}[period]


def test_last_step_is_tried_three_times_at_once(line, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(faults.VARIABLE, "pointer:open=fail@3")
    line.build(tmp_path).train()
    assert list(resume_files(tmp_path)) == [5, 3]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert caplog.text.count("trying again") == 1


# ------------------------------------------------------------------------------------- earlier runs


def test_hook_refuses_the_directory_of_a_run_it_was_not_told_of(line, stopped):
    before = line.names(stopped)
    with pytest.raises(CheckpointError, match="neither resumed nor overwritten"):
        line.build(stopped).train()
    assert line.names(stopped) == before


def test_overwriting_removes_nothing_before_the_first_step_is_done(line, stopped):
    class Break(HookBase):
        def after_backward(self):
            raise RuntimeError("no luck")

    before = line.names(stopped)
    with pytest.raises(RuntimeError, match="no luck"):
        line.build(stopped, overwrite=True, hooks=[Break()]).train()
    assert line.names(stopped) == before
    line.build(stopped, overwrite=True, hooks=[line.Stop(0)]).train()
    assert line.names(stopped) == []
    assert not list(stopped.iterdir())


def test_states_in_files_are_readable_by_others(line, stopped):
    described = json.loads((stopped / "model_0000004.pth.json").read_text())
    assert described["bytes"] == (stopped / "model_0000004.pth").stat().st_size
    state = load_checkpoint(stopped / "model_0000004.pth")
    assert state["run"] == line.RUN | {"library major version": 0}
    assert state["trainer"]["iteration"] == 5
    assert state["trainer"]["method"] == {"seen": 5}


def test_models_of_another_format_are_refused(line, tmp_path):
    line.build(tmp_path).train()
    path = tmp_path / "model_final.pth"
    write_checkpoint(path, load_checkpoint(path) | {"format": 1})
    with pytest.raises(CheckpointError, match="has format 1, written by version"):
        read_models(path)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        # In eval mode, or with a running variance that only tests read, the loss stays finite.
        (lambda t: t.method.norm.running_var.fill_(math.inf), "student.norm.running_var"),
        (lambda t: t.method.models()["teacher"].bias.data.fill_(math.nan), "teacher.bias"),
        (
            lambda t: next(iter(t.optimizer.state.values()))["momentum_buffer"].fill_(math.inf),
            "the optimizer's momentum_buffer of student.weight",
        ),
    ],
)
@pytest.mark.parametrize(
    ("step", "drops_members"),
    [(2, False), (3, True)],  # at a member's end, what diverged has been dropped already
)
def test_a_state_that_is_not_finite_is_not_written_and_evicts_nothing(
    line, tmp_path, spoil, name, step, drops_members
):
    class Spoil(HookBase):
        def after_step(self):
            if self.trainer.iter == step:
                spoil(self.trainer)

    trainer = line.build(tmp_path, period=1, keep=1)
    trainer.drops_members, trainer.schedule = drops_members, EpisodeSchedule(2, members=3)
    trainer.method.norm = nn.BatchNorm1d(1)
    trainer.method.student.add_module("norm", trainer.method.norm)
    trainer.method.models()["teacher"].add_module("norm", nn.BatchNorm1d(1))
    trainer.register_hooks([Spoil()])
    trainer.hooks.reverse()  # spoil, then write
    message = f"^{name} is not finite after global step {step + 1}, .*0{step - 1}.pth"
    with pytest.raises(CheckpointError, match=message):
        trainer.train()
    assert list(resume_files(tmp_path)) == [step - 1, step - 2]


def test_nothing_is_written_between_divergence_and_where_members_at_once_talk(line, tmp_path):
    trainer = line.build(tmp_path, period=1, keep=9)
    good = trainer.method.losses
    trainer.method.losses = lambda batch, t: {
        name: loss * (math.nan if t == 2 else 1) for name, loss in good(batch, t).items()
    }
    trainer.ranks = Ranks(members=2)
    with pytest.raises(NonFiniteError, match="global step 3 "):
        trainer.train()
    assert list(resume_files(tmp_path)) == [1, 0]


def test_a_constant_that_is_infinite_from_the_beginning_is_written(line, tmp_path):
    trainer = line.build(tmp_path)
    trainer.method.student.register_buffer("mask", torch.tensor([-math.inf]))
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()


def test_who_trains_in_common_is_never_dropped(line, tmp_path):
    class Spoil(HookBase):
        def after_step(self):
            self.trainer.method.student.norm.running_var.fill_(math.inf)

    trainer = line.build(tmp_path, period=1)
    trainer.drops_members, trainer.schedule = True, EpisodeSchedule(3, members=2, start=2)
    trainer.method.student.add_module("norm", nn.BatchNorm1d(1))
    trainer.register_hooks([Spoil()])
    trainer.hooks.reverse()
    with pytest.raises(CheckpointError, match="running_var is not finite after global step 1"):
        trainer.train()


def test_a_member_that_will_be_dropped_is_not_written_and_the_run_goes_on(line, tmp_path, caplog):
    class Spoil(HookBase):
        """A member that diverges, and at its end weights that are finite again."""

        def after_step(self):
            if self.trainer.iter in (2, 3):
                value = math.inf if self.trainer.iter == 2 else 1.0
                self.trainer.method.student.norm.running_var.fill_(value)

    trainer = line.build(tmp_path, period=1, keep=9)
    trainer.drops_members, trainer.schedule = True, EpisodeSchedule(2, members=3)
    trainer.method.student.add_module("norm", nn.BatchNorm1d(1))
    trainer.register_hooks([Spoil()])
    trainer.hooks.reverse()
    trainer.train()
    assert list(resume_files(tmp_path)) == [5, 4, 3, 1, 0]
    assert "no checkpoint after global step 3: student.norm.running_var is not" in caplog.text


def test_a_member_that_was_dropped_is_written_as_such(line, tmp_path):
    class Reseed(HookBase):
        """What IMWA does at a member's end."""

        def after_step(self):
            if self.trainer.position.ends_member:
                for parameter in self.trainer.parameters:
                    nn.init.ones_(parameter)

    trainer = line.build(tmp_path, period=1, keep=9)
    trainer.drops_members, trainer.schedule = True, EpisodeSchedule(3, members=2)
    trainer.register_hooks([Reseed(), line.Stop(4)])
    trainer.hooks.reverse()
    trainer.method.losses = lambda batch, t: {"loss": trainer.parameters[0].sum() * math.nan}
    trainer.train()
    assert list(resume_files(tmp_path)) == [4, 3, 2, 1, 0]
    states = [load_checkpoint(path)["trainer"] for path in resume_files(tmp_path).values()]
    turns = ["member 2/2", "member 2/2", "", "member 1/2", "member 1/2"]  # over after 3 steps
    assert all(turn in state["dropped"] for state, turn in zip(states, turns, strict=True))
    assert states[2]["dropped"] == ""
