"""What every command line of `tools/` shares."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from ssod_imwa.errors import UserError, printable, writing

# Noise of libraries that a user can do nothing about: torchvision's import and the argument of
# DistributedDataParallel under torch >= 2.14, and five lines about every COCO evaluation.
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_NO_READER = 141  # 128 + SIGPIPE


def require_new(output: Path) -> None:
    """Refuse to write over a file, which may be the very model that is read, or where none can be.

    Belongs before long work.

    Raises:
        UserError: the path exists.
        OutputError: nothing can be written there.
    """
    if os.path.lexists(output):
        raise UserError(f"{output} is there already (remove it, or choose another --output)")
    _require_writable(output, output.parents)


def require_folder(output: Path) -> None:
    """Refuse a folder that cannot be made, or in which nothing can be written; before long work.

    Raises:
        OutputError: says so, with the reason.
    """
    _require_writable(output, (output, *output.parents))


def _require_writable(output: Path, places: Iterable[Path]) -> None:
    place = next(path for path in places if os.path.lexists(path))
    with writing(output):
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:  # of a file whose name means nothing to a user
            raise OSError(error.errno, error.strerror, str(place)) from error


@contextmanager
def new_folder(output: Path) -> Iterator[None]:
    """Inside, there is a folder, which goes with all that is in it if the work fails.

    What an interruption leaves stays, as it may have taken hours.

    Raises:
        OutputError: it cannot be made.
    """
    above = [path for path in output.parents if not path.exists()]
    with writing(output):
        output.mkdir(parents=True)
    try:
        yield
    except Exception:
        shutil.rmtree(output, ignore_errors=True)
        for path in above:
            with suppress(OSError):  # somebody else has put something there
                path.rmdir()
        raise


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Add --import, whose modules are `modules` of the parsed arguments, for `import_modules`."""
    parser.add_argument(
        "--import",
        dest="modules",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="import these first, which register data sets (as DATASETS.IMPORT)",
    )


def split_config_file(
    named: Sequence[str], overrides: Sequence[str] = (), *, option: str = ""
) -> tuple[list[str], list[str]]:
    """The files and the KEY VALUE pairs of a command line.

    Args:
        named: what follows `--config-file`: names that end in .yaml, then KEY VALUE pairs if any.
        overrides: the pairs that stand elsewhere.
        option: after which they do; "" if they may stand anywhere, so that a file may be meant.

    Raises:
        UserError: there is no file, a name that should be a file's does not end in .yaml or comes
            after a pair, or a key is set both after `--config-file` and elsewhere.

    Example:
        >>> split_config_file(["a.yaml", "b.yaml", "SEED", "3"])
        (['a.yaml', 'b.yaml'], ['SEED', '3'])
    """
    files = list(itertools.takewhile(_is_file_name, named))
    pairs = list(named[len(files) :])
    for name in (*pairs[::2], *(() if option else overrides[::2])):
        if _is_file_name(name):
            raise UserError(f"{name}: files follow --config-file, before KEY VALUE pairs")
        if name != name.upper():  # keys are upper case: b.yml, c.yaml.bak, a folder
            raise UserError(f"{name} is neither a file that ends in .yaml nor a key")
    if not files:
        raise UserError(f"--config-file {' '.join(named[:1])}: no file that ends in .yaml is named")
    for key in pairs[::2]:
        if key in overrides[::2]:  # argparse does not tell which was first
            other = option or "elsewhere"
            raise UserError(f"{key} is set twice, after --config-file and {other}")
    return files, [*pairs, *overrides]


def refuse_settings(overrides: Sequence[str], instead: Mapping[str, str]) -> None:
    """Refuse KEY VALUE pairs of --opts that would change nothing.

    Args:
        overrides: the pairs.
        instead: such a key -> what does what it seems to.

    Raises:
        UserError: one is there.

    Example:
        >>> refuse_settings(["SEED", "3"], {"MODEL.WEIGHTS": "--weights"})
    """
    for key in overrides[::2]:
        if key in instead:
            raise UserError(f"--opts {key} is not read here (give {instead[key]})")


def _is_file_name(name: str) -> bool:
    return name.endswith(".yaml")


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send log lines to standard error: colored on a terminal, one plain line each elsewhere.

    Rich would break the lines of a file at 80 columns, where grep finds them no more.
    """
    console = Console(stderr=True)
    handler: logging.Handler = logging.StreamHandler()
    line = "[%(asctime)s] %(levelname)-8s %(message)s"
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%H:%M:%S]")
        line = "%(message)s"
    handler.setFormatter(_PrintableFormatter(line, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters, which names of files and classes may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class PlainConsole(Console):
    """Prints strings as they are: rich takes a class named [bold] or :x: for markup.

    Control characters are escaped.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(printable(text), *args, **options)


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table whole: a file gets its full width, a narrow terminal wraps what does not fit.

    Left to itself, rich takes 80 columns for a file and cuts off what is beyond the last.
    """
    console = console or PlainConsole()
    # Measured on a page without an edge.
    widths = console.measure(table, options=console.options.update(max_width=sys.maxsize))
    console.width = max(console.width, widths.minimum if console.is_terminal else widths.maximum)
    console.print(table)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave the process with its exit status (None counts as 0).

    A `UserError` becomes one line, ``error: ...``, on stderr and status 2, as argparse does for
    wrong arguments, and so does standard output that cannot be written. Where its reader has left,
    as `head` does, the status is 141 and nothing is said. Every other exception is a defect of ours
    and keeps its traceback.

    Example:
        >>> try:
        ...     run_main(lambda: 1)
        ... except SystemExit as stop:
        ...     print(stop.code)
        1
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `interruptible`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if not _is_of_stdout(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest of a buffer
        if isinstance(error, BrokenPipeError):
            sys.exit(EXIT_NO_READER)
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(status or 0)


def _is_of_stdout(error: OSError) -> bool:
    """Whether it says that standard output fails: an empty line to it has to fail as well."""
    if error.filename is not None:
        return False
    try:
        os.write(1, b"\n")
    except OSError as again:
        return again.errno == error.errno
    return False
