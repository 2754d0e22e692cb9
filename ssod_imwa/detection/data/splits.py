"""Which images of a data set keep their labels.

Two conventions are public, and they are not compatible:

* the *index file* of Unbiased Teacher and Dense Teacher, `COCO_supervision.txt`: positions in the
  list of images that have a box, sorted by id;
* *annotation files* of STAC, Soft Teacher and mmdetection:
  `instances_train2017.{fold}@{percent}.json` and `...-unlabeled.json`, ordinary COCO files.

Both are read and written here. Our own draw is a function of an explicit seed, without replacement,
and nested: the images of 1 % are among those of 5 % of the same fold.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ssod_imwa.detection.data.catalog import fingerprint
from ssod_imwa.detection.data.coco import load_coco
from ssod_imwa.detection.data.records import DetectionDataset
from ssod_imwa.detection.data.split_files import (
    META,
    read_index_file,
    stored_positions,
    unlabeled_partner,
)
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError


def with_boxes(dataset: DetectionDataset) -> DetectionDataset:
    """The images that have at least one box which is not a crowd, sorted by id.

    This is the list that the positions of an index file refer to (detectron2's filter).
    """
    order = [
        position
        for position, record in enumerate(dataset.records)
        if record.annotations is not None and (~record.annotations.crowd).any()
    ]
    return sorted_by_id(dataset.subset(order))


def sorted_by_id(dataset: DetectionDataset) -> DetectionDataset:
    """All images, integer ids before strings, each in ascending order."""

    def key(position: int) -> tuple[bool, int | str]:
        image_id = dataset.records[position].image_id
        return isinstance(image_id, str), image_id

    return dataset.subset(sorted(range(len(dataset)), key=key))


def labeled_count(percent: float, images: int) -> int:
    """Number of labeled images, floor(percent / 100 * images), in exact arithmetic.

    Raises:
        DataError: percent is not in (0, 100], or no image would be labeled.

    Example:
        >>> [labeled_count(p, 117266) for p in (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)]
        [11, 117, 586, 1172, 2345, 5863, 11726]
    """
    if not 0 < percent <= 100:
        raise DataError(f"percent = {percent:g} is not allowed (must be above 0 and at most 100)")
    count = int(Fraction(str(percent)) * images / 100)
    if count == 0:
        raise DataError(
            f"percent = {percent:g} of {images} images is not allowed (labels no image; "
            f"at least {100 / images:.4g} is needed)"
            if images
            else "there are no images with boxes to split (at least 1 is needed)"
        )
    return count


def draw(images: int, *, percent: float, fold: int) -> list[int]:
    """Positions of the labeled images in a list, ascending.

    The raw bits of a counted generator are sorted, so that the draw does not depend on how a
    version of NumPy shuffles.

    Args:
        images: length of the list.
        percent: of it, in (0, 100].
        fold: seed of the draw; folds are independent of each other.

    Raises:
        DataError: see `labeled_count`.
    """
    count = labeled_count(percent, images)
    bits = counted_generator("split", fold).bit_generator.random_raw(images)
    return sorted(np.argsort(bits, kind="stable")[:count].tolist())


def split_dataset(
    dataset: DetectionDataset,
    *,
    percent: float,
    fold: int,
    file: str | Path = "",
    filter_empty: bool = True,
) -> tuple[DetectionDataset, DetectionDataset]:
    """The labeled part of a data set and the rest without its labels.

    Call it once a run and hand the result to all ranks: per-rank draws leak labels (Unbiased
    Teacher's issue 14).

    Args:
        dataset: labeled images, as `load_dataset` returns them.
        percent: of the images that keeps its labels, in (0, 100].
        fold: fold of the file, or seed of the draw.
        file: index file, "" draws the split.
        filter_empty: leave out images without a box, as detectron2 does. An index file brings its
            own setting.

    Raises:
        DataError: no image would be labeled, or the file does not belong to the data set.
    """
    if file:
        content = read_index_file(file)
        # COCO_supervision.txt has no meta entry; it always counts the images with boxes.
        filter_empty = content.get(META, {}).get("filter_empty", True)
    images = with_boxes(dataset) if filter_empty else sorted_by_id(dataset)
    if file:
        positions = stored_positions(content, file, images, percent=percent, fold=fold)
        _check_count(positions, file, images, percent=percent, fold=fold)
    else:
        positions = draw(len(images), percent=percent, fold=fold)
    chosen = set(positions)
    rest = [position for position in range(len(images)) if position not in chosen]
    return images.subset(sorted(chosen)), images.subset(rest, labeled=False)


def index_file_content(
    dataset: DetectionDataset,
    *,
    percents: Collection[float],
    folds: Collection[int],
    filter_empty: bool = True,
) -> dict[str, Any]:
    """What an index file holds: COCO_supervision.txt's keys, and what its lists refer to.

    Raises:
        DataError: see `labeled_count`.
    """
    images = with_boxes(dataset) if filter_empty else sorted_by_id(dataset)
    meta = {
        "dataset": dataset.name,
        "filter_empty": filter_empty,
        "images": len(images),
        "fingerprint": fingerprint(images),
    }
    splits = {
        str(float(percent)): {
            str(fold): draw(len(images), percent=percent, fold=fold) for fold in folds
        }
        for percent in percents
    }
    return {META: meta, **splits}


def verify_index_file(
    dataset: DetectionDataset, file: str | Path
) -> list[tuple[float, int, DetectionDataset]]:
    """Check every entry of an index file; returns percent, fold and labeled images of each.

    Raises:
        DataError: an entry does not belong to the data set or is damaged.
    """
    content = read_index_file(file)
    splits = []
    for percent, folds in content.items():
        if percent == META:
            continue
        for fold in folds:
            try:
                entry = float(percent), int(fold)
            except ValueError:
                raise DataError(f"split file {file} has the entry {percent!r}, {fold!r}") from None
            labeled, _ = split_dataset(dataset, percent=entry[0], fold=entry[1], file=file)
            splits.append((*entry, labeled))
    return splits


def verify_coco_files(
    dataset: DetectionDataset, labeled_file: str | Path
) -> tuple[DetectionDataset, DetectionDataset]:
    """Check a pair of annotation files; returns the labeled and the unlabeled images.

    Together they have to hold all images of the data set, or all with boxes, and no image twice.
    Image ids are those of `with_integer_ids`.

    Raises:
        DataError: a file is missing, or the pair is not a split of the data set.
    """
    unlabeled_file = unlabeled_partner(labeled_file)
    numbered = with_integer_ids(dataset)
    parts = [
        {r.image_id for r in load_coco(path, "", name=str(path), labeled=False).records}
        for path in (labeled_file, unlabeled_file)
    ]
    pair = f"split files {labeled_file} and {unlabeled_file}"
    if shared := sorted(parts[0] & parts[1]):
        raise DataError(f"{pair} share {len(shared)} images, such as {shared[0]} (none is allowed)")
    wholes = [{r.image_id for r in images.records} for images in (numbered, with_boxes(numbered))]
    if parts[0] | parts[1] not in wholes:
        raise DataError(
            f"{pair} hold {len(parts[0] | parts[1])} images, {dataset.name} has "
            f"{len(wholes[0])}, {len(wholes[1])} of them with boxes (must be all of either)"
        )
    first, second = (
        numbered.subset([i for i, r in enumerate(numbered.records) if r.image_id in ids])
        for ids in parts
    )
    return first, second


def with_integer_ids(dataset: DetectionDataset) -> DetectionDataset:
    """The images with the ids that `to_coco` writes: their own integers, else position + 1."""
    if all(isinstance(record.image_id, int) for record in dataset.records):
        return dataset
    records = tuple(replace(r, image_id=i) for i, r in enumerate(dataset.records, start=1))
    return replace(dataset, records=records)


def _check_count(
    positions: list[int], file: str | Path, images: DetectionDataset, *, percent: float, fold: int
) -> None:
    count = labeled_count(percent, len(images))
    if len(positions) != count:
        raise DataError(
            f"split file {file}: percent {percent:g}, fold {fold} has {len(positions)} "
            f"positions (must be {count})"
        )
