import pytest
import torch
from support import needs_fork, on_ranks

from ssod_imwa.averaging.ranks import Group, Ranks


def test_one_process_says_everything_to_itself():
    for group in (Group(), Ranks.alone().run, Ranks.of_run().batch):
        assert (group.rank, group.size, group.is_main) == (0, 1, True)
        assert group.all_true(torch.tensor(True)) is True
        assert group.all_true(False) is False
        assert (group.any_true(True), group.any_true(torch.tensor(False))) == (True, False)
        assert group.all_gather({"a": 1}) == [{"a": 1}]
        rows = torch.ones(2, 3, requires_grad=True)
        assert group.gather_rows(rows) is rows
        assert group.mean(number := torch.tensor(3.0)) is number
        group.barrier()
        group.assert_equal(3, "three")
        group.raise_together(None)
        with pytest.raises(OSError, match="full"):
            group.raise_together(OSError("full"))
    assert (Ranks.alone().member, Ranks.alone().members) == (0, 1)


def test_impossible_places_are_refused():
    with pytest.raises(ValueError, match=r"rank = 2 is not allowed \(must be in 0..1\)"):
        Group(2, 2)
    for members in (0, 2):
        with pytest.raises(ValueError, match=f"members = {members} on 1 ranks is not allowed"):
            Ranks.of_run(members)


def talk(rank):
    group = Ranks.of_run().run
    flag = torch.tensor(rank == 0)
    messages = []
    for complain in (
        lambda: group.assert_equal(rank, "rank"),
        lambda: group.raise_together(OSError("full") if rank else None),
    ):
        try:
            complain()
        except (RuntimeError, OSError) as error:
            messages.append(str(error))
    return {
        "place": [group.rank, group.size, group.is_main],
        "all": [group.all_true(flag), group.all_true(True), group.any_true(flag)],
        "flag stays": bool(flag) == (rank == 0),
        "gathered": group.all_gather(rank * 10),
        "rows": group.gather_rows(torch.full((2,), float(rank))).tolist(),
        "messages": messages,
        "mean": float(group.mean(number := torch.tensor(10.0 * rank))),
        "number stays": float(number) == 10 * rank,
    }


@needs_fork
def test_two_processes_agree(tmp_path):
    results = on_ranks(2, talk, tmp_path)
    assert [result.pop("place") for result in results] == [[0, 2, True], [1, 2, False]]
    unequal = "rank must be equal on all ranks, but is not (rank 0: 0, rank 1: 1)"
    failures = ["rank 1 failed, so that no rank goes on: OSError: full", "full"]
    for result, failure in zip(results, failures, strict=True):
        assert result == {
            "all": [False, True, True],
            "flag stays": True,
            "gathered": [0, 10],
            "rows": [0, 0, 1, 1],
            "messages": [unequal, failure],
            "mean": 5,
            "number stays": True,
        }


def places(members):
    def ask(rank):
        ranks = Ranks.of_run(members)
        return {
            "member": [ranks.member, ranks.members],
            "run": ranks.run.all_gather(rank),
            "batch": ranks.batch.all_gather(rank),
            "exchange": ranks.exchange.all_gather(rank),
            "rank": [ranks.batch.rank, ranks.exchange.rank],
        }

    return ask


@needs_fork
def test_members_in_turn_share_every_batch(tmp_path):
    for rank, place in enumerate(on_ranks(2, places(1), tmp_path)):
        assert place == {
            "member": [0, 1],
            "run": [0, 1],
            "batch": [0, 1],
            "exchange": [rank],
            "rank": [rank, 0],
        }


@needs_fork
@pytest.mark.parametrize("size", [1, 2])
def test_members_at_once_have_ranks_of_their_own(tmp_path, size):
    """Of two members, each has half of the ranks, and every rank a counterpart in the other."""
    for rank, place in enumerate(on_ranks(2 * size, places(2), tmp_path)):
        member, number = divmod(rank, size)
        assert place == {
            "member": [member, 2],
            "run": list(range(2 * size)),
            "batch": [member * size + i for i in range(size)],
            "exchange": [number, size + number],
            "rank": [number, member],
        }
