"""Split files written and checked, and what each split holds: lines of text."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path

from ssod_imwa.data.roots import data_root
from ssod_imwa.detection.data.catalog import fingerprint
from ssod_imwa.detection.data.records import DetectionDataset
from ssod_imwa.detection.data.reports import class_counts
from ssod_imwa.detection.data.split_files import (
    coco_content,
    coco_split_paths,
    part_of_coco,
    unlabeled_partner,
    write_json,
)
from ssod_imwa.detection.data.splits import (
    index_file_content,
    split_dataset,
    verify_coco_files,
    verify_index_file,
    with_integer_ids,
)

HEADER = f"{'percent':>7} {'fold':>4} {'images':>6} {'boxes':>7}  ids (SHA-256)  class: boxes"


def check_split(dataset: DetectionDataset, path: Path) -> list[str]:
    """Verify an index file, or the labeled one of two COCO files; what each split holds.

    Raises:
        DataError: it is not of this data set, or damaged.
    """
    if unlabeled_partner(path).exists():
        fold, _, percent = path.stem.rpartition(".")[2].partition("@")
        return split_lines(percent, fold, verify_coco_files(dataset, path)[0])
    splits = verify_index_file(dataset, path)
    lines = [split_lines(f"{percent:g}", str(fold), labeled) for percent, fold, labeled in splits]
    return list(itertools.chain.from_iterable(lines))


def write_index_split(
    dataset: DetectionDataset,
    path: Path,
    *,
    percents: Collection[float],
    folds: Collection[int],
    filter_empty: bool = True,
) -> list[str]:
    """Write one index file; what its splits hold, and how it is used.

    Args:
        dataset: labeled images.
        path: of the file.
        percents: of labeled images.
        folds: each is the seed of a draw.
        filter_empty: whether to draw among images with boxes alone.

    Raises:
        DataError: no image would be labeled, or the file is there with another content.
    """
    content = index_file_content(dataset, percents=percents, folds=folds, filter_empty=filter_empty)
    write_json(path, content)
    used = f"written; use it with DATASETS.SPLIT.FILE {path.resolve()}"
    return [*check_split(dataset, path), used]


def write_coco_splits(
    dataset: DetectionDataset,
    folder: Path,
    *,
    root: str | Path | None = None,
    percents: Collection[float],
    folds: Collection[int],
    filter_empty: bool = True,
) -> list[str]:
    """Write two COCO files for each percentage and fold.

    Args:
        dataset: labeled images.
        folder: of the files.
        root: folder of all data sets.
        percents: of labeled images.
        folds: each is the seed of a draw.
        filter_empty: whether to draw among images with boxes alone.

    Raises:
        DataError: no image would be labeled, or a file is there with another content.
    """
    numbered = with_integer_ids(dataset)
    content, stem, images = coco_content(numbered, root=data_root(root))
    lines = []
    for percent, fold in itertools.product(percents, folds):
        parts = split_dataset(numbered, percent=percent, fold=fold, filter_empty=filter_empty)
        paths = coco_split_paths(folder, stem, percent=percent, fold=fold)
        for path, part in zip(paths, parts, strict=True):
            write_json(path, part_of_coco(content, part))
        lines += check_split(dataset, paths[0])
        labeled, unlabeled = (f"coco:{path.resolve()}:{images}" for path in paths)
        lines.append(f"written; use DATASETS.TRAIN {labeled} DATASETS.TRAIN_UNLABELED {unlabeled}")
    return lines


def split_lines(percent: str, fold: str, labeled: DetectionDataset) -> list[str]:
    """What a split's labeled images hold, below `HEADER`; a warning for missing classes."""
    counts = class_counts(labeled)
    images, digest = fingerprint(labeled).split(":")
    pairs = list(zip(labeled.classes, counts, strict=True))
    classes = " ".join(f"{name}:{count}" for name, count in pairs)
    lines = [f"{percent:>7} {fold:>4} {images:>6} {sum(counts):>7}  {digest[:12]}   {classes}"]
    missing = [name for name, count in pairs if count == 0]
    if missing:
        names = ", ".join(missing)
        lines.append(f"warning: no labeled box of {names}; another fold may have some")
    return lines
