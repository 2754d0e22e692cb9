"""Which episode, member and own iteration a global step is."""

from typing import NamedTuple


class Position(NamedTuple):
    """Where a global step stands in the run; all counts start at 0."""

    global_step: int
    episode: int
    member: int
    t: int
    """The member's own iteration, 0..T-1: what LR, burn-in and every event of a method follow."""
    starts_member: bool
    ends_member: bool
    ends_episode: bool


class EpisodeSchedule:
    """Serial order of IMWA: in each episode the members train one after another.

    Episode e covers the own iterations b_e..b_{e+1}-1 with b_e = floor(e * T / E), so lengths
    differ by at most one and every member sees each t once. M = 1 is plain training, E = 1 is
    vanilla model weight averaging (IMWA paper, arXiv 2404.16331, eqs. 1-5).

    Args:
        iterations: T, optimizer steps of one member over the whole run.
        episodes: E, 1..T.
        members: M, at least 1.
        accumulation: for loops that count micro-batches: every b_e must be a multiple of it.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> schedule = EpisodeSchedule(4, episodes=2, members=2)
        >>> [(p.episode, p.member, p.t) for p in map(schedule.position, range(len(schedule)))]
        [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 2), (1, 0, 3), (1, 1, 2), (1, 1, 3)]
    """

    def __init__(
        self, iterations: int, *, episodes: int = 1, members: int = 1, accumulation: int = 1
    ) -> None:
        arguments = {
            "iterations": iterations,
            "episodes": episodes,
            "members": members,
            "accumulation": accumulation,
        }
        for name, value in arguments.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} = {value!r} is not allowed (must be an integer)")
            if value < 1:
                raise ValueError(f"{name} = {value} is not allowed (must be at least 1)")
        if episodes > iterations:
            raise ValueError(f"episodes = {episodes} is not allowed (must be 1..T = {iterations})")
        self.iterations = iterations
        self.episodes = episodes
        self.members = members
        if accumulation > 1:
            _check_accumulation(iterations, episodes, accumulation)

    def __len__(self) -> int:
        """Optimizer steps of the whole run, M * T."""
        return self.members * self.iterations

    def bounds(self, episode: int) -> tuple[int, int]:
        """First own iteration of an episode and of the next one."""
        if not 0 <= episode < self.episodes:
            raise IndexError(f"episode = {episode} is not in 0..{self.episodes - 1}")
        return (
            episode * self.iterations // self.episodes,
            (episode + 1) * self.iterations // self.episodes,
        )

    def position(self, global_step: int) -> Position:
        """The episode, member and own iteration of a global step 0..M*T-1."""
        if not 0 <= global_step < len(self):
            raise IndexError(f"global_step = {global_step} is not in 0..{len(self) - 1}")
        # The episode that holds own iteration x is the largest e with floor(e*T/E) <= x.
        on_average = global_step // self.members
        episode = ((on_average + 1) * self.episodes - 1) // self.iterations
        first, end = self.bounds(episode)
        member, j = divmod(global_step - self.members * first, end - first)
        ends_member = j == end - first - 1
        return Position(
            global_step=global_step,
            episode=episode,
            member=member,
            t=first + j,
            starts_member=j == 0,
            ends_member=ends_member,
            ends_episode=ends_member and member == self.members - 1,
        )

    def global_step(self, member: int, t: int) -> int:
        """The global step at which a member takes its own iteration t."""
        if not 0 <= member < self.members:
            raise IndexError(f"member = {member} is not in 0..{self.members - 1}")
        if not 0 <= t < self.iterations:
            raise IndexError(f"t = {t} is not in 0..{self.iterations - 1}")
        first, end = self.bounds(((t + 1) * self.episodes - 1) // self.iterations)
        return self.members * first + member * (end - first) + t - first


def _check_accumulation(iterations: int, episodes: int, accumulation: int) -> None:
    def fits(count: int) -> bool:
        return all(e * iterations // count % accumulation == 0 for e in range(count + 1))

    if fits(episodes):
        return
    valid = [e for e in range(1, iterations // accumulation + 1) if fits(e)]
    nearest = sorted(valid, key=lambda e: abs(e - episodes))[:2]
    fix = f"nearest valid: {sorted(nearest)}" if nearest else "T itself is not a multiple"
    raise ValueError(
        f"episodes = {episodes} with accumulation = {accumulation} and T = {iterations} is not "
        f"allowed (every episode must begin on a multiple of accumulation; {fix})"
    )
