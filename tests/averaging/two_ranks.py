"""One rank of `test_parallel.py`: runs every scenario and saves what it ends with.

Usage: two_ranks.py RANK RENDEZVOUS_FILE OUTPUT_FOLDER
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.exchange import average_over_ranks
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Ranks

ITERATIONS, EPISODES, MEMBERS = 7, 3, 2


def build(optimizer_state):
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)) for _ in range(2)
    )
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student[0].bias.requires_grad_(False)
    # Adam for "average", so that step counters are exchanged, too.
    parameters = [p for p in student.parameters() if p.requires_grad]
    if optimizer_state == "average":
        optimizer = torch.optim.Adam(parameters, lr=0.01)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return student, teacher, optimizer


def step(student, ema, optimizer, member, t):
    generator = torch.Generator().manual_seed(1000 * member + t)
    inputs = torch.randn(8, 3, generator=generator)
    optimizer.zero_grad()
    student(inputs).square().sum(1).sub(1).square().mean().backward()
    optimizer.step()
    ema.update(t)


def build_imwa(modules, iterations=1, *, members=MEMBERS, episodes=1, **options):
    ranks = Ranks.of_run(members)
    schedule = EpisodeSchedule(iterations, episodes=episodes, members=members, only=ranks.member)
    return ParallelIMWA(schedule, modules, ranks, **options)


def same_as_serial(optimizer_state, **options):
    student, teacher, optimizer = build(optimizer_state)
    ema = ModelEMA(teacher, student, 0.9)
    imwa = build_imwa(
        {"student": student, "teacher": teacher},
        ITERATIONS,
        episodes=EPISODES,
        optimizer=optimizer,
        optimizer_state=optimizer_state,
        bucket_bytes=64,
        **options,
    )
    for t in range(ITERATIONS):
        imwa.before_step(t)
        step(student, ema, optimizer, imwa.ranks.member, t)
        imwa.after_step(t)
    return {"student": student.state_dict(), "teacher": teacher.state_dict()}


def failure(change):
    """What this rank's weights are, and what it was told, after an exchange that cannot work."""
    student, teacher, optimizer = build("keep")
    imwa = build_imwa({"student": student, "teacher": teacher}, optimizer=optimizer)
    imwa.before_step(0)
    with torch.no_grad():
        student[0].weight += imwa.ranks.member + 1
        change(student, imwa.ranks.member)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    try:
        imwa.after_step(0)
        message = ""
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return {"message": message, "before": before, "after": student.state_dict()}


def nan_in_member_1(student, member):
    if member == 1:
        student[2].weight[0, 0] = float("nan")


def another_shape_in_member_1(student, member):
    if member == 1:
        student[1].running_mean = torch.zeros(6)


def frozen_changed_in_member_0(student, member):
    if member == 0:
        student[0].bias += 1


def dropped():
    """Member 1 diverges in the first of two episodes and must not spoil the second."""
    student, teacher, optimizer = build("keep")
    imwa = build_imwa({"student": student}, 2, episodes=2, optimizer=optimizer, nonfinite="drop")
    ema = ModelEMA(teacher, student, 0.9)
    for t in range(2):
        imwa.before_step(t)
        step(student, ema, optimizer, imwa.ranks.member, t)
        if t == 0 and imwa.ranks.member == 1:
            with torch.no_grad():
                student[2].weight.fill_(float("nan"))
            for slots in optimizer.state.values():
                slots["momentum_buffer"].fill_(float("nan"))
        imwa.after_step(t)
    return {"student": student.state_dict()}


def unequal_start():
    student, *_ = build("keep")
    imwa = build_imwa({"student": student})
    with torch.no_grad():
        student[2].bias += imwa.ranks.member
    try:
        imwa.before_step(0)
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


def data_parallel():
    """One member on both ranks: only running statistics differ, and they are averaged."""
    student, *_ = build("keep")
    imwa = build_imwa({"student": student}, members=1)
    imwa.before_step(0)
    student[1].running_mean.fill_(1.0 + 2 * imwa.ranks.batch.rank)
    imwa.after_step(0)
    return {"member": imwa.ranks.member, "mean": student[1].running_mean.clone()}


def mixed_types(rank):
    state = {
        "half": torch.tensor([60000.0, 1.0], dtype=torch.float16),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(float(rank)),
        "complex": torch.tensor([1j * rank, 2.0]),
        "steps.num_batches_tracked": torch.tensor(3 + rank),
        "strided": torch.arange(6.0).view(2, 3).t() * (rank + 1),
    }
    return average_over_ranks(state, Ranks.of_run().run, bucket_bytes=16)


def main(rank, rendezvous, output):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results = {
        "keep": same_as_serial("keep"),
        "average": same_as_serial("average"),
        "reset": same_as_serial("reset"),
        "bn keep": same_as_serial("keep", bn="keep"),
        "weighted": same_as_serial("keep", coefficients=[0.25, 0.75]),
        "nan": failure(nan_in_member_1),
        "shape": failure(another_shape_in_member_1),
        "frozen": failure(frozen_changed_in_member_0),
        "dropped": dropped(),
        "unequal start": unequal_start(),
        "data parallel": data_parallel(),
        "mixed types": mixed_types(rank),
    }
    torch.save(results, f"{output}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
