"""Members on two ranks (gloo, two processes) against the serial order."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Ranks

WORKER = Path(__file__).with_name("two_ranks.py")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), folder / "rendezvous", folder], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def worker():
    specification = importlib.util.spec_from_file_location("two_ranks", WORKER)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def serial(optimizer_state, **options):
    shared = worker()
    student, teacher, optimizer = shared.build(optimizer_state)
    ema = ModelEMA(teacher, student, 0.9)
    schedule = EpisodeSchedule(shared.ITERATIONS, episodes=shared.EPISODES, members=shared.MEMBERS)
    imwa = IMWA(
        schedule,
        {"student": student, "teacher": teacher},
        optimizer=optimizer,
        optimizer_state=optimizer_state,
        **options,
    )
    for g in range(len(schedule)):
        position = schedule.position(g)
        imwa.before_step(g)
        shared.step(student, ema, optimizer, position.member, position.t)
        imwa.after_step(g)
    return {"student": student.state_dict(), "teacher": teacher.state_dict()}


@pytest.mark.parametrize(
    ("name", "optimizer_state", "options"),
    [
        ("keep", "keep", {}),
        ("average", "average", {}),
        ("reset", "reset", {}),
        ("bn keep", "keep", {"bn": "keep"}),
        ("weighted", "keep", {"coefficients": [0.25, 0.75]}),
    ],
)
def test_same_bits_as_the_serial_order(ranks, name, optimizer_state, options):
    expected = serial(optimizer_state, **options)
    for rank in range(2):
        for model, state in expected.items():
            for key, value in state.items():
                assert torch.equal(ranks[rank][name][model][key], value), (rank, model, key)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("nan", ["FloatingPointError: student.2.weight of member 2 is not finite"] * 2),
        ("shape", ["ValueError: student.1.running_mean is (5,)"] * 2),
        ("frozen", ["ValueError: student.0.bias has changed", "RuntimeError: rank 0 failed"]),
    ],
)
def test_failed_exchange_changes_no_rank(ranks, name, messages):
    for rank, message in zip(ranks, messages, strict=True):
        assert message in rank[name]["message"]
        before, after = rank[name]["before"], rank[name]["after"]
        assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    weights = [rank[name]["after"]["0.weight"] for rank in ranks]
    assert not torch.equal(*weights)


def test_dropped_member_goes_on_with_the_others_state(ranks):
    states = [rank["dropped"]["student"] for rank in ranks]
    for name, value in states[0].items():
        assert value.isfinite().all()
        assert torch.equal(value, states[1][name])


def test_unequal_start_is_refused(ranks):
    for rank in ranks:
        assert rank["unequal start"]["message"].startswith("student.2.bias differs between ranks")


def test_running_statistics_are_averaged_inside_a_member(ranks):
    for rank in ranks:
        assert rank["data parallel"]["member"] == 0
        assert rank["data parallel"]["mean"].tolist() == [2.0] * 5


def test_every_kind_of_tensor_travels(ranks):
    for rank in ranks:
        found = rank["mixed types"]
        assert found["half"].tolist() == [60000, 1]
        assert found["half"].dtype == torch.float16
        assert found["flags"].tolist() == [True, False, True]
        assert found["empty"].shape == (0, 3)
        assert found["scalar"].item() == 0.5
        assert found["complex"].tolist() == [0.5j, 2]
        assert found["steps.num_batches_tracked"].item() == 4
        assert torch.equal(found["strided"], torch.arange(6.0).view(2, 3).t() * 1.5)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ({"members": 2, "only": 0}, {}, "member 0 of 2 is not allowed on ranks of member 0 of 1"),
        ({"members": 2}, {}, "member None of 2 is not allowed on ranks of member 0 of 1"),
        ({}, {"bucket_bytes": 0}, "bucket_bytes = 0 is not allowed"),
        ({}, {"optimizer_state": "average"}, "needs the optimizer"),
    ],
)
def test_bad_options_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        ParallelIMWA(
            EpisodeSchedule(2, **schedule),
            {"m": torch.nn.Linear(1, 1)},
            Ranks.alone(),
            **options,
        )


def test_carry_is_refused():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match='"carry" is not allowed'):
        ParallelIMWA(
            EpisodeSchedule(1),
            {"m": model},
            Ranks.alone(),
            optimizer=optimizer,
            optimizer_state="carry",
        )
