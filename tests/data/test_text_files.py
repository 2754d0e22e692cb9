import re

import pytest

from ssod_imwa.data.text_files import read_flag, read_json, read_text, read_xml
from ssod_imwa.errors import DataError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_without_its_byte_order_mark(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes("vögel\n".encode(encoding))
    assert read_text(tmp_path / "x.txt") == "vögel\n"


def test_text_in_another_encoding_is_refused_with_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes("a\nb\nvögel".encode("latin-1"))
    with pytest.raises(DataError, match=r"x.txt:3: is not UTF-8 text \(byte 0xf6"):
        read_text(tmp_path / "x.txt")


def test_a_wrong_byte_after_a_byte_order_mark_is_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\n\xf6 ab")
    with pytest.raises(DataError, match=r"x.txt:2: is not UTF-8 text \(byte 0xf6"):
        read_text(tmp_path / "x.txt")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_has_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=re.escape(f"{str(tmp_path / name)!r} cannot be read")):
        read_text(tmp_path / name)


def test_json_may_begin_with_a_byte_order_mark_and_drop_a_key(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "b": {"a": 2, "c": 3}}')
    assert read_json(tmp_path / "x.json", drop="a") == {"b": {"c": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "an object has the key 'a' twice"),
        ("[" * 200_000, "nested too deeply"),
        ("{", "is no JSON file"),
        ("1" * 5000, "is no JSON file"),
    ],
)
def test_bad_json_is_one_line(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["gb2312", "utf-8", "latin-1", "shift_jis", "utf-16"])
def test_xml_is_read_in_the_encoding_that_it_declares(tmp_path, encoding):
    text = "\u732b" if encoding not in ("latin-1",) else "vögel"
    document = f'<?xml version="1.0" encoding="{encoding}"?><a><name>{text}</name></a>'
    (tmp_path / "x.xml").write_bytes(document.encode(encoding))
    assert read_xml(tmp_path / "x.xml").findtext("name") == text


@pytest.mark.parametrize(
    "content",
    [
        b'<?xml version="1.0" encoding="klingon"?><a/>',
        b'<?xml version="1.0" encoding="gb2312"?><a>\xff\xff</a>',
        b"<a>",
        b"",
        b"\x00\x01",
    ],
)
def test_bad_xml_is_one_line_with_the_file(tmp_path, content):
    (tmp_path / "x.xml").write_bytes(content)
    with pytest.raises(DataError, match=r"x.xml is no annotation file") as caught:
        read_xml(tmp_path / "x.xml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "yes", 2, -1, "2", [], float("nan"), {}])
def test_what_is_no_flag_is_refused(value):
    with pytest.raises(ValueError, match="must be 0, 1, true or false"):
        read_flag(value)
