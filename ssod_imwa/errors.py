"""Mistakes of a user, as opposed to mistakes of ours."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    r"""Bad input: one line that says what is wrong, where, and what is allowed.

    Command lines print it without a traceback and exit with status 2. What it quotes from files may
    hold anything, so line breaks and other control characters are escaped, see `one_line`.

    Example:
        >>> print(UserError("class 'a\nb' is not known"))
        class 'a\nb' is not known
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A data set is missing or broken."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class WeightsError(UserError):
    """Initial weights are missing, damaged or of another model."""


class NonFiniteError(UserError, FloatingPointError):
    """Training diverged: a loss, a gradient, weights or predictions became NaN or infinite."""


class OutputError(UserError):
    """A file or folder that a user named cannot be written."""


def one_line(text: str) -> str:
    r"""A text with its line breaks and other control characters escaped, fit for a terminal.

    Example:
        >>> one_line("vögel\x1b[31m\n")
        'vögel\\x1b[31m\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    r"""A text of several lines with all other control characters escaped.

    Example:
        >>> printable("a\x1b[31mb\nc")
        'a\\x1b[31mb\nc'
    """
    return "\n".join(map(one_line, text.split("\n")))


@contextmanager
def as_config_error(keys: str) -> Iterator[None]:
    """Inside, a ValueError of what is built becomes a ConfigError that names the keys of it.

    Example:
        >>> with as_config_error("CLS.MIX"):
        ...     raise ValueError("0 layers are not allowed (must be at least 1)")
        Traceback (most recent call last):
        ...
        ssod_imwa.errors.ConfigError: CLS.MIX: 0 layers are not allowed (must be at least 1)
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{keys}: {error}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, an OSError becomes an OutputError that names the path and the reason.

    Belongs around what writes and nothing else: other OSErrors are defects of ours.

    Args:
        path: what a user named; of a folder above it that is the reason, the name is there, too.

    Example:
        >>> with writing("/dev/null/page.html"):
        ...     Path("/dev/null/page.html").touch()
        Traceback (most recent call last):
        ...
        ssod_imwa.errors.OutputError: /dev/null/page.html cannot be written: Not a directory
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError):  # what mkdir says where a file is in the way
            reason = os.strerror(errno.ENOTDIR)
        is_above = error.filename and Path(os.fsdecode(error.filename)) in Path(path).parents
        place = f"{os.fsdecode(error.filename)}: " if is_above else ""
        raise OutputError(f"{path} cannot be written: {place}{reason}") from error
