import json

import pytest


@pytest.fixture
def tiny_coco(tmp_path, write_image):
    """Three images, listed out of order, categories 3 and 7; returns file, folder and content."""
    content = {
        "images": [
            {"id": image_id, "file_name": f"{image_id}.png", "width": 40, "height": 30}
            for image_id in (9, 2, 5)
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 3, "bbox": [0.5, 0, 10, 20.25], "iscrowd": 0},
            {"id": 3, "image_id": 9, "category_id": 3, "bbox": [5, 6, 7, 8], "iscrowd": 1},
            {"id": 4, "image_id": 2, "category_id": 7, "bbox": [2, 2, 2, 2], "ignore": 1},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    folder = tmp_path / "images"
    for image in content["images"]:
        write_image(folder / image["file_name"])
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(content))
    return file, folder, content


VOC_XML = """<annotation><size><width>{width}</width><height>{height}</height></size>
{objects}</annotation>"""
VOC_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>
</part></object>"""


@pytest.fixture
def tiny_voc(tmp_path, write_image):
    """Writes a VOC folder: tiny_voc({"a": [("cat", 0, (1, 2, 3, 4))]}, train=["a"])."""

    def write(images, **splits):
        root = tmp_path / "voc"
        for folder in ("Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for image_id, objects in images.items():
            write_image(root / "JPEGImages" / f"{image_id}.jpg")
            text = "".join(
                VOC_OBJECT.format(name=name, difficult=difficult, box=box)
                for name, difficult, box in objects
            )
            xml = VOC_XML.format(width=40, height=30, objects=text)
            (root / "Annotations" / f"{image_id}.xml").write_text(xml)
        for split, names in splits.items():
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        return root

    return write
