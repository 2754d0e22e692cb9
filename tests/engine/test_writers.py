import json
import shutil
import threading

import numpy as np
import pytest
from support import needs_fork, on_two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.engine import launch
from ssod_imwa.engine.evaluation import EvaluationHook, Evaluations
from ssod_imwa.engine.hooks import LRHook
from ssod_imwa.engine.time_left import TimeLeft
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.engine.writers import (
    JSONWriter,
    MetricsHook,
    TensorBoardWriter,
    Writer,
    _over_ranks,
)

MEASURED = ("time", "data_time", "eta_seconds", "peak_memory_mb")


class ListWriter(Writer):
    name = "list"

    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)


def read_rows(path, *, without=MEASURED):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


def build(tiny, writers, *, iterations=10, period=4, hooks=(), **options):
    trainer = tiny.trainer(iterations, **options)
    metrics = MetricsHook(writers, period, TimeLeft(trainer.schedule))
    trainer.register_hooks([LRHook(lambda t: 1 / (t + 1)), metrics, *hooks])
    return trainer


def test_rows_come_each_period_and_at_members_ends(tiny):
    writer = ListWriter()
    build(tiny, [writer], iterations=5, episodes=1, members=2).train()
    places = [(r["iteration"], r["episode"], r["member"], r["t"]) for r in writer.rows]
    assert places == [(3, 0, 0, 3), (4, 0, 0, 4), (7, 0, 1, 2), (9, 0, 1, 4)]


def test_numbers_are_medians_since_the_last_row_and_lr_is_the_last(tiny):
    writer = ListWriter()
    trainer = build(tiny, [writer], iterations=5, members=2)
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    expected = [np.median(losses[a:b]) for a, b in ((0, 4), (4, 5), (5, 8), (8, 10))]
    assert [row["total_loss"] for row in writer.rows] == expected
    assert [row["lr"] for row in writer.rows] == [0.1 * (1 / (t + 1)) for t in (3, 4, 2, 4)]


def test_the_time_left_counts_evaluations_that_are_still_to_come(tiny, monkeypatch):
    """Two episodes of two steps, each followed by evaluations of student and teacher."""
    clock = [0.0]  # only evaluations take time
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    writer, left = ListWriter(), TimeLeft(EpisodeSchedule(4, episodes=2))

    def evaluate(model):
        with left.evaluation():
            clock[0] += 0.1
        return {}

    evaluation = EvaluationHook("evaluate", evaluate, Evaluations(), stage="average")
    trainer = tiny.trainer(4, episodes=2)
    trainer.register_hooks([MetricsHook([writer], 1, left), evaluation])
    steps = [g for g in evaluation.due_steps() for _ in range(2)]
    left.expect(steps, after_row=True)
    trainer.train()
    # The last rows know how long an evaluation takes.
    assert [row["eta_seconds"] for row in writer.rows][2:] == pytest.approx([0.2, 0.2])


def test_a_name_that_was_not_put_lately_is_not_repeated(tiny):
    class Once(HookBase):
        def before_step(self):
            if self.trainer.iter == 1:
                self.trainer.storage.put_scalar("once", 1)

    writer = ListWriter()
    trainer = tiny.trainer(8)
    trainer.register_hooks([Once(), MetricsHook([writer], 4, TimeLeft(trainer.schedule))])
    trainer.train()
    assert ["once" in row for row in writer.rows] == [True, False]


def test_metrics_json_is_detectron2s_format(tiny, tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    build(tiny, [JSONWriter(path)]).train()
    rows = read_rows(path, without=())
    assert [row["iteration"] for row in rows] == [3, 7, 9]
    assert {"episode", "member", "t", "total_loss", "lr", "time", "data_time"} <= rows[0].keys()
    assert rows[-1]["eta_seconds"] == 0
    assert rows[0]["peak_memory_mb"] > 10


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    writer = JSONWriter(tmp_path / "metrics.json")
    writer.open(0)
    writer.write({"iteration": 0, "a": float("nan"), "b": float("-inf"), "c": 1.5})
    writer.close()
    assert read_rows(writer.path) == [{"iteration": 0, "a": None, "b": None, "c": 1.5}]


@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_resumed_metrics_equal_those_of_a_run_without_interruption(tiny, tmp_path, step):
    """The stopped run wrote rows after its checkpoint, and half a line."""
    path, save = tmp_path / "metrics.json", tiny.SaveAt(step)
    build(tiny, [JSONWriter(path)], hooks=[save]).train()
    expected = read_rows(path)
    with path.open("a") as file:
        file.write('{"iteration": 10, "total')
    resumed = build(tiny, [JSONWriter(path)], hooks=[tiny.SaveAt(None)])
    resumed.load_state_dict(save.read())
    resumed.train()
    assert read_rows(path) == expected


@needs_fork
def test_a_resume_inside_a_period_keeps_the_numbers_of_every_rank(tiny, tmp_path):
    """Checkpoints are written by one rank, and the row is the mean over ranks."""

    def losses_of_rows(rank, start=None):
        save, writer = tiny.SaveAt(5), ListWriter()
        method = tiny.method(norm=False)  # running statistics are each rank's own
        launch.distribute(method, Ranks.of_run())
        batches = tiny.batches(EpisodeSchedule(10), rank=rank, world_size=2)
        options = {"method": method, "batches": batches, "period": 4}
        trainer = build(tiny, [writer], hooks=[save], **options)
        if start is not None:
            trainer.load_state_dict(start)
        trainer.train()
        return [row["total_loss"] for row in writer.rows], save

    def train(rank):
        whole, save = losses_of_rows(rank)
        # As resuming does: every rank reads the file that the first one wrote.
        state = Ranks.of_run().run.all_gather(save.read())[0]
        rest, _ = losses_of_rows(rank, state)
        return [whole, rest]

    (whole, rest), _ = on_two_ranks(train, tmp_path)
    assert len(whole) == 3
    assert rest == whole[1:]


def test_more_ranks_than_wrote_a_checkpoint_begin_with_nothing(tiny):
    trainer = build(tiny, [], iterations=2)
    state = {"last_row": -1, "recent": [[], [["loss", True, [[5.0, 0]]]]], "writers": {}}
    trainer.hooks[1].load_state_dict(state)
    assert not trainer.storage.histories()
    trainer.hooks[1].load_state_dict({**state, "recent": []})


def test_a_new_run_starts_an_empty_file(tiny, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 99}\n')
    build(tiny, [JSONWriter(path)]).train()
    assert [row["iteration"] for row in read_rows(path)] == [3, 7, 9]


def test_a_new_run_that_fails_before_its_first_row_leaves_the_old_rows(tiny, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 99}\n')
    method = tiny.method()
    method.losses = lambda batch, t: {}
    with pytest.raises(ValueError, match="no loss"):
        build(tiny, [JSONWriter(path)], method=method).train()
    assert read_rows(path) == [{"iteration": 99}]


def test_rows_that_are_missing_are_reported(tmp_path, caplog):
    writer = JSONWriter(tmp_path / "metrics.json")
    writer.path.write_text('{"iteration": 3}\n{"itera')
    writer.load_state_dict({"length": 100})
    writer.open(8)
    writer.write({"iteration": 8})
    writer.close()
    assert "24 of the 100 bytes" in caplog.text
    assert read_rows(writer.path) == [{"iteration": 3}, {"iteration": 8}]


def test_evaluations_are_written_as_rows(tiny, tmp_path):
    writer = JSONWriter(tmp_path / "metrics.json")
    options = {"stage": "average", "writers": [writer]}
    evaluation = EvaluationHook("evaluate", lambda model: {"AP": 12.5}, Evaluations(), **options)
    build(tiny, [writer], period=10, hooks=[evaluation], iterations=4).train()
    assert read_rows(writer.path)[1:] == [
        {
            "iteration": 3,
            "episode": 0,
            "member": None,
            "t": 3,
            "average/student/AP": 12.5,
            "average/teacher/AP": 12.5,
        }
    ]


def test_tensorboard_hides_what_earlier_runs_wrote_later(tmp_path):
    # A run, another one that overwrites it, and the rest of that one after a stop.
    for start, rows in ((0, range(9)), (0, range(4)), (2, [2])):
        writer = TensorBoardWriter(tmp_path)
        writer.open(start)
        for step in rows:
            writer.write({"iteration": step, "member": None, "loss": 10.0 * start + step})
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 22)]
    assert events.Tags()["scalars"] == ["loss"]


@pytest.fixture(autouse=True)
def count_files_anew(monkeypatch):
    # Files of one second and process are read in the order of their numbers as text: 9 after 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def points(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_no_point_comes_twice_when_an_evaluation_is_made_up_for(tmp_path):
    known = {}
    # A checkpoint after step 1, then an evaluation of it and step 2 that a kill makes unknown; the
    # same again from that checkpoint; then a finished run, resumed twice.
    sessions = [(0, 3, [2]), (2, 3, [1, 2]), (2, 4, [1, 3]), (4, 4, [1, 3]), (4, 4, [1, 3])]
    for start, end, evaluated in sessions:
        writer = TensorBoardWriter(tmp_path)
        writer.load_state_dict(known.get(start, {}))
        writer.open(start)
        if start:
            writer.write({"iteration": start - 1, "AP": 1.0})
        for step in range(start, end):
            writer.write({"iteration": step, "loss": 1.0})
            known[step + 1] = writer.state_dict()
        if end > start:
            writer.write({"iteration": end - 1, "AP": 1.0})
        writer.close()
        assert points(tmp_path) == {"AP": evaluated, "loss": list(range(end))}


def test_curves_of_members_at_once_stand_apart_and_those_of_averages_do_not(tmp_path):
    writer = TensorBoardWriter(tmp_path, by_member=True)
    writer.open(0)
    for member in (0, 1, None):
        writer.write({"iteration": 3, "member": member, "loss": 1.0})
    writer.close()
    assert (
        points(tmp_path).items() >= {"member0/loss": [3], "member1/loss": [3], "loss": [3]}.items()
    )


def test_a_folder_that_is_gone_is_reported_once(tmp_path, capfd):
    """TensorBoard writes in a thread, whose traceback would stand beside the line of the error."""
    folder, before = tmp_path / "run", threading.excepthook
    writer = TensorBoardWriter(folder)
    writer.open(0)
    writer.write({"iteration": 0, "loss": 1.0})
    writer.state_dict()
    shutil.rmtree(folder)
    writer.write({"iteration": 1, "loss": 1.0})
    with pytest.raises(FileNotFoundError):
        writer.state_dict()
    with pytest.raises(FileNotFoundError):
        writer.close()
    assert threading.excepthook is before
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_that_has_nothing_to_say_leaves_no_file(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.open(4)
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_run_resumed_from_another_folder_removes_nothing_here(tmp_path):
    first = TensorBoardWriter(tmp_path)
    first.open(0)
    first.write({"iteration": 0, "loss": 1.0})
    first.close()
    other = TensorBoardWriter(tmp_path)
    other.load_state_dict({"lengths": {"events.out.tfevents.1.host": 100}})
    other.open(1)
    assert points(tmp_path) == {"loss": [0]}


def test_ranks_are_averaged_and_the_slowest_counts():
    rows = [
        {"iteration": 4, "t": 2, "total_loss": 1.0, "time": 0.5},
        {"iteration": 4, "t": 2, "total_loss": 2.0, "time": 0.7, "only": 3.0},
    ]
    assert _over_ranks(rows) == {
        "iteration": 4,
        "t": 2,
        "total_loss": 1.5,
        "time": 0.7,
        "only": 3.0,
    }


def test_writers_are_closed_when_training_fails(tiny, tmp_path):
    method = tiny.method()
    method.losses = lambda batch, t: {}
    writer = JSONWriter(tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="no loss"):
        build(tiny, [writer], method=method).train()
    with pytest.raises(RuntimeError, match="is not open"):
        writer.write({"iteration": 0})


def test_bad_period_is_an_error():
    with pytest.raises(ValueError, match="period = 0 is not allowed"):
        MetricsHook([], 0, TimeLeft(EpisodeSchedule(1)))
