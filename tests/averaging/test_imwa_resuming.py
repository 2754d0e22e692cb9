"""IMWA's state: exact resuming at every step, and refusal of what is not exact."""

import io
import itertools

import pytest
import torch

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA

POLICIES = ["keep", "average", "reset", "carry"]


@pytest.mark.parametrize(
    ("optimizer", "store", "start"),
    [*itertools.product(["sgd", "adam"], ["dict", "stream"], [0]), ("sgd", "dict", 2)],
)
@pytest.mark.parametrize("optimizer_state", POLICIES)
def test_every_step_can_be_resumed_from_bitwise(loop, optimizer, optimizer_state, store, start):
    schedule = EpisodeSchedule(4 + start, episodes=2, members=3, start=start)
    options = {"optimizer_state": optimizer_state, "store": store, "bn": "keep"}
    straight = loop.Run(optimizer=optimizer)
    imwa = straight.imwa(schedule, **options)
    files = []
    for g in range(len(schedule)):
        straight.train(schedule, imwa, steps=[g])
        file = io.BytesIO()
        torch.save(
            {
                "models": straight.weights(),
                "optimizer": straight.optimizer.state_dict(),
                "scheduler": straight.scheduler.state_dict(),
                "queue": straight.queue,
                "imwa": imwa.state_dict(),
            },
            file,
        )
        files.append(file)
    for g, file in enumerate(files[:-1]):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        run = loop.Run(optimizer=optimizer)
        for name, model in run.models.items():
            states = {k.removeprefix(f"{name}."): v for k, v in saved["models"].items()}
            model.load_state_dict({k: v for k, v in states.items() if k in model.state_dict()})
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scheduler.load_state_dict(saved["scheduler"])
        run.queue = saved["queue"]
        resumed = run.imwa(schedule, **options)
        resumed.load_state_dict(saved["imwa"])
        run.train(schedule, resumed, steps=range(g + 1, len(schedule)))
        loop.assert_same(run.weights(), straight.weights())
        assert torch.equal(run.queue, straight.queue)


def test_state_keys_are_pinned(loop):
    run = loop.Run()
    schedule = EpisodeSchedule(2, members=2)
    state = run.imwa(schedule).state_dict()
    assert sorted(state) == [
        "batchnorm",
        "member_state",
        "optimizer",
        "outer",
        "settings",
        "spoiled",
        "store",
        "weights",
    ]


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (EpisodeSchedule(4, episodes=4, members=2), {}, "episodes is 4 but was 2"),
        (EpisodeSchedule(4, episodes=2, members=3), {}, "members is 3 but was 2"),
        (EpisodeSchedule(4, episodes=2, members=2, lengths=[1, 3]), {}, r"lengths is \[1, 3\] but"),
        (EpisodeSchedule(4, members=2, start=1), {}, "start is 1 but was 0"),
        (EpisodeSchedule(4, episodes=2, members=2), {"store": "stream"}, "store is 'stream' but"),
        (
            EpisodeSchedule(4, episodes=2, members=2),
            {"optimizer_state": "reset"},
            "optimizer_state is 'reset' but was 'keep'",
        ),
    ],
)
def test_state_of_another_run_is_refused(loop, schedule, options, message):
    run = loop.Run()
    state = run.imwa(EpisodeSchedule(4, episodes=2, members=2)).state_dict()
    with pytest.raises(ValueError, match=message):
        run.imwa(schedule, **options).load_state_dict(state)


def test_steps_that_were_missed_are_noticed(loop):
    run = loop.Run()
    schedule = EpisodeSchedule(2, members=2)
    with pytest.raises(RuntimeError, match="0 members of its episode were seen"):
        run.imwa(schedule).after_step(3)
    with pytest.raises(RuntimeError, match="call before_step and after_step at every step"):
        run.imwa(schedule).after_step(1)


def size(value):
    """Bytes of all tensors in a nested state."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(size, items))


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_checkpoint_is_at_most_as_large_as_those_of_as_many_plain_runs(members):
    """What docs/detectron2.md says of its size."""
    model = torch.nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = EpisodeSchedule(4, episodes=2, members=members)
    imwa = IMWA(schedule, {"student": model}, optimizer=optimizer)
    sizes = []
    for g in range(len(schedule)):
        imwa.before_step(g)
        model(torch.ones(20)).sum().backward()
        optimizer.step()
        imwa.after_step(g)
        states = [model.state_dict(), optimizer.state_dict(), imwa.state_dict()]
        sizes.append(sum(map(size, states)))
    plain = 2 * size(model.state_dict())  # weights and momentum
    assert max(sizes) == members * plain
    assert sizes[-1] == (members + 1) * plain // 2
