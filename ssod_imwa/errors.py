"""Mistakes of a user, as opposed to mistakes of ours."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what is allowed.

    Command lines print it without a traceback and exit with status 2.
    """


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A data set is missing or broken."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class WeightsError(UserError):
    """Initial weights are missing, damaged or of another model."""


def one_line(text: str) -> str:
    r"""A text with its line breaks and other control characters escaped, fit for a terminal.

    Example:
        >>> one_line("vögel\x1b[31m\n")
        'vögel\\x1b[31m\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
