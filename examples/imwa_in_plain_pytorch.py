"""IMWA in a plain PyTorch loop, on scikit-learn's handwritten digits.

Two members learn from 100 labeled digits, each in its own order, are averaged five times and go on
from the average. The paper trains detectors and classifiers on imbalanced data with M = 2, E = 20;
this shows how the pieces fit, not the paper's gains. Run it with

    python examples/imwa_in_plain_pytorch.py

It takes a few seconds on a CPU and prints the accuracy on the other digits. The average is ahead of
its members while the learning rate is high; in the end, on so few digits, all agree:

    episode   member 1  member 2  average
          1    69.30 %    65.82 %   73.90 %
          2    74.90 %    73.07 %   76.78 %
          3    79.43 %    79.43 %   79.55 %
          4    79.67 %    79.73 %   79.73 %
          5    79.73 %    79.67 %   79.73 %
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from ssod_imwa.averaging import IMWA, EpisodeSchedule

ITERATIONS, EPISODES, MEMBERS = 300, 5, 2
LABELED = 100
BATCH = 8


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """Images as float32 (n, 64) in [0, 1] and labels as int64 (n,)."""
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def batch_of(member: int, t: int) -> torch.Tensor:
    """Indices of a member's batch at its own iteration t: a function of both, so runs repeat."""
    generator = torch.Generator().manual_seed(1000 * t + member)
    return torch.randint(LABELED, (BATCH,), generator=generator)


def main() -> list[tuple[list[float], float]]:
    """Train; returns each episode's member accuracies and the average's, in percent."""
    images, labels = load()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)

    @torch.no_grad()
    def accuracy() -> float:
        found = model(images[LABELED:]).argmax(1)
        return 100 * (found == labels[LABELED:]).float().mean().item()

    schedule = EpisodeSchedule(ITERATIONS, episodes=EPISODES, members=MEMBERS)
    imwa = IMWA(
        schedule,
        {"model": model},
        optimizer=optimizer,
        # Each member has its own learning-rate clock: both see the whole schedule.
        member_state={"scheduler": scheduler},
    )
    results = []
    members = []
    for global_step in range(len(schedule)):
        position = schedule.position(global_step)
        imwa.before_step(global_step)
        index = batch_of(position.member, position.t)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        scheduler.step()
        if position.ends_member:
            members.append(accuracy())
        if imwa.after_step(global_step):
            results.append((members, accuracy()))
            members = []
    return results


if __name__ == "__main__":
    print("episode   " + "".join(f"member {m}  " for m in range(1, MEMBERS + 1)) + "average")
    for episode, (member_accuracies, averaged) in enumerate(main(), start=1):
        columns = "".join(f"{value:7.2f} %  " for value in member_accuracies)
        print(f"{episode:7}  {columns}{averaged:6.2f} %")
