import json

import pytest
from PIL import Image

from ssod_imwa.analysis.datasets import boxes_figure
from ssod_imwa.errors import DataError


@pytest.fixture
def root(tmp_path):
    """a.json and b.json with boxes of two classes, other.json of others, on one image."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    for name, classes, labels in (
        ("a", "cat dog", [1, 1, 2]),
        ("b", "cat dog", [2]),
        ("other", "cat owl", [1]),
    ):
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
            "categories": [{"id": i, "name": x} for i, x in enumerate(classes.split(), start=1)],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": label, "bbox": [1, 1, 9, 9]}
                for i, label in enumerate(labels)
            ],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_data_sets_stand_side_by_side(root):
    axis = boxes_figure(["coco:a.json:images", "coco:b.json:images"], root=root).axes[0]
    assert [[bar.get_height() for bar in bars] for bars in axis.containers] == [[2, 1], [0, 1]]
    assert [x.get_text() for x in axis.get_legend().get_texts()] == [
        "coco:a.json:images (3 boxes on 1 images)",
        "coco:b.json:images (1 boxes on 1 images)",
    ]


def test_other_classes_are_refused(root):
    with pytest.raises(DataError, match="have different classes"):
        boxes_figure(["coco:a.json:images", "coco:other.json:images"], root=root)
