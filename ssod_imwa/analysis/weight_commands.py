"""Analyses of weights: around a run's network, between two runs, between the members of a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from ssod_imwa.analysis.build import (
    Finding,
    TrainedRun,
    build_evaluate,
    build_recompute,
    numbers_table,
)
from ssod_imwa.analysis.interpolation import (
    State,
    total_distance,
    weight_distances,
)
from ssod_imwa.analysis.interpolation import interpolate as along_line
from ssod_imwa.analysis.landscape import (
    landscape_across,
    landscape_along,
    random_direction,
)
from ssod_imwa.analysis.weight_space import (
    interpolation_figure,
    landscape_figure,
    landscape_map,
    members_figure,
    title_of,
)
from ssod_imwa.averaging.weights import average
from ssod_imwa.classification.networks import deployed_state
from ssod_imwa.classification.tracking import SNAPSHOT_FOLDER, snapshot_files
from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint
from ssod_imwa.engine.checkpoint.models import check_classes, newest_model, read_models
from ssod_imwa.errors import CheckpointError, UserError, WeightsError

LINES = ("loss", "top1", "h_mean", "g_mean")
UNITS = {"loss": "test cross-entropy", "top1": "test accuracy (%)"}


def landscape(
    run: TrainedRun,
    *,
    directions: int = 5,
    points: int = 21,
    radius: float = 1.0,
    images: int = 0,
    plane: bool = False,
) -> Finding:
    """Loss and accuracy when noise is added to the weights (ECL, figure 8).

    Args:
        run: whose network.
        directions: how many are drawn; with `plane` two are.
        points: steps ε along each, from −radius to radius; odd, so that 0 is one of them.
        radius: largest step, in lengths of the filters.
        images: of the test set, about so many of equally many classes; 0 takes all.
        plane: across the plane of two directions instead.
    """
    if directions < 1:
        raise UserError(f"--directions = {directions} is not allowed (must be at least 1)")
    if points < 3 or points % 2 == 0:
        raise UserError(f"--points = {points} is not allowed (must be odd and at least 3)")
    if not radius > 0:
        raise UserError(f"--radius = {radius:g} is not allowed (must be above 0)")
    evaluate = build_evaluate(run, images)
    steps = np.linspace(-radius, radius, points)
    drawn = [
        random_direction(run.model, run.random("direction", i))
        for i in range(2 if plane else directions)
    ]
    if plane:
        first, second = drawn
        across = landscape_across(run.model, first, second, steps, evaluate)
        diagonal = {name: across[name].diagonal() for name in UNITS}
        return Finding(
            {"landscape_plane.png": landscape_map(steps, across, units=UNITS)},
            [_steps_table("on the diagonal of the plane", steps, diagonal)],
        )
    along = [landscape_along(run.model, direction, steps, evaluate) for direction in drawn]
    means = {name: np.mean([numbers[name] for numbers in along], axis=0) for name in UNITS}
    return Finding(
        {"landscape.png": landscape_figure(steps, along, units=UNITS)},
        [_steps_table(f"mean of the directions ({directions})", steps, means)],
    )


def _steps_table(title: str, steps: np.ndarray, numbers: Mapping[str, np.ndarray]) -> Table:
    columns = zip(steps, *numbers.values(), strict=True)
    rows = [(f"{step:+.2f}", *map(float, values)) for step, *values in columns]
    return numbers_table(title, ("ε", *UNITS.values()), rows)


def interpolate(
    run: TrainedRun, other: str | Path, *, points: int = 11, bn: str = "average", images: int = 0
) -> Finding:
    """Metrics on the line from a run's network A to another B (BTM, figures 1 and 2).

    Args:
        run: A, whose test images are used.
        other: folder or file of B.
        points: λ from 0 to 1.
        bn: batch norms of the points between: "average" of both statistics, "recompute" on
            training batches of A, or "both", to compare.
        images: see `landscape`.
    """
    if points < 2:
        raise UserError(f"--points = {points} is not allowed (must be at least 2)")
    path = newest_model(other) if Path(other).is_dir() else Path(other)
    check_classes(path, run.classes)
    one, two = (deployed_state(read_models(source).weights) for source in (run.weights, path))
    try:
        average([one, two])
    except ValueError as error:
        raise WeightsError(
            f"{run.weights} and {path} are of different networks: {error}"
        ) from error
    evaluate = build_evaluate(run, images)
    shares = np.linspace(0, 1, points)
    by_kind = {}
    for kind in ("average", "recompute") if bn == "both" else (bn,):
        recompute = build_recompute(run) if kind == "recompute" else None
        numbers = along_line(run.model, one, two, shares, evaluate, recompute=recompute)
        by_kind[kind] = {name: numbers[name] for name in LINES}
    first, *others = by_kind.values()
    figure = interpolation_figure(
        shares,
        first,
        names=(str(run.folder), str(other)),
        recomputed=others[0] if others else None,
    )
    tables = [
        numbers_table(
            f"(1 − λ) A + λ B, batch norms: {kind}",
            ("λ", *map(title_of, LINES)),
            [(f"{x:.2f}", *(float(numbers[n][i]) for n in LINES)) for i, x in enumerate(shares)],
        )
        for kind, numbers in by_kind.items()
    ]
    return Finding({"interpolation.png": figure}, tables)


def members(run: TrainedRun, *, bn: str = "average", metric: str = "top1") -> Finding:
    """What averaging the members gains at each snapshot, and how far apart they are (IMWA, fig. 1).

    Args:
        run: with snapshots of at least two members.
        bn: batch norms of the averages, "average" or "recompute".
        metric: top1, h_mean, g_mean, or many, medium, few.
    """
    snapshots = _common_snapshots(run)
    evaluate = build_evaluate(run)
    recompute = build_recompute(run) if bn == "recompute" else None
    names = [name for name, _ in run.model.named_parameters()]
    values, distances = [], []
    for paths in snapshots.values():
        states = [read_snapshot(path) for path in paths]
        measured: list[dict[str, float]] = []
        for state in [*states, average(states)]:
            run.model.load_state_dict(state)
            if recompute is not None and len(measured) == len(states):
                recompute(run.model)
            measured.append(evaluate(run.model))
        allowed = [name for name in measured[0] if name != "loss"]  # more of it is no gain
        if metric not in allowed:
            raise UserError(
                f"--metric {metric} is not allowed (must be one of {', '.join(allowed)})"
            )
        values.append([numbers[metric] for numbers in measured])
        distances.append(_part_distances(states, names))
    epochs = [(t + 1) / run.iterations_per_epoch for t in snapshots]
    parts = {part: np.array([distance[part] for distance in distances]) for part in distances[0]}
    numbers = np.array(values).T
    figure = members_figure(epochs, numbers[:-1], numbers[-1], parts, metric=metric)
    header = ["epochs", *(f"member {m + 1}" for m in range(len(numbers) - 1))]
    header += ["average", "gain over the best", "distance"]
    rows = [
        [f"{epoch:.2f}", *map(float, row), float(row[-1] - max(row[:-1])), distance["whole"]]
        for epoch, row, distance in zip(epochs, values, distances, strict=True)
    ]
    title = f"{title_of(metric)} on the test images (%)"
    return Finding({"members.png": figure}, [numbers_table(title, header, rows)])


def _common_snapshots(run: TrainedRun) -> dict[int, list[Path]]:
    """Own iteration -> a file of every member, where all members have one."""
    folder = run.folder / SNAPSHOT_FOLDER
    files = snapshot_files(folder)
    numbers = sorted({member for _, member in files})
    if len(numbers) < 2:
        raise UserError(
            f"{folder} holds snapshots of {len(numbers)} members (at least 2 are needed: train "
            "with IMWA.MEMBERS 2 and CLS.SNAPSHOT_PERIOD)"
        )
    times = sorted({t for t, _ in files})
    common = {
        t: [files[t, member] for member in numbers]
        for t in times
        if all((t, member) in files for member in numbers)
    }
    if not common:
        raise UserError(f"{folder} has no iteration with snapshots of all members {numbers}")
    return common


def read_snapshot(path: Path) -> State:
    """The deployed network's weights in a file of `SnapshotHook`.

    Raises:
        CheckpointError: it is damaged.
    """
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(f"{path} cannot be read: {reason}")
    return deployed_state(load_checkpoint(path)["student"])


def _part_distances(states: list[State], names: list[str]) -> dict[str, float]:
    """‖θ1 − θ2‖ of each part of the network and of the whole, the mean over pairs of members."""
    pairs: list[dict[str, float]] = []
    for one, other in itertools.combinations(states, 2):
        layers = weight_distances(one, other, names)
        parts: dict[str, dict[str, float]] = {"whole": layers}
        for layer, distance in layers.items():
            parts.setdefault(_part_of(layer), {})[layer] = distance
        pairs.append({part: total_distance(its) for part, its in parts.items()})
    return {part: float(np.mean([pair[part] for pair in pairs])) for part in pairs[0]}


def _part_of(layer: str) -> str:
    """stem, layer1, classifier, ...: of experts the same parts together."""
    names = layer.split(".")
    return names[2] if names[0] == "experts" else names[0]
