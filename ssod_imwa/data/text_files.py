"""Text, JSON and XML files of other people: read without guessing, refused in one line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard
from xml.etree import ElementTree

from ssod_imwa.config.reader import fits_a_file
from ssod_imwa.errors import DataError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DECLARATION = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)["'][^>]*\?>""")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of one that begins with a byte order mark, without the mark.

    Raises:
        DataError: the file cannot be read, is in another encoding, or holds what no text holds;
            FileNotFoundError is left to the caller, who knows what the file is for.
    """
    text = _decoded(Path(path), _bytes(path))
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line}: is no text (it holds a byte of 0)")
    return text


def is_text(value: object) -> TypeGuard[str]:
    r"""Whether a value is a text that is not blank and that files and file systems can hold.

    Example:
        >>> [is_text(value) for value in ("owl", " ", "a\0", "\ud800", 7)]
        [True, False, False, False, False]
    """
    return fits_a_file(value) and bool(value.strip())


def folded(name: str) -> str:
    """A name of a class without what people write in two ways.

    Example:
        >>> folded(" Snowy  Owl") == folded("snowy owl ")
        True
    """
    return " ".join(name.casefold().split())


def name_bytes(name: str) -> bytes:
    """A name of a file as UTF-8, or as it stands on the disk where it is no UTF-8; for digests."""
    return name.encode("utf-8", "surrogateescape")


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # a byte of 0, or half of a character
        raise DataError(f"{str(path)!r} cannot be read (no file has such a name)") from error


def _decoded(path: Path, content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        # Counted without the mark, as the error's own bytes are.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: is not UTF-8 text (byte 0x{error.object[error.start]:02x}; save the "
            "file as UTF-8)"
        ) from error


def read_json(path: str | Path, *, drop: str | None = None) -> Any:
    """The content of a JSON file, in which no object may have a key twice.

    Args:
        path: of the file.
        drop: key that is left out of every object as it is parsed, to save memory.

    Raises:
        DataError: the file is no JSON text; FileNotFoundError is left to the caller.
    """
    text = _decoded(Path(path), _bytes(path))
    try:
        return json.loads(text, object_pairs_hook=_pairs_reader(drop))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise DataError(f"{path} is no JSON file: {reason}") from error


def _pairs_reader(drop: str | None) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise ValueError(f"an object has the key {twice!r} twice")
        if drop is not None:
            content.pop(drop, None)
        return content

    return read


def read_xml(path: str | Path) -> ElementTree.Element:
    """The root of an XML file in any encoding that Python knows.

    Raises:
        DataError: the file is missing, or no XML.
    """
    try:
        content = Path(path).read_bytes()
        try:
            return ElementTree.fromstring(content)
        except (ValueError, LookupError):
            # Expat knows few encodings; gb2312 and its like are decoded here.
            declaration = _DECLARATION.match(content)
            if declaration is None:
                raise
            text = content[declaration.end() :].decode(declaration[1].decode("ascii"))
            return ElementTree.fromstring(text)
    except (OSError, ValueError, LookupError, ElementTree.ParseError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no annotation file: {reason}") from error


def read_flag(value: object) -> bool:
    """A flag of an annotation file: 0 or 1, true or false, as number, JSON value or text.

    Raises:
        ValueError: it is something else, nothing included.

    Example:
        >>> [read_flag(value) for value in (1, 0.0, True, "1", "1.0", " False ")]
        [True, False, True, True, True, False]
    """
    text = value.strip().lower() if isinstance(value, str) else ""
    flag = {"true": True, "false": False}.get(text)
    if flag is not None:
        return flag
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1.0
    if number not in (0, 1):
        raise ValueError(f"{value!r} is not allowed (must be 0, 1, true or false)")
    return number == 1
