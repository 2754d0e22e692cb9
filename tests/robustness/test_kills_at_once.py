"""Members at once on two processes: whatever is killed, the run ends with the same bits."""

import random
import signal
import time

import pytest
import torch

from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint
from ssod_imwa.engine.checkpoint.output import resume_files

ITERATIONS = 12
AT_ONCE = {"processes": 2, "at_once": 2}
KILLED = -signal.SIGKILL
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Folder of a run at once that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert server.run(folder, **AT_ONCE) == [0, 0], server.log
    return folder


@pytest.fixture(scope="module")
def assert_same(whole, undisturbed, states):
    """Checks that a finished run has the bits of `whole` and those of members in turn."""
    expected = final_states(whole)
    in_turn = averages(undisturbed)

    def check(folder):
        states(final_states(folder), expected, "states")
        states(averages(folder), in_turn, "models")
        assert not list(folder.glob("*.tmp.*"))
        assert all(damage(path) is None for path in folder.glob("*.pth"))
        assert len(resume_files(folder)) <= 2

    return check


@pytest.fixture(scope="module")
def states():
    """Asserts that nested states are equal, bit for bit."""

    def compare(one, other, path):
        if isinstance(other, dict):
            assert one.keys() == other.keys(), path
            for key in other:
                compare(one[key], other[key], f"{path}[{key!r}]")
        elif isinstance(other, list):
            assert len(one) == len(other), path
            for i, (first, second) in enumerate(zip(one, other, strict=True)):
                compare(first, second, f"{path}[{i}]")
        elif isinstance(other, torch.Tensor):
            assert torch.equal(one, other), path
        else:
            assert one == other, path

    return compare


def final_states(folder):
    """Of both members, without what is measured about the machine."""
    content = load_checkpoint(folder / f"model_{ITERATIONS - 1:07d}.pth")
    of_members = [content["trainer"], *content["other_members"]]
    assert len(of_members) == 2
    for state in of_members:
        for hook in ("checkpoint", "metrics"):
            state["hooks"].pop(hook)
    return of_members


def averages(folder):
    """The final models, without the global step: members in turn count another one."""
    content = load_checkpoint(folder / "model_final.pth")
    return {name: content[name] for name in ("student", "teacher", "episode", "inference_model")}


def strike(server, folder, **options):
    """Strike one rank, see that the other one leaves by itself, and finish the run."""
    codes = server.run(folder, **AT_ONCE, **options)
    struck = options["struck"]
    assert codes[struck] == KILLED, server.log
    assert codes[1 - struck] == 2, server.log
    assert "has lost another one" in server.log
    finish(server, folder)


def finish(server, folder):
    assert server.run(folder, **AT_ONCE) == [0, 0], server.log


@pytest.mark.parametrize(
    ("g", "struck"),
    [
        (5, 1),
        *(
            pytest.param(g, struck, marks=pytest.mark.slow)
            for g, struck in [(0, 0), (0, 1), (5, 0), (7, 0), (7, 1), (11, 1)]
        ),
    ],
)
def test_a_rank_is_killed_at_a_step(server, assert_same, tmp_path, struck, g):
    strike(server, tmp_path, struck=struck, fault=f"step:{g}=kill")
    assert_same(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["open", "half", "fsync", "replace"])
def test_the_writer_is_killed_inside_a_checkpoint_of_two_members(
    server, whole, assert_same, tmp_path, point
):
    size = (whole / f"model_{ITERATIONS - 1:07d}.pth").stat().st_size
    point = {"half": str(size // 2)}.get(point, point)
    strike(server, tmp_path, struck=0, fault=f"write:{point}=kill@{2 if point.isdigit() else 3}")
    assert_same(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("struck", [0, 1])
@pytest.mark.parametrize("operation", [0, 7, 30])
def test_a_rank_is_killed_inside_the_exchange(server, assert_same, tmp_path, struck, operation):
    inside = [3, operation, signal.SIGKILL]
    strike(server, tmp_path, struck=struck, signal_inside=inside)
    assert_same(tmp_path)


@pytest.mark.slow
def test_fifty_kills_of_any_rank_at_random_times(server, assert_same, tmp_path):
    drawn, kills, finished = random.Random(1), 0, 0
    began = time.monotonic()
    assert server.run(tmp_path / "timed", **AT_ONCE) == [0, 0]
    duration = time.monotonic() - began
    while kills < 50:
        folder = tmp_path / str(finished)
        after, struck = drawn.uniform(0, 0.7 * duration), drawn.randrange(2)
        codes = server.run(folder, **AT_ONCE, alarm_after=after, struck=struck)
        kills += codes[struck] == -signal.SIGALRM
        if codes == [0, 0]:
            assert_same(folder)
            finished += 1
    finish(server, tmp_path / str(finished))
    assert_same(tmp_path / str(finished))


@pytest.mark.parametrize(
    ("g", "struck", "last"),
    [
        (1, 1, 2),
        pytest.param(3, 0, 3, marks=pytest.mark.slow),
        pytest.param(8, 1, 9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_ends_both_with_a_checkpoint_where_they_talk(
    server, assert_same, tmp_path, g, struck, last
):
    options = {"signal_after": [g, signal.SIGTERM], "struck": struck}
    assert server.run(tmp_path, **AT_ONCE, **options) == [143, 143], server.log
    assert next(iter(resume_files(tmp_path))) == last
    finish(server, tmp_path)
    assert_same(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("g", [2, 4, 8])
def test_a_common_part_is_trained_alike_by_all_and_survives_a_kill(server, states, tmp_path, g):
    """Of 5 iterations: a checkpoint in it has one state, which both members go on with."""
    in_turn, at_once = tmp_path / "turn", tmp_path / "once"
    assert server.run(in_turn, start=5) == 0, server.log
    codes = server.run(at_once, start=5, **AT_ONCE, struck=1, fault=f"step:{g}=kill")
    assert codes == [2, KILLED], server.log
    assert server.run(at_once, start=5, **AT_ONCE) == [0, 0], server.log
    states(averages(at_once), averages(in_turn), "models")


@pytest.mark.slow
def test_data_parallel_members_equal_those_in_turn_with_trained_batch_norm(
    server, states, tmp_path
):
    """Running statistics are each rank's own up to an episode's end, where a resume is exact."""
    in_turn, at_once = tmp_path / "turn", tmp_path / "once"
    assert server.run(in_turn, processes=2) == [0, 0], server.log
    four = {"processes": 4, "at_once": 2, "period": 0}
    codes = server.run(at_once, **four, struck=3, fault="step:6=kill")
    assert codes == [2, 2, 2, KILLED], server.log
    assert server.run(at_once, **four) == [0] * 4, server.log
    assert "after global step 4" in server.log
    states(averages(at_once), averages(in_turn), "models")
