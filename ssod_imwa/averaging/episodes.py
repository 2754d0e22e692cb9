"""Which episode, member and own iteration a global step is."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
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
    members: int
    """How many members are trained in this episode: 1 in the common part, else M."""


class EpisodeSchedule:
    """Serial order of IMWA: in each episode the members train one after another.

    Episode e covers the own iterations b_e..b_{e+1}-1 with b_e = floor(e * T / E), so lengths
    differ by at most one and every member sees each t once. M = 1 is plain training, E = 1 is
    vanilla model weight averaging (IMWA paper, arXiv 2404.16331, eqs. 1-5).

    With a common part of S iterations (0 < S < T), these are trained once, by member 0, before
    members part: an episode 0 of one member, which the E episodes of M members follow, with
    b_e = S + floor((e - 1) * (T - S) / E). S = T is plain training, whatever M and E.

    Episodes of several members may have given lengths instead, such as `lengths_by_rate`.

    Where members are trained at once, on several processes, each of these has a schedule of its own
    member `only`, in which the global step is that member's own iteration.

    Args:
        iterations: T, optimizer steps of one member over the whole run.
        episodes: E, 1..T - S.
        members: M, at least 1.
        start: S, own iterations before members part, 0..T.
        lengths: own iterations of each of the E episodes, with the sum T - S; None for equal ones.
        only: the member whose steps these are, 0..M - 1; None for all, who take turns.

    Attributes:
        episodes: all of them, the common part included.
        members: M, 1 if members never part.
        turns: how many members take turns in an episode: M, or 1 with `only`.
        start: S, 0 if members never part.
        lengths: those that were given, or None.
        parting: number of the first episode after the common part: 1, or 0 if there is none.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> schedule = EpisodeSchedule(4, episodes=2, members=2)
        >>> [(p.episode, p.member, p.t) for p in map(schedule.position, range(len(schedule)))]
        [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 2), (1, 0, 3), (1, 1, 2), (1, 1, 3)]
        >>> schedule = EpisodeSchedule(4, episodes=1, members=2, start=2)
        >>> [(p.episode, p.member, p.t) for p in map(schedule.position, range(len(schedule)))]
        [(0, 0, 0), (0, 0, 1), (1, 0, 2), (1, 0, 3), (1, 1, 2), (1, 1, 3)]
        >>> schedule = EpisodeSchedule(4, episodes=1, members=2, start=2, only=1)
        >>> [(p.episode, p.member, p.t) for p in map(schedule.position, range(len(schedule)))]
        [(0, 0, 0), (0, 0, 1), (1, 1, 2), (1, 1, 3)]
    """

    def __init__(
        self,
        iterations: int,
        *,
        episodes: int = 1,
        members: int = 1,
        start: int = 0,
        lengths: Sequence[int] | None = None,
        only: int | None = None,
    ) -> None:
        _check_counts(iterations=iterations, episodes=episodes, members=members)
        _check_counts(low=0, start=start)
        if start > iterations:
            raise ValueError(f"start = {start} is not allowed (must be 0..T = {iterations})")
        if only is not None and not 0 <= only < members:
            raise ValueError(f"only = {only} is not allowed (must be 0..M - 1 = {members - 1})")
        if start == iterations:
            episodes, members, start, lengths = 1, 1, 0, None
        if episodes > iterations - start:
            of_members = "T - start" if start else "T"
            raise ValueError(
                f"episodes = {episodes} is not allowed (must be 1..{of_members} = "
                f"{iterations - start})"
            )
        self.iterations = iterations
        self.members = members
        self.only = only
        self.turns = members if only is None else 1
        self.parting = 1 if start else 0
        self.episodes = self.parting + episodes
        self.start = start
        self.lengths = None if lengths is None else tuple(lengths)
        if lengths is None:
            self._begins = _begins(iterations, episodes, start)
        else:
            _check_lengths(lengths, episodes, iterations - start)
            self._begins = list(accumulate([start, *lengths] if start else lengths, initial=0))

    def __len__(self) -> int:
        """Global steps of the whole run: M * T, of a common part of S M * (T - S) + S.

        With `only` T.
        """
        return self.start + self.turns * (self.iterations - self.start)

    def bounds(self, episode: int) -> tuple[int, int]:
        """First own iteration of an episode and of the next one."""
        self._check_episode(episode)
        return self._begins[episode], self._begins[episode + 1]

    def members_in(self, episode: int) -> int:
        """How many members are trained in an episode."""
        self._check_episode(episode)
        return 1 if episode < self.parting else self.members

    def turns_in(self, episode: int) -> int:
        """How many members take turns in an episode."""
        self._check_episode(episode)
        return 1 if episode < self.parting else self.turns

    def number(self, episode: int) -> int:
        """An episode's number for people and periods: from 1, and 0 for the common part."""
        self._check_episode(episode)
        return episode + 1 - self.parting

    def _check_episode(self, episode: int) -> None:
        if not 0 <= episode < self.episodes:
            raise IndexError(f"episode = {episode} is not in 0..{self.episodes - 1}")

    def position(self, global_step: int) -> Position:
        """The episode, member and own iteration of a global step 0..len-1."""
        if not 0 <= global_step < len(self):
            raise IndexError(f"global_step = {global_step} is not in 0..{len(self) - 1}")
        if global_step < self.start:
            episode = 0
        else:
            # Where all members would be if they trained side by side since they parted.
            abreast = self.start + (global_step - self.start) // self.turns
            episode = bisect_right(self._begins, abreast) - 1
        members, turns = self.members_in(episode), self.turns_in(episode)
        first, end = self._begins[episode], self._begins[episode + 1]
        turn, j = divmod(global_step - self._first_step(episode), end - first)
        ends_member = j == end - first - 1
        return Position(
            global_step=global_step,
            episode=episode,
            member=turn if self.only is None or members == 1 else self.only,
            t=first + j,
            starts_member=j == 0,
            ends_member=ends_member,
            ends_episode=ends_member and turn == turns - 1,
            members=members,
        )

    def in_words(self, position: Position) -> tuple[str, ...]:
        """Episode, member and iteration in the episode, counted from 1 for people to read.

        Example:
            >>> schedule = EpisodeSchedule(100, episodes=5, members=2, start=50)
            >>> schedule.in_words(schedule.position(65))
            ('episode 1/5', 'member 2/2', 'iteration 6/10')
            >>> schedule.in_words(schedule.position(30))
            ('common part', 'iteration 31/50')
        """
        first, end = self.bounds(position.episode)
        iteration = f"iteration {position.t - first + 1}/{end - first}"
        if position.episode < self.parting:
            return "common part", iteration
        episode = f"episode {self.number(position.episode)}/{self.episodes - self.parting}"
        return episode, f"member {position.member + 1}/{position.members}", iteration

    def global_step(self, member: int, t: int) -> int:
        """The global step at which a member takes its own iteration t.

        Raises:
            IndexError: there is no such iteration, or another member takes it for all.
        """
        if not 0 <= t < self.iterations:
            raise IndexError(f"t = {t} is not in 0..{self.iterations - 1}")
        episode = bisect_right(self._begins, t) - 1
        members = self.members_in(episode)
        if not 0 <= member < members:
            raise IndexError(f"member = {member} is not in 0..{members - 1}")
        first, end = self._begins[episode], self._begins[episode + 1]
        turn = member if self.only is None else 0
        return self._first_step(episode) + turn * (end - first) + t - first

    def _first_step(self, episode: int) -> int:
        """The global step with which an episode begins."""
        if episode < self.parting:
            return 0
        return self.start + self.turns * (self._begins[episode] - self.start)


def _begins(iterations: int, episodes: int, start: int) -> list[int]:
    """b_0..b_E of all episodes, of the common one, too, and T."""
    length = iterations - start
    begins = [start + e * length // episodes for e in range(episodes + 1)]
    return [0, *begins] if start else begins


def _check_counts(*, low: int = 1, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} = {value!r} is not allowed (must be an integer)")
        if value < low:
            raise ValueError(f"{name} = {value} is not allowed (must be at least {low})")


def _check_lengths(lengths: Sequence[int], episodes: int, iterations: int) -> None:
    for number, length in enumerate(lengths):
        _check_counts(**{f"lengths[{number}]": length})
    if len(lengths) != episodes or sum(lengths) != iterations:
        raise ValueError(
            f"lengths = {list(lengths)} are not allowed (must be {episodes}, one an episode, with "
            f"the sum {iterations})"
        )
