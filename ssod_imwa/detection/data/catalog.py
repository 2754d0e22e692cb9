"""From the name of a data set to its images."""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssod_imwa.data.problems import Problem
from ssod_imwa.data.roots import ROOT_VARIABLE, check_root, data_root
from ssod_imwa.data.text_files import name_bytes
from ssod_imwa.detection.data.coco import load_coco
from ssod_imwa.detection.data.digits import ensure_digits
from ssod_imwa.detection.data.folder import load_folder
from ssod_imwa.detection.data.records import DetectionDataset
from ssod_imwa.detection.data.validation import apply_policy
from ssod_imwa.detection.data.voc import VOC_CLASSES, load_voc
from ssod_imwa.errors import DataError


@dataclass(frozen=True)
class Source:
    """Where a data set lies below the root.

    Attributes:
        kind: "coco", "voc", "folder", "registered" for those of `register`, or "detectron2" for
            those of its DatasetCatalog.
        path: annotation file ("coco"), folder ("voc", "folder") or name (the others).
        part: folder of images ("coco") or name of the split ("voc").
        classes: class names in label order, None to take them from the annotations.
    """

    kind: str
    path: str
    part: str = ""
    classes: tuple[str, ...] | None = None


def _coco(year: int, images: str, annotations: str) -> Source:
    return Source("coco", f"coco/annotations/{annotations}{year}.json", f"coco/{images}{year}")


def _sources() -> dict[str, Source]:
    """detectron2's names and layouts, and the small sets of docs/datasets.md."""
    sources = {
        "coco_2017_train": _coco(2017, "train", "instances_train"),
        "coco_2017_val": _coco(2017, "val", "instances_val"),
        "coco_2017_unlabeled": _coco(2017, "unlabeled", "image_info_unlabeled"),
        "coco_2014_train": _coco(2014, "train", "instances_train"),
        "coco_2014_val": _coco(2014, "val", "instances_val"),
        "digits_train": Source("coco", "digits/annotations/train.json", "digits/train"),
        "digits_test": Source("coco", "digits/annotations/test.json", "digits/test"),
    }
    for split in ("train", "val", "trainval", "test"):
        sources[f"voc_2007_{split}"] = Source("voc", "VOC2007", split, VOC_CLASSES)
        if split != "test":  # the labels of VOC 2012's test images are not public
            sources[f"voc_2012_{split}"] = Source("voc", "VOC2012", split, VOC_CLASSES)
        mini = Source("voc", "voc2007_mini/VOC2007", split, VOC_CLASSES)
        sources[f"voc2007_mini_{split}"] = mini
        sources[f"bccd_{split}"] = Source("voc", "bccd", split, ("Platelets", "RBC", "WBC"))
    return sources


_SOURCES = _sources()
_LEARNED = {"boxes": np.float32, "labels": np.int64, "crowd": np.bool_, "difficult": np.bool_}
_REGISTERED: dict[str, Callable[[Path], DetectionDataset]] = {}


def available() -> list[str]:
    """Every name that `load_dataset` knows, sorted."""
    return sorted({*_SOURCES, *_REGISTERED})


def register(name: str, loader: Callable[[Path], DetectionDataset]) -> None:
    """Give a data set a name, usable in DATASETS.TRAIN, TRAIN_UNLABELED and TEST.

    Args:
        name: must not be taken, nor contain a colon.
        loader: gets the root folder and returns the labeled data set.

    Raises:
        ValueError: the name is taken or has a colon.

    Example:
        >>> register("my_cells", lambda root: load_voc(root / "cells", "train", name="my_cells"))
    """
    if name in available() or ":" in name:
        raise ValueError(f"data set name {name!r} is not allowed (taken, or has a colon)")
    _REGISTERED[name] = loader


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    labeled: bool = True,
    on_bad_record: str = "error",
) -> DetectionDataset:
    """A data set by its name in the catalog or by its place.

    The digit scenes are made at their first use. For them the default root is made, too; a root
    that was named has to be there, since its name may be mistyped.

    Args:
        name: one of `available()`, or "coco:FILE.json:IMAGES", "voc:FOLDER:SPLIT" or
            "folder:FOLDER" with paths relative to the root.
        root: folder of all data sets; None or "" takes $DETECTRON2_DATASETS, else "datasets".
        labeled: whether to read labels; without them no annotation of the images is needed.
        on_bad_record: "error" or "skip", see `validation.apply_policy`.

    Raises:
        DataError: the name is unknown, files are missing, or records are bad.
    """
    dataset, problems = read_dataset(name, root=root, labeled=labeled)
    return apply_policy(dataset, on_bad_record=on_bad_record, problems=problems)


def load_datasets(
    names: Sequence[str],
    *,
    root: str | Path | None = None,
    labeled: bool = True,
    on_bad_record: str = "error",
) -> DetectionDataset:
    """Several data sets as one, in the given order; see `load_dataset` for the arguments.

    Image ids that occur in more than one set are preceded by "NAME/".

    Raises:
        DataError: no name is given, the classes of labeled sets differ, or see `load_dataset`.
    """
    datasets = [
        load_dataset(name, root=root, labeled=labeled, on_bad_record=on_bad_record)
        for name in names
    ]
    if not datasets:
        raise DataError("no data set is given (at least 1 name is needed)")
    for dataset in datasets[1:]:
        # Without labels a set has the classes of its reader, or none: nothing looks at them.
        if labeled and dataset.classes != datasets[0].classes:
            raise DataError(
                f"data sets {datasets[0].name} and {dataset.name} have different classes: "
                f"{list(datasets[0].classes)} and {list(dataset.classes)} (they must be the same)"
            )
    counts = Counter(record.image_id for dataset in datasets for record in dataset.records)
    records = tuple(
        record
        if counts[record.image_id] == 1
        else replace(record, image_id=f"{dataset.name}/{record.image_id}")
        for dataset in datasets
        for record in dataset.records
    )
    return replace(datasets[0], name="+".join(names), records=records)


def read_dataset(
    name: str, *, root: str | Path | None = None, labeled: bool = True
) -> tuple[DetectionDataset, list[Problem]]:
    """A data set as it is in its files, and what its reader could not represent.

    Raises:
        DataError: the name is unknown or files are missing.
    """
    folder = data_root(root)
    problems: list[Problem] = []
    source = find_source(name)
    if source.kind == "registered":
        dataset = _REGISTERED[name](folder)
        return (dataset if labeled else dataset.subset(range(len(dataset)), labeled=False)), []
    if source.kind == "detectron2":
        # Here, as detectron2 is optional, takes seconds to import, and is loaded by now.
        from ssod_imwa.detection.data.detectron2 import from_detectron2

        return from_detectron2(name, labeled=labeled), []
    if name.startswith("digits_"):
        check_root(root)
        ensure_digits(folder)
    _check_files(name, source, root, labeled=labeled)
    path, part = folder / source.path, source.part
    if source.kind == "coco":
        dataset = load_coco(path, folder / part, name=name, labeled=labeled, problems=problems)
    elif source.kind == "voc":
        dataset = load_voc(
            path, part, name=name, classes=source.classes, labeled=labeled, problems=problems
        )
    else:
        dataset = load_folder(path, name=name, problems=problems)
    return dataset, problems


def find_source(name: str) -> Source:
    """Where the data set of this name lies.

    Raises:
        DataError: the name is neither in the catalog nor a place.
    """
    if name in _SOURCES:
        return _SOURCES[name]
    if name in _REGISTERED:
        return Source("registered", name)
    # Nobody can have registered anything there without importing it.
    if (detectron2 := sys.modules.get("detectron2.data")) and name in detectron2.DatasetCatalog:
        return Source("detectron2", name)
    kind, *places = name.split(":")
    forms = {"coco": "coco:FILE.json:IMAGES", "voc": "voc:FOLDER:SPLIT", "folder": "folder:FOLDER"}
    if kind in forms and places:
        if len(places) != forms[kind].count(":") or not all(places):
            raise DataError(f"data set {name!r} is not allowed (write {forms[kind]})")
        path, *part = places
        return Source(kind, path, part[0] if part else "")
    near = difflib.get_close_matches(name, available(), n=3, cutoff=0.5) or available()
    raise DataError(
        f"data set {name!r} is not known (nearest: {', '.join(near)}; "
        f"or {', '.join(forms.values())})"
    )


def fingerprint(dataset: DetectionDataset) -> str:
    """Number of images and SHA-256 of their ids in order: what positions in a split file mean.

    Example:
        >>> fingerprint(DetectionDataset("none", (), ()))[:10]
        '0:e3b0c442'
    """
    ids = "\n".join(str(record.image_id) for record in dataset.records)
    return f"{len(dataset)}:{hashlib.sha256(name_bytes(ids)).hexdigest()}"


def content_fingerprint(dataset: DetectionDataset) -> str:
    """Number of images and SHA-256 of what is learned from them: what a resumed run must find.

    It covers classes, ids, sizes, boxes, labels and flags, in order; joined to a few arrays, so
    that COCO's images take a second.

    Example:
        >>> content_fingerprint(DetectionDataset("none", (), ()))[:2]
        '0:'
    """
    records = dataset.records
    digest = hashlib.sha256(repr(dataset.classes).encode())
    digest.update(fingerprint(dataset).encode())
    sizes = [(record.width, record.height) for record in records]
    digest.update(np.array(sizes, dtype=np.int64).tobytes())
    labels = [record.annotations for record in records if record.annotations is not None]
    counts = [-1 if r.annotations is None else len(r.annotations) for r in records]
    digest.update(np.array(counts, dtype=np.int64).tobytes())
    for name, dtype in _LEARNED.items():
        arrays = [getattr(annotations, name) for annotations in labels]
        if arrays:
            digest.update(np.concatenate(arrays).astype(dtype, copy=False).tobytes())
    return f"{len(dataset)}:{digest.hexdigest()}"


def _check_files(name: str, source: Source, root: str | Path | None, *, labeled: bool) -> None:
    """One message that holds everything a newcomer needs to put the data in its place."""
    folder = data_root(root)
    if source.kind == "folder" and labeled:
        raise DataError(
            f"data set {name!r} has no labels (a folder of images can only be an unlabeled "
            "data set: DATASETS.TRAIN_UNLABELED)"
        )
    if source.kind == "coco":
        needed = [source.path, source.part]
    elif source.kind == "voc":
        needed = [f"{source.path}/ImageSets/Main/{source.part}.txt", f"{source.path}/JPEGImages"]
        needed += [f"{source.path}/Annotations"] if labeled else []
    else:
        needed = [source.path]
    missing = [place for place in needed if not os.path.exists(folder / place)]
    if missing:
        check_root(root)
        raise DataError(
            f"data set {name!r} not found: no {' and no '.join(missing)} in {folder.resolve()} "
            f"(another folder is chosen by DATASETS.ROOT or ${ROOT_VARIABLE}; see "
            "docs/datasets.md)"
        )
