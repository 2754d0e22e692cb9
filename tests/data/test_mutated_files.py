"""Mutated annotation files: each gives a data set or one line that names the file."""

import copy
import json
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ssod_imwa.classification.data.catalog import load_images
from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.errors import UserError

MUTATED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", " ", "1", "true", "64.0", "../../x", "a\x00b", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 12, "height": 9} for i in range(3)],
    "annotations": [
        {"id": i, "image_id": i % 3, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}
        for i in range(4)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
XML = """<?xml version="1.0" encoding="utf-8"?>
<annotation><size><width>12</width><height>9</height></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax>
<ymax>6</ymax></bndbox></object></annotation>"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for place in ("images", "voc/JPEGImages", "voc/Annotations", "voc/ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (12, 9)).save(folder / "images" / f"{i}.png")
    Image.new("RGB", (12, 9)).save(folder / "voc/JPEGImages/a.jpg")
    return folder


@pytest.fixture(scope="module", autouse=True)
def memory():
    """No file makes the process grow by 2 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KB


def places(tree, path=()):
    """Paths to all values of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def replaced(tree, path, value, *, delete):
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if delete:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


def check(read, *names):
    """Reading gives a data set, or one line with the name of the file."""
    try:
        size, message = len(read()), None
    except UserError as error:
        size, message = 0, str(error)
    assert size or message is not None
    assert message is None or "\n" not in message
    assert message is None or any(name in message for name in names), message


@MUTATED
@given(st.data())
def test_coco(root, data):
    path = data.draw(st.sampled_from(list(places(COCO))))
    value, delete = data.draw(VALUES), data.draw(st.booleans())
    file = root / "zebra.json"
    file.write_text(json.dumps(replaced(COCO, path, value, delete=delete)))
    for policy in ("error", "skip"):
        check(
            lambda p=policy: load_dataset("coco:zebra.json:images", root=root, on_bad_record=p),
            "zebra.json",
            "images/",
        )


@MUTATED
@given(st.data())
def test_voc(root, data):
    texts = ["12", "9", "cat", "0", "1", "utf-8", "object", "xmin", "<bndbox>", "</name>", "?>"]
    target = data.draw(st.sampled_from(texts))
    value = data.draw(
        st.text(max_size=6) | st.sampled_from(["-1", "1e400", "nan", "gb2312", "&x;"])
    )
    content = XML.replace(target, value, 1).encode("utf-8", "surrogatepass")
    cut = data.draw(st.integers(0, len(content)))
    content = content[:cut] if data.draw(st.integers(0, 4)) == 0 else content
    file = root / "voc/Annotations/a.xml"
    file.write_bytes(content)
    (root / "voc/ImageSets/Main/all.txt").write_text("a\n")
    for policy in ("error", "skip"):
        check(
            lambda p=policy: load_dataset("voc:voc:all", root=root, on_bad_record=p),
            "a.xml",
            "a.jpg",
            "Annotations",
        )


@MUTATED
@given(st.binary(max_size=40) | st.text(alphabet="a01 .\t\n-/é", max_size=40).map(str.encode))
def test_lists(root, content):
    file = root / "list.txt"
    file.write_bytes(content)
    check(lambda: load_images("list:list.txt:images", root=root), "list.txt")
    main = root / "voc/ImageSets/Main/mutated.txt"
    main.write_bytes(content)
    (root / "voc/Annotations/a.xml").write_text(XML)
    check(
        lambda: load_dataset("voc:voc:mutated", root=root),
        "mutated",
        "JPEGImages",
        "Annotations",
    )


@MUTATED
@given(st.data())
def test_json_lists(root, data):
    content = {"annotations": [{"fpath": "0.png", "category_id": 0}], "images": []}
    path = data.draw(st.sampled_from(list(places(content))))
    value, delete = data.draw(VALUES), data.draw(st.booleans())
    file = root / "list.json"
    file.write_text(json.dumps(replaced(content, path, value, delete=delete)))
    check(lambda: load_images("list:list.json:images", root=root), "list.json")
