import ast
import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from ssod_imwa.cli import (
    PlainConsole,
    log_to_stderr,
    print_table,
    require_folder,
    require_new,
    run_main,
    split_config_file,
)
from ssod_imwa.errors import DataError, OutputError, UserError, writing

ROOT = Path(__file__).parents[1]


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_exit_status_is_what_main_returns(returned, status):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: returned)
    assert stop.value.code == status


@pytest.mark.parametrize(("is_terminal", "lines"), [(False, 1), (True, 4)])
def test_a_table_loses_nothing_on_a_narrow_page(is_terminal, lines):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=30, color_system=None)
    table = Table(show_header=False)
    table.add_row("four words to wrap", *["12.34"] * 12)
    print_table(table, console)
    text = console.file.getvalue()
    assert text.count("12.34") == 12
    assert {"four", "words", "to", "wrap"} <= set(text.split())
    assert len(text.splitlines()) == 2 + lines


def test_a_table_shows_names_as_they_are():
    console = PlainConsole(file=io.StringIO(), width=80)
    table = Table(title="on voc:raccoon:x")
    table.add_column("AP-[bold]\x1b[2J")
    table.add_row(":raccoon: [red]x[/red]")
    print_table(table, console)
    text = console.file.getvalue()
    for name in ("voc:raccoon:x", "AP-[bold]\\x1b[2J", ":raccoon: [red]x[/red]"):
        assert name in text


@pytest.fixture
def _root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("_root_logger")
def test_a_log_line_stays_whole_in_a_file(capsys):
    log_to_stderr()
    logging.getLogger("x").info("word " * 60)
    logging.getLogger("x").debug("not shown")
    line, end = capsys.readouterr().err.split("\n")
    assert line.endswith("INFO     " + "word " * 60)
    assert end == ""


def test_a_user_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(raising(DataError("no such data")))
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: no such data\n")


def test_an_interruption_is_status_130(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(raising(KeyboardInterrupt()))
    assert stop.value.code == 130


SLOW_IMPORTS = """
import ssod_imwa.interruptible
import os, signal
if {during_imports}:
    os.kill(os.getpid(), signal.SIGINT)
from ssod_imwa.cli import run_main
run_main(lambda: os.kill(os.getpid(), signal.SIGINT))
"""


@pytest.mark.parametrize(("during_imports", "code"), [(True, -signal.SIGINT), (False, 130)])
def test_an_interruption_leaves_no_traceback_wherever_it_comes(during_imports, code):
    script = SLOW_IMPORTS.format(during_imports=during_imports)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == ("" if during_imports else "interrupted\n")


@pytest.mark.parametrize("tool", sorted(ROOT.glob("tools/*.py")), ids=lambda path: path.stem)
def test_tools_are_interruptible_before_they_import_anything_slow(tool):
    modules = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse(tool.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    slow = [name for name in modules if name.split(".")[0] not in sys.stdlib_module_names]
    assert slow[0] == "ssod_imwa.interruptible"


@pytest.mark.slow  # some seconds of imports each
@pytest.mark.parametrize("name", ["extract_features", "predict", "visualize"])
def test_help_comes_without_warnings_of_libraries(name):
    tool = ROOT / "tools" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, tool, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {tool.name}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("length", [1, 100_000])  # fails at the end, and at once
def test_standard_output_that_cannot_be_written_is_one_line(length):
    code = f"from ssod_imwa.cli import run_main; run_main(lambda: print('x' * {length}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    line = "error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, line)
    piped = f"'{sys.executable}' -c \"{code}\" | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(OSError, match="nobody's"):
        run_main(raising(OSError(28, "nobody's")))
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))


def test_what_follows_config_file_is_files_then_pairs():
    assert split_config_file(["a.yaml"]) == (["a.yaml"], [])
    split = (["a.yaml", "b.yaml"], ["SEED", "3", "MODEL.DETECTRON2.CONFIG", "x.yaml"])
    assert split_config_file(["a.yaml", "b.yaml", *split[1]]) == split
    assert split_config_file(["a.yaml", "b.yaml"], split[1]) == split
    assert split_config_file(["a.yaml", "b.yaml", *split[1][:2]], split[1][2:]) == split


def test_what_follows_an_option_of_its_own_is_no_file():
    split = (["a.yaml"], ["SEED", "3", "b.yaml", "4"])
    assert split_config_file(["a.yaml", "SEED", "3"], ["b.yaml", "4"], option="--opts") == split
    with pytest.raises(UserError, match="SEED is set twice, after --config-file and --opts"):
        split_config_file(["a.yaml", "SEED", "3"], ["SEED", "4"], option="--opts")


@pytest.mark.parametrize(
    ("named", "overrides", "message"),
    [
        (["a.yml"], [], "a.yml is neither a file that ends in .yaml nor a key"),
        (["a.yaml", "configs/b.yml", "SEED", "3"], [], "configs/b.yml is neither a file"),
        (["a.yaml", "seed", "3"], [], "seed is neither"),
        (["a.yaml", "SEED", "OUTPUT_DIR", "out"], [], "out is neither"),
        (["a.yaml", "SEED", "3", "b.yaml"], [], "b.yaml: files follow --config-file, before"),
        (["a.yaml"], ["b.yaml"], "b.yaml: files follow --config-file, before"),
        (["SEED", "3"], [], "--config-file SEED: no file that ends in .yaml is named"),
        (["a.yaml", "SEED", "3"], ["SEED", "4"], "SEED is set twice"),
    ],
)
def test_a_command_line_that_mixes_files_and_pairs_up_is_refused(named, overrides, message):
    with pytest.raises(UserError) as caught:
        split_config_file(named, overrides)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_there_is_never_written_over(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="is there already"):
            require_new(path)
    for path in (tmp_path / "x", tmp_path / "new" / "deep" / "x"):
        require_new(path)
        require_folder(path)
    require_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("require", [require_new, require_folder])
def test_a_place_that_takes_nothing_is_named_with_the_reason(tmp_path, require):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    place = tmp_path / "link"
    with pytest.raises(OutputError) as caught:
        require(place / "x")
    assert str(caught.value) == f"{place}/x cannot be written: {place}: No such file or directory"


def test_a_folder_that_cannot_be_made_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x.png"
    with pytest.raises(OutputError) as caught, writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    assert str(caught.value) == f"{path} cannot be written: {path.parent}: Not a directory"


def test_an_error_of_other_work_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"), writing("x"):
        raise ValueError("ours")
