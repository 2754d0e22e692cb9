"""Files that say which images keep their labels, in the two public formats."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssod_imwa.data.text_files import read_json
from ssod_imwa.detection.data.catalog import find_source, fingerprint
from ssod_imwa.detection.data.coco import entry_id, read_coco_file, to_coco
from ssod_imwa.detection.data.records import DetectionDataset
from ssod_imwa.engine.checkpoint.atomic import write_output
from ssod_imwa.errors import DataError, writing

# Images of COCO's train2017 that have a box which is not a crowd: what COCO_supervision.txt counts.
COCO_SUPERVISION_IMAGES = 117266

# Our files carry, beside the percentages, what their positions refer to.
META = "meta"


def read_index_file(path: str | Path) -> dict[str, Any]:
    """The content of an index file: percent ("1.0") to fold ("0") to positions.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise DataError(f"split file {path} does not exist") from None
    splits = (
        {key: folds for key, folds in content.items() if key != META}
        if isinstance(content, dict) and isinstance(content.get(META, {}), dict)
        else {}
    )
    well_formed = splits and all(
        isinstance(folds, dict) and all(isinstance(leaf, list) for leaf in folds.values())
        for folds in splits.values()
    )
    if not well_formed:
        raise DataError(f'split file {path} is not of the form {{"1.0": {{"0": [positions]}}}}')
    return content


def stored_positions(
    content: dict[str, Any],
    path: str | Path,
    images: DetectionDataset,
    *,
    percent: float,
    fold: int,
) -> list[int]:
    """The positions an index file holds for a percentage and fold.

    Args:
        content: of the file, from `read_index_file`.
        path: of the file, for messages.
        images: the list that the positions refer to.
        percent: labeled images, in percent.
        fold: the file's name of the draw.

    Raises:
        DataError: the file was made for other images, lacks the entry, or the entry is damaged.
    """
    meta = content.get(META, {})
    expected = meta.get("images", COCO_SUPERVISION_IMAGES)
    if len(images) != expected:
        raise DataError(
            f"split file {path} is for a list of {expected} images, but {images.name} has "
            f"{len(images)} (its positions would mean other images)"
        )
    if meta and meta.get("fingerprint") != fingerprint(images):
        raise DataError(
            f"split file {path} was made for {meta.get('dataset')!r} with other image ids than "
            f"those of {images.name} (make it again with tools/prepare_splits.py)"
        )
    stored = {key: folds for key, folds in content.items() if key != META}
    folds = stored.get(str(float(percent)))
    if folds is None:
        raise DataError(f"split file {path} has no percent {percent:g} (it has {sorted(stored)})")
    positions = folds.get(str(fold))
    if positions is None:
        raise DataError(f"split file {path} has no fold {fold} (it has {sorted(folds)})")
    in_range = all(type(p) is int and 0 <= p < expected for p in positions)
    if not in_range or len(set(positions)) != len(positions):
        raise DataError(
            f"split file {path}: the list of percent {percent:g}, fold {fold} is damaged "
            f"(positions are distinct integers in 0..{expected - 1})"
        )
    return positions


def coco_content(dataset: DetectionDataset, *, root: Path) -> tuple[dict[str, Any], str, str]:
    """A data set as a COCO file's content, the stem of its file and its folder of images.

    A COCO data set gives the content of its own file, with every field; other data sets are
    converted, with file names relative to the root, so that their folder of images is ".".

    Args:
        dataset: from `load_dataset`, with integer ids.
        root: folder of all data sets.
    """
    source = find_source(dataset.name)
    if source.kind == "coco":
        return read_coco_file(root / source.path), Path(source.path).stem, source.part
    records = tuple(
        replace(record, file_name=os.path.relpath(record.file_name, root))
        for record in dataset.records
    )
    stem = re.sub(r"[^\w.-]+", "_", dataset.name)
    return to_coco(replace(dataset, records=records)), stem, "."


def part_of_coco(content: dict[str, Any], dataset: DetectionDataset) -> dict[str, Any]:
    """A COCO file's content cut down to a data set's images; the rest of it is kept unchanged.

    As in the public tools, an unlabeled part keeps its annotations; who reads it drops them.
    """
    ids = {record.image_id for record in dataset.records}
    return {
        **content,
        "images": [image for image in content["images"] if entry_id(image, "id") in ids],
        "annotations": [
            entry for entry in content["annotations"] if entry_id(entry, "image_id") in ids
        ],
    }


def coco_split_paths(
    folder: str | Path, stem: str, *, percent: float, fold: int
) -> tuple[Path, Path]:
    """The labeled and the unlabeled file of a fold in the annotation-file convention.

    Example:
        >>> [p.name for p in coco_split_paths("", "instances_train2017", percent=10.0, fold=1)]
        ['instances_train2017.1@10.json', 'instances_train2017.1@10-unlabeled.json']
    """
    labeled = Path(folder) / f"{stem}.{fold}@{percent:g}.json"
    return labeled, unlabeled_partner(labeled)


def unlabeled_partner(labeled_file: str | Path) -> Path:
    """The file of the unlabeled images that belongs to one of labeled images."""
    path = Path(labeled_file)
    return path.with_name(f"{path.stem}-unlabeled.json")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a split file; it appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
        DataError: it is there with another content: runs may depend on it.
    """
    text = json.dumps(content)
    with writing(path):
        is_there = path.exists()
        before = path.read_text(encoding="utf-8", errors="replace") if is_there else text
    if before != text:
        raise DataError(f"{path} is there already (remove it, or choose another --output)")
    if not is_there:
        write_output(path, text.encode())
