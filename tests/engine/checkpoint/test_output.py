"""Who may use an output directory, and what one process does for all ranks."""

import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist

from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.engine.checkpoint import output
from ssod_imwa.engine.checkpoint.atomic import WriteError
from ssod_imwa.engine.checkpoint.output import on_main, prepare_output, resume_files
from ssod_imwa.errors import CheckpointError, OutputError


def test_resume_files_are_found_by_name_newest_first(tmp_path):
    for name in (
        "model_0000009.pth", "model_0000010.pth", "model_10000000.pth", "model_final.pth",
        "model_0000011.pth.json", "model_0000012.pth.tmp.7", "model_13.pth", "xmodel_0000014.pth",
    ):  # fmt: skip
        (tmp_path / name).write_text("")
    assert list(resume_files(tmp_path)) == [10000000, 10, 9]
    assert resume_files(tmp_path / "nowhere") == {}


def test_used_directory_needs_resume_or_overwrite(line, stopped):
    with pytest.raises(CheckpointError, match=r"earlier run \(model_0000004.pth\).*--overwrite"):
        prepare_output(stopped)
    with pytest.raises(CheckpointError, match="contradict"):
        prepare_output(stopped, resume=True, overwrite=True)
    for option in ("resume", "overwrite"):
        before = line.names(stopped)
        with prepare_output(stopped, **{option: True}):
            assert line.names(stopped) == sorted([*before, "run.lock"])


@pytest.mark.parametrize("where", ["claiming", "telling the other ranks"])
def test_a_signal_while_the_directory_is_claimed_leaves_no_lock(tmp_path, monkeypatch, where):
    """It raises SystemExit where the lock is held and nobody has it yet."""
    name, owner = ("remove_stale_temporaries", output)
    if where != "claiming":
        name, owner = "all_gather", Group
    monkeypatch.setattr(owner, name, lambda *_: sys.exit(143))
    with pytest.raises(SystemExit):
        prepare_output(tmp_path)
    assert not (tmp_path / "run.lock").exists()


def test_new_directory_is_made_and_locked(tmp_path):
    lock = prepare_output(tmp_path / "a" / "b")
    with pytest.raises(CheckpointError, match="in use by process"):
        prepare_output(tmp_path / "a" / "b")
    lock.release()
    prepare_output(tmp_path / "a" / "b").release()


def test_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/folder cannot be written: Not a dir"):
        prepare_output(tmp_path / "file" / "folder")


def test_final_file_alone_marks_a_used_directory(line, tmp_path):
    line.build(tmp_path).train()
    for path in resume_files(tmp_path).values():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"earlier run \(model_averaged.pth\)"):
        prepare_output(tmp_path)


def test_alone_errors_pass_unchanged():
    assert on_main(lambda: 3, Group()) == 3
    with pytest.raises(ZeroDivisionError):
        on_main(lambda: 1 / 0, Group())


def describe(function, run):
    """A result or an error as text that a pipe can carry."""
    try:
        return repr(on_main(function, run))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail(error):
    raise error


def ranks(rank, folder, pipe):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    run = Ranks.of_run().run
    answers = [
        describe(lambda: f"from rank {rank}", run),
        describe(lambda: fail(WriteError("disk full")), run),
        describe(lambda: fail(KeyError("bug")), run),
    ]
    lock = prepare_output(folder / "run", run=run)
    answers.append("lock" if lock else "no lock")
    try:
        prepare_output(folder / "run", run=run)
    except CheckpointError as error:
        answers.append("in use" if "in use" in str(error) else str(error))
    if lock:
        lock.release()
    pipe.send(answers)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_get_one_result_and_one_error(tmp_path):
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses a GPU cannot be forked")
    context = multiprocessing.get_context("fork")  # spawning would import torch twice
    pipes, processes = [], []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=ranks, args=(rank, tmp_path, sender)))
        processes[-1].start()
        pipes.append(receiver)
    assert all(pipe.poll(60) for pipe in pipes)
    first, second = (pipe.recv() for pipe in pipes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert first[:2] == second[:2] == ["'from rank 0'", "WriteError: disk full"]
    assert first[2] == second[2] == "RuntimeError: rank 0 failed: KeyError('bug')"
    assert (first[3], second[3]) == ("lock", "no lock")
    assert first[4] == second[4] == "in use"
