"""Mutated files of both tasks: each gives a sound data set or one line that names the file."""

import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import as_json, both_profiles, damaged, limited_memory, outcome, trees
from PIL import Image

from ssod_imwa.classification.data.catalog import image_fingerprint, load_images
from ssod_imwa.classification.data.reports import check_images
from ssod_imwa.data.image_files import image_size, read_image
from ssod_imwa.detection.data.catalog import content_fingerprint, load_dataset
from ssod_imwa.detection.data.reports import check_dataset
from ssod_imwa.detection.data.split_files import read_index_file, stored_positions
from ssod_imwa.errors import one_line

IMAGES = [{"id": i, "file_name": f"{i}.png", "width": 12, "height": 9} for i in range(3)]
COCO = {
    "images": IMAGES,
    "annotations": [
        {"id": i, "image_id": i % 3, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}
        for i in range(4)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dög"}],
}
XML = """<?xml version="1.0" encoding="utf-8"?>
<annotation><size><width>12</width><height>9</height><depth>3</depth></size>
<object><name>dög</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax>
<ymax>6</ymax></bndbox></object><object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>5</xmax><ymax>6</ymax></bndbox></object></annotation>"""
BBN = {"annotations": [{"fpath": f"{i}.png", "category_id": i % 2} for i in range(3)]}
NATURALIST = {
    "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
    "annotations": [{"image_id": i, "category_id": i % 2} for i in range(3)],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for place in ("images", "voc/JPEGImages", "voc/Annotations", "voc/ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (12, 9)).save(folder / "images" / f"{i}.png")
    Image.new("RGB", (12, 9)).save(folder / "voc/JPEGImages/a.jpg")
    Image.new("RGB", (12, 9)).save(folder / "voc/JPEGImages/a 1.jpg")
    (folder / "voc/ImageSets/Main/all.txt").write_text("a\n")
    (folder / "voc/Annotations/a 1.xml").write_text(XML)
    return folder


@pytest.fixture(autouse=True)
def strict():
    """No file takes 2 GB, and none makes a library warn, whose lines name no file."""
    with limited_memory(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_limit_on_memory_bites():
    with pytest.raises(MemoryError):
        bytearray(3 << 30)


def check_detection(name, root, *names):
    """Read a data set under both policies, and check it; what is read can be trained on."""
    for policy in ("error", "skip"):
        dataset = outcome(lambda p=policy: load_dataset(name, root=root, on_bad_record=p), *names)
        if dataset is None:
            continue
        assert len(dataset)
        assert len(set(dataset.classes)) == len(dataset.classes) > 0
        assert len({record.image_id for record in dataset.records}) == len(dataset)
        for record in dataset.records:
            boxes, labels = record.annotations.boxes, record.annotations.labels
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert ((boxes >= 0) & (boxes <= [record.width, record.height] * 2)).all()
            assert set(labels.tolist()) <= set(range(len(dataset.classes)))
        content_fingerprint(dataset)
    report = outcome(lambda: check_dataset(name, root=root), *names)
    assert report is None or all(line.isprintable() for line in report.lines)


def check_classification(name, root, *names):
    dataset = outcome(lambda: load_images(name, root=root), *names)
    if dataset is not None:
        assert len(dataset)
        assert min(dataset.counts) > 0
        image_fingerprint(dataset)
    report = outcome(lambda: check_images(name, root=root), *names)
    assert report is None or all(line.isprintable() for line in report.lines)


@both_profiles
@pytest.mark.parametrize("labeled", [True, False])
def test_coco(root, profile, labeled):
    @profile
    @given(trees(COCO).map(as_json).flatmap(damaged))
    def each(content):
        (root / "zebra.json").write_bytes(content)
        name = "coco:zebra.json:images"
        if labeled:
            check_detection(name, root, "zebra.json", "images/")
        else:
            read = lambda: load_dataset(name, root=root, labeled=False)  # noqa: E731
            dataset = outcome(read, "zebra.json", "images/")
            assert dataset is None or len(dataset)

    each()


@st.composite
def documents(draw):
    """XML with elements taken out, doubled or moved, and other texts and names."""
    tree = ElementTree.fromstring(XML)
    texts = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=6)
    texts |= st.sampled_from(["-1", "1e400", "1e300", "nan", "True", "0.5", "", "9" * 30, "1_0"])
    for _ in range(draw(st.integers(1, 3))):
        parents = [node for node in tree.iter() if len(node)]
        parent = draw(st.sampled_from(parents or [tree]))
        child = draw(st.sampled_from(list(parent) or [tree]))
        how = draw(st.sampled_from(["text", "text", "tag", "remove", "double", "attribute"]))
        if how == "text":
            child.text = draw(texts)
        elif how == "tag":
            child.tag = draw(st.sampled_from(["object", "name", "xmin", "size", "x"]))
        elif how == "remove" and len(parent):
            parent.remove(child)
        elif how == "double" and child is not tree:
            parent.append(child)
        else:
            child.set("x", draw(texts))
    encoding = draw(st.sampled_from(["utf-8", "gb2312", "latin-1", "utf-16", "koi8-r", "cp1252"]))
    return ElementTree.tostring(tree, encoding=encoding)


@both_profiles
@pytest.mark.parametrize("labeled", [True, False])
def test_voc(root, profile, labeled):
    @profile
    @given(documents().flatmap(damaged))
    def each(content):
        (root / "voc/Annotations/a.xml").write_bytes(content)
        if labeled:
            check_detection("voc:voc:all", root, "a.xml", "a.jpg")
        else:
            assert len(load_dataset("voc:voc:all", root=root, labeled=False)) == 1

    each()


@both_profiles
def test_lists(root, profile):
    lines = ["0.png 0", "1.png 1", "2.png 0"]
    other = st.text(alphabet="a01 .\t\n\r-/é\u2028\x0b", max_size=12)
    texts = st.lists(st.sampled_from([*lines, "a", "a 1", "a  -1", ""]) | other, max_size=5)
    (root / "voc/Annotations/a.xml").write_text(XML)

    @profile
    @given(texts.map("\n".join).map(str.encode).flatmap(damaged))
    def each(content):
        (root / "zebra.txt").write_bytes(content)
        check_classification("list:zebra.txt:images", root, "zebra.txt")
        (root / "voc/ImageSets/Main/zebra.txt").write_bytes(content)
        check_detection("voc:voc:zebra", root, "zebra", "JPEGImages", "Annotations")

    each()


@both_profiles
@pytest.mark.parametrize("content", [BBN, NATURALIST], ids=["BBN", "iNaturalist"])
def test_json_lists(root, profile, content):
    @profile
    @given(trees(content).map(as_json).flatmap(damaged))
    def each(content):
        (root / "zebra.json").write_bytes(content)
        check_classification("list:zebra.json:images", root, "zebra.json")

    each()


@both_profiles
def test_split_files(root, profile):
    (root / "coco.json").write_bytes(as_json(COCO))
    images = load_dataset("coco:coco.json:images", root=root)
    index = {"meta": {"images": 3, "dataset": "x"}, "50.0": {"1": [0, 2], "2": [1]}}

    @profile
    @given(trees(index).map(as_json).flatmap(damaged))
    def each(content):
        file = root / "zebra.json"
        file.write_bytes(content)

        def read():
            return stored_positions(read_index_file(file), file, images, percent=50, fold=1)

        positions = outcome(read, "zebra.json")
        assert positions is None or set(positions) <= {0, 1, 2}

    each()


@both_profiles
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "bmp"])
def test_images(root, profile, kind):
    warnings.simplefilter("ignore")  # Pillow's, of entries of headers that it leaves out
    file = root / f"zebra.{kind}"
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, exif=exif)
    content = file.read_bytes()

    @profile
    @given(damaged(content).flatmap(damaged))
    def each(content):
        file.write_bytes(content)
        pixels = outcome(lambda: read_image(str(file)), file.name)
        assert pixels is None or (pixels.ndim == 3 and len(pixels) == 3)
        for whole in (True, False):
            outcome(lambda w=whole: image_size(file, whole=w), file.name)

    each()


@both_profiles
def test_names(root, profile):
    texts = st.text(max_size=5) | st.sampled_from(["x" * 300, "a\0b", "\ud800", "..", "/", "zebra"])
    kinds = st.sampled_from(["coco", "voc", "folder", "list", "bccd_train", "digit_images_train"])

    @profile
    @given(kinds, st.lists(texts, max_size=3))
    def each(kind, places):
        name = ":".join([kind, *places])
        shown = one_line(name), repr(name)[1:-1]
        for read in (load_dataset, load_images):
            outcome(lambda r=read: r(name, root=root), *shown, str(root), *places)

    each()
