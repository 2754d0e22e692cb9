"""Members at once on forked ranks, with the real trainer, against members in turn."""

import pytest
import torch
from support import needs_fork, on_ranks

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.engine.hooks import IMWAHook, LRHook
from ssod_imwa.engine.launch import distribute

T, EPISODES, MEMBERS = 7, 3, 2


def train(tiny, ranks, **model):
    """What a run ends with; its members are trained in turn or, if the ranks say so, at once."""
    at_once = ranks.members > 1
    members = 1 if at_once else MEMBERS
    schedule = EpisodeSchedule(T, episodes=EPISODES, members=members)
    method = tiny.method(**model)
    distribute(method, ranks)
    batches = tiny.batches(
        schedule, first_member=ranks.member, rank=ranks.batch.rank, world_size=ranks.batch.size
    )
    trainer = tiny.trainer(T, episodes=EPISODES, members=members, method=method, batches=batches)
    kind = ParallelIMWA if at_once else IMWA
    imwa = kind(schedule, method.models(), ranks=ranks, optimizer=trainer.optimizer)
    trainer.register_hooks([LRHook(lambda t: 1 / (1 + t)), IMWAHook(imwa)])
    trainer.train()
    return {name: tiny.copied_state(model) for name, model in method.models().items()}


def assert_all_equal(tiny, runs, expected):
    for run in runs:
        assert all(tiny.same_state(run[name], expected[name]) for name in expected)


@needs_fork
def test_two_members_at_once_equal_members_in_turn_bitwise(tiny, tmp_path):
    """With dropout and batch norm: seeds, data and statistics are each member's own."""
    runs = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(MEMBERS)), tmp_path)
    assert_all_equal(tiny, runs, train(tiny, Ranks.alone()))


@needs_fork
def test_data_parallel_members_at_once_equal_those_in_turn_bitwise(tiny, tmp_path):
    """Without batch norm, whose statistics are averaged over ranks before those of members."""
    (tmp_path / "turn").mkdir()
    in_turn = on_ranks(2, lambda rank: train(tiny, Ranks.of_run(), norm=False), tmp_path / "turn")
    at_once = on_ranks(4, lambda rank: train(tiny, Ranks.of_run(MEMBERS), norm=False), tmp_path)
    assert_all_equal(tiny, [*in_turn, *at_once], in_turn[0])


@needs_fork
def test_members_at_once_are_not_saved(tiny, tmp_path):
    """A checkpoint holds the state of one rank."""

    def save(rank):
        ranks = Ranks.of_run(MEMBERS)
        method = tiny.method()
        trainer = tiny.trainer(T, method=method, ranks=ranks)
        imwa = ParallelIMWA(trainer.schedule, method.models(), ranks)
        trainer.register_hooks([IMWAHook(imwa)])
        with pytest.raises(NotImplementedError, match="holds one of them"):
            trainer.state_dict()

    on_ranks(2, save, tmp_path)


def test_in_turn_is_the_only_order_of_imwa(tiny):
    """Ranks that say otherwise are refused."""
    with pytest.raises(ValueError, match="use ParallelIMWA"):
        IMWA(EpisodeSchedule(1), {"m": torch.nn.Linear(1, 1)}, ranks=Ranks(members=2))
