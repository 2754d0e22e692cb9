import io
import logging

import pytest
from rich.console import Console

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.engine import terminal
from ssod_imwa.engine.terminal import EvaluationProgress, TerminalWriter

ROW = {"iteration": 30, "total_loss": 0.5, "lr": 0.01, "time": 0.25, "eta_seconds": 3700.0}


def test_without_a_terminal_each_row_is_a_log_line(caplog):
    caplog.set_level(logging.INFO)
    schedule = EpisodeSchedule(100, episodes=5, members=2)
    writer = TerminalWriter(schedule, Console(file=io.StringIO()))
    writer.open(0)
    writer.write(ROW)
    metrics = {
        "average/teacher/AP": 41.234,
        "average/teacher/AP50": 60,
        "average/teacher/AP-cat": 1,
    }
    writer.write({"iteration": 39, **metrics})
    writer.close()
    assert [record.getMessage() for record in caplog.records] == [
        "episode 1/5  member 2/2  iteration 11/20  loss 0.5  lr 0.01  0.25 s/it  left 1:01:40",
        "episode 1/5  member 2/2  iteration 20/20  average teacher AP 41.23 AP50 60.00",
    ]


def test_pseudo_labels_stand_in_the_log_line(caplog):
    caplog.set_level(logging.INFO)
    writer = TerminalWriter(EpisodeSchedule(100), Console(file=io.StringIO()))
    for count in (0.0, 2.375):
        writer.write({"iteration": 9, "total_loss": 0.5, "pseudo_boxes": count})
    assert [line.split("  ")[-2:] for line in caplog.messages] == [
        ["loss 0.5", "pseudo-labels 0 an image"],
        ["loss 0.5", "pseudo-labels 2.38 an image"],
    ]


def test_an_evaluation_of_plain_training_says_nothing_of_averages(caplog):
    caplog.set_level(logging.INFO)
    writer = TerminalWriter(EpisodeSchedule(100), Console(file=io.StringIO()))
    writer.write({"iteration": 99, "average/student/AP": 40.0, "average/teacher/AP": 41.0})
    (line,) = caplog.messages
    assert line == "episode 1/1  member 1/1  iteration 100/100  student AP 40.00  teacher AP 41.00"


def test_a_mean_of_last_averages_is_named_in_plain_training(caplog):
    caplog.set_level(logging.INFO)
    writer = TerminalWriter(EpisodeSchedule(100), Console(file=io.StringIO()))
    writer.write({"iteration": 99, "lawa/student/AP": 40.0})
    assert caplog.messages[0].endswith("iteration 100/100  lawa student AP 40.00")


def test_on_a_terminal_there_is_a_progress_bar(caplog):
    caplog.set_level(logging.INFO)
    screen = io.StringIO()
    schedule = EpisodeSchedule(100, episodes=5, members=2)
    writer = TerminalWriter(schedule, Console(file=screen, force_terminal=True, width=120))
    writer.open(10)
    writer.write(ROW)
    writer.step(schedule.position(49))
    writer.write({"iteration": 39, "average/teacher/AP": 41.234})
    writer.close()
    assert not caplog.records
    for text in ("episode 2/5  member 1/2  iteration 10/20", "25%", "loss 0.5", "AP 41.23"):
        assert text in screen.getvalue()


def screen_of(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def test_names_reach_the_terminal_as_they_are():
    console = screen_of()
    writer = TerminalWriter(EpisodeSchedule(10), console)
    writer.open(0)
    writer.write({"iteration": 9, "average/student/voc:raccoon:x/[bold]AP\x1b[2J": 1.0})
    writer.close()
    assert "student voc:raccoon:x/[bold]AP\\x1b[2J 1.00" in console.file.getvalue()


def test_an_evaluation_has_a_bar_below_that_of_training():
    console = screen_of()
    progress = EvaluationProgress(console)
    writer = TerminalWriter(EpisodeSchedule(10), console, progress)
    writer.open(0)
    with progress.shown():
        progress(1, 4)
        progress(2, 4)
        writer._progress.refresh()
    writer.close()
    screen = console.file.getvalue()
    assert "starting" in screen
    assert "evaluating" in screen
    assert "50%" in screen
    assert "2 of 4 batches" in screen


def test_an_evaluation_without_training_has_a_bar_of_its_own():
    console = screen_of()
    progress = EvaluationProgress(console)
    for _ in range(2):  # a second display at once would be refused by rich
        with progress.shown():
            progress(3, 4)
            progress._bars.refresh()
    assert "75%" in console.file.getvalue()


def test_without_a_terminal_an_evaluation_says_now_and_then_how_far_it_is(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = iter([0.0, 59.0, 61.0, 61.0, 62.0, 122.0, 122.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    progress = EvaluationProgress(Console(file=io.StringIO()))
    with progress.shown():
        for done in range(1, 5):
            progress(done, 4)
    assert caplog.messages == ["evaluating: 2 of 4 batches", "evaluating: 4 of 4 batches"]


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text):
        raise OSError(5, "Input/output error")


# Of the thread that draws bars, which ends with the terminal.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_terminal_that_is_gone_ends_nothing():
    console = screen_of()
    progress = EvaluationProgress(console)
    writer = TerminalWriter(EpisodeSchedule(100), console, progress)
    writer.open(0)
    console.file = Gone()
    with progress.shown():
        progress(1, 2)
    writer.step(EpisodeSchedule(100).position(3))
    writer.write({"iteration": 3, "average/student/AP": 1.0})
    writer.write(ROW)
    writer.close()
    with progress.shown():
        progress(1, 2)


def test_rows_of_members_at_once_are_named_by_their_member(caplog):
    schedule = EpisodeSchedule(4, members=3, only=0)
    writer = TerminalWriter(schedule, Console(file=io.StringIO()))
    with caplog.at_level("INFO"):
        for member in (0, 2):
            writer.write({"iteration": 1, "member": member, "total_loss": 1.0})
        writer.write({"iteration": 3, "member": None, "average/student/AP": 1.0})
    named = [message.split("  ")[1] for message in caplog.messages]
    assert named == ["member 1/3", "member 3/3", "member 3/3"]
