import json

import numpy as np
import pytest

from ssod_imwa.detection.data.catalog import fingerprint
from ssod_imwa.detection.data.coco import load_coco
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.detection.data.split_files import (
    coco_content,
    coco_split_paths,
    part_of_coco,
    read_index_file,
    write_json,
)
from ssod_imwa.detection.data.splits import (
    draw,
    index_file_content,
    labeled_count,
    split_dataset,
    verify_coco_files,
    verify_index_file,
    with_boxes,
    with_integer_ids,
)
from ssod_imwa.errors import DataError, OutputError


def annotations(labels, crowd=False):
    count = len(labels)
    boxes = np.tile(np.float32([0, 0, 4, 4]), (count, 1))
    return Annotations(
        boxes, np.array(labels, dtype=np.int64), np.full(count, crowd), np.zeros(count, bool)
    )


@pytest.fixture
def dataset():
    """40 images in descending order of their ids; 10 have no box, 5 only a crowd."""
    records = []
    for image_id in range(40, 0, -1):
        boxes = annotations([image_id % 3] * (image_id % 4), crowd=image_id % 8 == 1)
        records.append(ImageRecord(f"{image_id}.png", image_id, 9, 9, boxes))
    return DetectionDataset("forty", tuple(records), ("a", "b", "c"))


def ids(dataset):
    return [record.image_id for record in dataset.records]


def test_counts_are_those_of_the_public_file():
    percents = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
    counts = [labeled_count(percent, 117266) for percent in percents]
    assert counts == [11, 117, 586, 1172, 2345, 5863, 11726]


def test_counts_are_exact_where_floating_point_is_not():
    assert int(29 / 100 * 100) == 28  # what plain arithmetic gives
    assert labeled_count(29.0, 100) == 29


@pytest.mark.parametrize("percent", [0, -1, 100.5, 0.1, float("nan")])
def test_percentages_that_label_no_image_are_refused(percent):
    with pytest.raises(DataError, match=r"is not allowed"):
        labeled_count(percent, 117)


def test_the_filtered_list_has_no_empty_and_no_crowd_image_and_is_sorted(dataset):
    expected = [i for i in range(1, 41) if i % 4 and i % 8 != 1]
    assert ids(with_boxes(dataset)) == expected
    backwards = dataset.subset(range(39, -1, -1))
    assert ids(with_boxes(backwards)) == expected


def test_a_split_is_a_partition_and_the_rest_has_no_labels(dataset):
    labeled, rest = split_dataset(dataset, percent=20, fold=3)
    assert len(labeled) == len(with_boxes(dataset)) // 5
    assert sorted(ids(labeled) + ids(rest)) == ids(with_boxes(dataset))
    assert all(record.annotations is not None for record in labeled.records)
    assert all(record.annotations is None for record in rest.records)


def test_empty_images_can_be_kept(dataset):
    labeled, rest = split_dataset(dataset, percent=20, fold=3, filter_empty=False)
    assert (len(labeled), len(rest)) == (8, 32)


def test_everything_may_be_labeled(dataset):
    labeled, rest = split_dataset(dataset, percent=100, fold=1)
    assert (ids(labeled), len(rest)) == (ids(with_boxes(dataset)), 0)


def test_a_draw_is_a_function_of_its_fold_and_nested_in_percent():
    assert draw(1000, percent=5, fold=1) == draw(1000, percent=5, fold=1)
    assert draw(1000, percent=5, fold=1) != draw(1000, percent=5, fold=2)
    assert set(draw(1000, percent=1, fold=1)) < set(draw(1000, percent=5, fold=1))
    # Written out: a changed draw would silently change what every recipe trains on.
    assert draw(1000, percent=0.5, fold=1) == [496, 734, 792, 840, 956]


def test_every_image_is_drawn_equally_often():
    counts = np.bincount(np.concatenate([draw(50, percent=20, fold=f) for f in range(2000)]))
    # Binomial with n = 2000, p = 0.2: standard deviation 17.9.
    assert np.abs(counts - 400).max() < 5 * 17.9


def test_a_split_does_not_depend_on_the_order_of_the_records(dataset):
    backwards = dataset.subset(range(39, -1, -1))
    one, _ = split_dataset(dataset, percent=20, fold=1)
    other, _ = split_dataset(backwards, percent=20, fold=1)
    assert fingerprint(one) == fingerprint(other)


@pytest.fixture
def index_file(dataset, tmp_path):
    path = tmp_path / "splits.json"
    write_json(path, index_file_content(dataset, percents=[10, 20], folds=[1, 2]))
    return path


def test_an_index_file_gives_the_split_that_was_drawn(dataset, index_file):
    for percent in (10, 20.0):
        for fold in (1, 2):
            stored = split_dataset(dataset, percent=percent, fold=fold, file=index_file)
            drawn = split_dataset(dataset, percent=percent, fold=fold)
            assert [ids(part) for part in stored] == [ids(part) for part in drawn]
    found = verify_index_file(dataset, index_file)
    assert [(percent, fold, len(part)) for percent, fold, part in found] == [
        (10, 1, 2),
        (10, 2, 2),
        (20, 1, 5),
        (20, 2, 5),
    ]


def test_an_index_file_remembers_that_empty_images_were_kept(dataset, tmp_path):
    path = tmp_path / "all.json"
    content = index_file_content(dataset, percents=[50], folds=[1], filter_empty=False)
    write_json(path, content)
    labeled, rest = split_dataset(dataset, percent=50, fold=1, file=path)
    assert (len(labeled), len(rest)) == (20, 20)


def test_an_index_file_for_other_images_is_refused(dataset, index_file):
    with pytest.raises(DataError, match="is for a list of 25 images, but forty has 13"):
        split_dataset(dataset.subset(range(20)), percent=10, fold=1, file=index_file)
    records = list(dataset.records)
    records[1] = ImageRecord("x.png", 99, 9, 9, records[1].annotations)
    other = DetectionDataset("other", tuple(records), dataset.classes)
    with pytest.raises(DataError, match="made for 'forty' with other image ids"):
        split_dataset(other, percent=10, fold=1, file=index_file)


@pytest.mark.parametrize(
    ("percent", "fold", "message"),
    [(5, 1, r"has no percent 5 \(it has \['10.0', '20.0'\]\)"), (10, 7, "has no fold 7")],
)
def test_missing_entries_are_named(dataset, index_file, percent, fold, message):
    with pytest.raises(DataError, match=message):
        split_dataset(dataset, percent=percent, fold=fold, file=index_file)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([1, 1], "damaged"),
        ([0, 25], "damaged"),
        ([-1, 3], "damaged"),
        ([0.0, 3], "damaged"),
        ([3], r"has 1 positions \(must be 2\)"),
    ],
)
def test_damaged_entries_are_refused(dataset, index_file, positions, message):
    content = read_index_file(index_file)
    content["10.0"]["1"] = positions
    index_file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        verify_index_file(dataset, index_file)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"1.0": [1]}', '{"1.0": {"1": 3}}', "[" * 9999, '{"1.0": {}, "1.0": {}}'],
)
def test_files_of_another_form_are_refused(tmp_path, text):
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"is no JSON file|is not of the form"):
        read_index_file(path)
    with pytest.raises(DataError, match="does not exist"):
        read_index_file(tmp_path / "none.json")


def test_the_public_file_is_for_117266_images_alone(dataset, tmp_path):
    path = tmp_path / "COCO_supervision.txt"
    path.write_text(json.dumps({"1.0": {"1": list(range(1172))}}))
    with pytest.raises(DataError, match="is for a list of 117266 images, but forty has 25"):
        split_dataset(dataset, percent=1.0, fold=1, file=path)


def test_positions_of_the_public_file_mean_the_filtered_list_sorted_by_id(tmp_path):
    boxes = annotations([0])
    empty = annotations([])
    total = 117266 + 1021
    # Every 115th image is empty until 1,021 are; listed backwards.
    is_empty = [i % 115 == 0 and i // 115 < 1021 for i in range(total)]
    records = [
        ImageRecord("", i, 9, 9, empty if is_empty[i] else boxes) for i in reversed(range(total))
    ]
    dataset = DetectionDataset("large", tuple(records), ("a",))
    positions = np.random.default_rng(0).permutation(117266)[:11].tolist()
    path = tmp_path / "COCO_supervision.txt"
    path.write_text(json.dumps({"0.01": {"0": positions}}))
    labeled, rest = split_dataset(dataset, percent=0.01, fold=0, file=path)
    kept = [i for i in range(total) if not is_empty[i]]
    assert ids(labeled) == sorted(kept[position] for position in positions)
    assert len(rest) == 117266 - 11


def write_pair(dataset, folder, root, **split):
    content, stem, images = coco_content(dataset, root=root)
    paths = coco_split_paths(folder, stem, percent=split["percent"], fold=split["fold"])
    for path, part in zip(paths, split_dataset(dataset, **split), strict=True):
        write_json(path, part_of_coco(content, part))
    return paths, images


def test_coco_pairs_keep_everything_of_the_original_file(tiny_coco, tmp_path):
    file, _, content = tiny_coco
    file.write_text(json.dumps({**content, "info": {"year": 2017}, "licenses": [1]}))
    dataset = load_coco(file, tmp_path / "images", name="coco:tiny.json:images")
    paths, images = write_pair(dataset, tmp_path, tmp_path, percent=50, fold=1)
    assert [path.name for path in paths] == ["tiny.1@50.json", "tiny.1@50-unlabeled.json"]
    assert images == "images"
    parts = [json.loads(path.read_text()) for path in paths]
    for part in parts:
        assert part["categories"] == content["categories"]
        assert (part["info"], part["licenses"]) == ({"year": 2017}, [1])
        assert {a["image_id"] for a in part["annotations"]} == {i["id"] for i in part["images"]}
    assert sorted(a["id"] for part in parts for a in part["annotations"]) == [1, 2, 3, 4]
    labeled, rest = verify_coco_files(dataset, paths[0])
    assert sorted(ids(labeled) + ids(rest)) == [2, 9]


def test_other_formats_become_coco_pairs(tiny_voc, tmp_path):
    from ssod_imwa.detection.data.catalog import load_dataset

    tiny_voc({n: [("cat", 1, (1, 1, 5, 5))] for n in "abcd"}, train=list("abcd"))
    dataset = with_integer_ids(load_dataset("voc:voc:train", root=tmp_path))
    assert ids(dataset) == [1, 2, 3, 4]
    paths, images = write_pair(dataset, tmp_path / "out", tmp_path, percent=25, fold=1)
    again = load_dataset(f"coco:{paths[0]}:{images}", root=tmp_path)
    assert again.classes == ("cat",)
    assert again.records[0].annotations.difficult.tolist() == [True]
    assert len(load_dataset(f"coco:{paths[1]}:{images}", root=tmp_path, labeled=False)) == 3


def test_a_pair_that_is_no_partition_is_refused(tiny_coco, tmp_path):
    dataset = load_coco(tiny_coco[0], tmp_path / "images", name="coco:tiny.json:images")
    paths, _ = write_pair(dataset, tmp_path, tmp_path, percent=50, fold=1)
    parts = [json.loads(path.read_text()) for path in paths]
    both = [*parts[0]["images"], *parts[1]["images"]]
    paths[1].write_text(json.dumps({**parts[1], "images": both}))
    with pytest.raises(DataError, match="share 1 images"):
        verify_coco_files(dataset, paths[0])
    paths[1].write_text(json.dumps({**parts[1], "images": []}))
    with pytest.raises(DataError, match=r"hold 1 images, coco:tiny.json:images has 3, 2 of them"):
        verify_coco_files(dataset, paths[0])


def test_a_file_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"splits.json cannot be written: .*Not a directory"):
        write_json(tmp_path / "file" / "splits.json", {})
