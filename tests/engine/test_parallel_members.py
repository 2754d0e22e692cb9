"""Members at once on forked ranks, with the real trainer, against members in turn."""

import os
import signal

import pytest
import torch
from support import needs_fork, on_ranks

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.exchange import gather_nested
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.outer import Outer
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.engine import trainer as loop
from ssod_imwa.engine.hooks import IMWAHook, LRHook
from ssod_imwa.engine.launch import distribute
from ssod_imwa.engine.signals import SignalHook, StopSignals
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import NonFiniteError

T, EPISODES, MEMBERS = 7, 3, 2


class Spoil(HookBase):
    """Makes the weights of member 1 infinite at the end of an episode."""

    def __init__(self, episode):
        self.episode = episode

    def after_step(self):
        position = self.trainer.position
        if position.ends_member and (position.episode, position.member) == (self.episode, 1):
            torch.nn.init.constant_(self.trainer.method.student[0].weight, float("inf"))


def train(tiny, ranks, *, start=0, spoil=None, bad_loss=None, imwa_options=None, **model):
    """What a run ends with; its members are trained in turn or, if the ranks say so, at once."""
    at_once = ranks.members > 1
    schedule = EpisodeSchedule(
        T,
        episodes=EPISODES,
        members=MEMBERS,
        start=start,
        only=ranks.member if at_once else None,
    )
    method = tiny.method(**model)
    distribute(method, ranks)
    batches = tiny.batches(schedule, rank=ranks.batch.rank, world_size=ranks.batch.size)
    trainer = tiny.trainer(T, schedule=schedule, method=method, batches=batches)
    if bad_loss is not None:
        trainer.drops_members, good = True, method.losses
        method.losses = lambda batch, t: {
            name: loss * (float("nan") if is_bad(trainer, bad_loss) else 1.0)
            for name, loss in good(batch, t).items()
        }
    kind = ParallelIMWA if at_once else IMWA
    options = {"ranks": ranks, "optimizer": trainer.optimizer, **(imwa_options or {})}
    imwa = kind(schedule, method.models(), **options)
    hooks = [LRHook(lambda t: 1 / (1 + t)), IMWAHook(imwa)]
    trainer.register_hooks([*([] if spoil is None else [Spoil(spoil)]), *hooks])
    trainer.train()
    distances = {k: v.latest() for k, v in trainer.storage.histories().items() if "distance" in k}
    return {name: tiny.copied_state(model) for name, model in method.models().items()}, distances


def is_bad(trainer, episode):
    """Whether this is the first step of member 1 in an episode, on one of its ranks."""
    position, (first, _) = trainer.position, trainer.schedule.bounds(episode)
    place = (position.episode, position.member, position.t)
    return place == (episode, 1, first) and trainer.ranks.batch.is_main


def assert_all_equal(tiny, runs, expected):
    for models, _ in runs:
        assert all(tiny.same_state(models[name], expected[0][name]) for name in expected[0])
    assert expected[1]
    assert runs[-1][1] == expected[1]  # distances of the last member


@needs_fork
@pytest.mark.parametrize("start", [0, 3])
def test_two_members_at_once_equal_members_in_turn_bitwise(tiny, tmp_path, start):
    """With dropout and batch norm: seeds, data and statistics are each member's own."""
    runs = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(MEMBERS), start=start), tmp_path)
    assert_all_equal(tiny, runs, train(tiny, Ranks.alone(), start=start))


@needs_fork
def test_data_parallel_members_at_once_equal_those_in_turn_bitwise(tiny, tmp_path):
    """With batch norm, too, whose statistics are averaged over members and then over ranks."""
    (tmp_path / "turn").mkdir()
    in_turn = on_ranks(2, lambda rank: train(tiny, Ranks.of_run()), tmp_path / "turn")
    at_once = on_ranks(4, lambda rank: train(tiny, Ranks.of_run(MEMBERS)), tmp_path)
    assert_all_equal(tiny, [*in_turn, *at_once], in_turn[0])


@needs_fork
@pytest.mark.parametrize("start", [0, 3])
def test_an_outer_step_is_the_same_at_once(tiny, tmp_path, start):
    options = {
        "start": start,
        "imwa_options": {"outer": Outer(lr=0.7, momentum=0.9, nesterov=True)},
    }
    runs = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(MEMBERS), **options), tmp_path)
    assert_all_equal(tiny, runs, train(tiny, Ranks.alone(), **options))


@needs_fork
def test_a_member_that_diverges_is_dropped_as_in_turn(tiny, tmp_path):
    options = {"spoil": 1, "imwa_options": {"nonfinite": "drop"}}
    runs = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(MEMBERS), **options), tmp_path)
    assert_all_equal(tiny, runs, train(tiny, Ranks.alone(), **options))


@needs_fork
@pytest.mark.parametrize("episode", [0, 1, 2])
@pytest.mark.parametrize("optimizer_state", ["keep", "average", "reset"])
def test_a_member_with_a_bad_loss_is_dropped_as_one_that_ends_spoiled(
    tiny, tmp_path, episode, optimizer_state
):
    """In its first step, when its optimizer has no momenta yet."""
    imwa_options = {"nonfinite": "drop", "optimizer_state": optimizer_state}
    options = {"bad_loss": episode, "imwa_options": imwa_options}
    expected = train(tiny, Ranks.alone(), spoil=episode, imwa_options=imwa_options)
    in_turn = train(tiny, Ranks.alone(), **options)
    at_once = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(MEMBERS), **options), tmp_path)
    assert_all_equal(tiny, [in_turn, *at_once], expected)


@needs_fork
def test_all_ranks_of_a_member_drop_it_for_the_loss_of_one(tiny, tmp_path):
    options = {"bad_loss": 1, "imwa_options": {"nonfinite": "drop"}}
    (tmp_path / "turn").mkdir()
    in_turn = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(), **options), tmp_path / "turn")
    at_once = on_ranks(4, lambda rank: train(tiny, Ranks.of_run(MEMBERS), **options), tmp_path)
    assert_all_equal(tiny, [*in_turn, *at_once], in_turn[0])


@needs_fork
@pytest.mark.parametrize("chosen", [0, 1])
def test_a_rule_weighs_members_at_once_as_in_turn(tiny, tmp_path, chosen):
    def rule(states):
        largest = [float(state["student.0.weight"].abs().max()) for state in states]
        order = sorted(range(len(states)), key=largest.__getitem__)
        return [float(member == order[chosen]) for member in range(len(states))]

    options = {"imwa_options": {"coefficients": rule}}
    runs = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(MEMBERS), **options), tmp_path)
    assert_all_equal(tiny, runs, train(tiny, Ranks.alone(), **options))


@pytest.fixture
def talk_every_four(monkeypatch):
    monkeypatch.setattr(loop, "TALK_STEPS", 4)
    monkeypatch.setattr(loop, "TALK_SECONDS", 1000.0)


def at_once(tiny, iterations, member, **options):
    """A trainer of this rank's of two members, `member` of which has a bad loss at t = 2 alone."""
    ranks = Ranks.of_run(MEMBERS)
    method = tiny.method()
    good = method.losses

    def losses(batch, t):
        bad = ranks.member == member and t == 2 and ranks.batch.is_main
        return {"loss_cls": good(batch, t)["loss_cls"] * (float("nan") if bad else 1.0)}

    method.losses = losses
    schedule = EpisodeSchedule(iterations, members=MEMBERS, only=ranks.member)
    return tiny.trainer(iterations, schedule=schedule, method=method, ranks=ranks, **options)


@needs_fork
@pytest.mark.usefixtures("talk_every_four")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(("iterations", "last"), [(20, 4), (4, 3), (3, 2)])
def test_members_end_where_they_talk_and_name_the_one_that_diverged(
    tiny, tmp_path, processes, iterations, last
):
    """Four steps after the last time or at their end; until then the bad one learns nothing."""

    def fail(rank):
        trainer, begun = at_once(tiny, iterations, member=1), []

        class Remember(HookBase):
            def before_step(self):
                begun.append([p.detach().clone() for p in self.trainer.parameters])

        trainer.register_hooks([Remember()])
        with pytest.raises(NonFiniteError, match=r"member 2/2, iteration 3/\d+\): .*nan"):
            trainer.train()
        pairs = zip(begun[2], trainer.parameters, strict=True)
        return trainer.iter, all(torch.equal(before, after) for before, after in pairs)

    of_good, of_bad = [(last, False)], [(last, True)]
    each = processes // MEMBERS
    assert on_ranks(processes, fail, tmp_path) == each * of_good + each * of_bad


@needs_fork
@pytest.mark.usefixtures("talk_every_four")
def test_a_loss_scale_that_vanishes_is_told_where_members_talk(tiny, tmp_path):
    class Poison(HookBase):
        def after_backward(self):
            if self.trainer.ranks.member == 1:
                self.trainer.parameters[1].grad[0] = float("inf")

    def fail(rank):
        trainer = at_once(tiny, 30, member=None, amp_dtype=torch.float16)
        trainer.register_hooks([Poison()])
        with pytest.raises(NonFiniteError, match=r"every loss scale .* member 2/2, iteration 17/"):
            trainer.train()
        return trainer.iter

    assert on_ranks(2, fail, tmp_path) == [16, 16]


@needs_fork
@pytest.mark.usefixtures("talk_every_four")
def test_a_bad_loss_is_the_reason_also_with_a_loss_scale(tiny, tmp_path):
    """What follows until members talk does not make the scale vanish."""

    def fail(rank):
        trainer = at_once(tiny, 30, member=1, amp_dtype=torch.float16)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        with pytest.raises(NonFiniteError, match=r"not finite .* iteration 3/\d+\): .*nan"):
            trainer.train()
        return trainer.iter

    assert on_ranks(2, fail, tmp_path) == [4, 4]


@needs_fork
@pytest.mark.parametrize(("seconds", "last"), [(100.0, 4), (0.0, 1)])
def test_members_hear_of_a_signal_where_they_talk(tiny, tmp_path, monkeypatch, seconds, last):
    """Where steps take longer than it may last, after each of them."""
    monkeypatch.setattr(loop, "TALK_STEPS", 4)
    monkeypatch.setattr(loop, "TALK_SECONDS", seconds)

    class Signaled(HookBase):
        def after_backward(self):
            if self.trainer.iter == 1 and self.trainer.ranks.run.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def stop(rank):
        trainer, saved = at_once(tiny, 9, member=None), []
        with StopSignals() as signals:
            hook = SignalHook(signals, lambda: saved.append(trainer.iter))
            trainer.register_hooks([Signaled(), hook])
            trainer.train()
        return trainer.iter, saved, hook.exit_code

    assert on_ranks(2, stop, tmp_path) == [(last + 1, [last], 143)] * 2


def test_in_turn_is_the_only_order_of_imwa(tiny):
    """Ranks that say otherwise are refused."""
    with pytest.raises(ValueError, match="use ParallelIMWA"):
        IMWA(EpisodeSchedule(1), {"m": torch.nn.Linear(1, 1)}, ranks=Ranks(members=2))


@needs_fork
@pytest.mark.parametrize("chunk_bytes", [100, 1 << 20])
def test_nested_states_come_whole_to_the_first_rank(tmp_path, chunk_bytes):
    def gather(rank):
        state = {"values": [torch.full((3,), float(rank)), (rank, "text")], "none": None}
        return gather_nested(state, Ranks.of_run().run, chunk_bytes=chunk_bytes)

    first, *others = on_ranks(3, gather, tmp_path)
    assert others == [[], []]
    assert [x["values"][0].tolist() for x in first] == [[r] * 3 for r in range(3)]
    assert [x["values"][1] for x in first] == [(r, "text") for r in range(3)]
