"""Mistakes of a user, as opposed to mistakes of ours."""

from collections.abc import Iterator
from contextlib import contextmanager


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
