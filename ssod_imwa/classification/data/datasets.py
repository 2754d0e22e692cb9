"""Labeled images for classification, and the readers of their public layouts."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, CIFAR100

from ssod_imwa.data.handwriting import CLASSES as DIGIT_CLASSES
from ssod_imwa.data.handwriting import is_for_testing
from ssod_imwa.data.image_files import IMAGE_SUFFIXES, image_paths, is_hidden, read_image
from ssod_imwa.data.text_files import folded, is_text
from ssod_imwa.errors import DataError

logger = logging.getLogger(__name__)

# Official label order, which is also the alphabetical one.
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)

DIGIT_SIZE = 32


@dataclass(frozen=True, eq=False)
class ClassificationDataset:
    """Images and their labels: small images as one tensor, large ones as files.

    Attributes:
        name: of the data set, for messages.
        labels: int64 (N,), 0..C-1; of unlabeled images the truth, which only records may look at,
            -1 where it is not known.
        classes: names of the C classes in label order.
        images: uint8 (N, 3, H, W), RGB, or None for a data set of files; `FeatureDataset` has
            cached features in their place.
        files: N paths, or empty for a data set in memory.
        list_file: in which the images are listed, empty if there is none; for messages.
        is_labeled: whether the labels may be learned.
    """

    name: str
    labels: torch.Tensor
    classes: tuple[str, ...]
    images: torch.Tensor | None = None
    files: tuple[str, ...] = ()
    list_file: str = ""
    is_labeled: bool = True

    def __post_init__(self) -> None:
        size = len(self.files) if self.images is None else len(self.images)
        if (self.images is not None and self.files) or size != len(self.labels):
            raise ValueError(
                f"{self.name}: {size} images and {len(self.labels)} labels are not allowed (must "
                "be as many, the images either in memory or in files)"
            )
        check_class_names(self.name, self.classes)
        lowest = 0 if self.is_labeled else -1
        if len(self) and not lowest <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(
                f"{self.name}: labels are {self.labels.min()}..{self.labels.max()}, with "
                f"{len(self.classes)} classes they must be {lowest}..{len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> list[int]:
        """Images of each class, as far as it is known."""
        known = self.labels[self.labels >= 0]
        return torch.bincount(known, minlength=len(self.classes)).tolist()

    @property
    def distinctive(self) -> torch.Tensor | None:
        """(N, ...): what tells one image in memory from another."""
        return self.images

    @property
    def size(self) -> str:
        """What images in memory hold, in words; "" for a data set of files."""
        return "" if self.images is None else "{3} x {2} pixels".format(*self.images.shape)

    def subset(self, indices: Sequence[int] | np.ndarray) -> ClassificationDataset:
        """The images at these positions, in this order, copied; all classes stay."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return replace(
            self,
            labels=self.labels[chosen],
            images=None if self.images is None else self.images[chosen],
            files=tuple(self.files[i] for i in chosen.tolist()) if self.files else (),
        )

    def image(self, index: int) -> torch.Tensor:
        """uint8 (3, H, W), RGB: one image, decoded if it is a file.

        Raises:
            DataError: the file cannot be read.
        """
        return read_image(self.files[index]) if self.images is None else self.images[index]


def load_image_folder(
    folder: str | Path,
    *,
    name: str,
    classes: Sequence[str] | None = None,
    complete: bool = True,
) -> ClassificationDataset:
    """The images of a folder with one subfolder a class, as files in the order of their paths.

    Images may lie in subfolders of a class. Hidden files and folders, and files that do not end in
    one of `IMAGE_SUFFIXES`, are left alone. Images beside the folders of classes are of none, which
    is logged.

    Args:
        folder: FOLDER/CLASS/.../IMAGE.
        name: of the data set.
        classes: names in label order; None sorts the subfolders, by number if all are numbers (so
            iNaturalist's folder "10" is label 10, not 2).
        complete: whether every class needs an image, as for training.

    Raises:
        DataError: the folder is missing, its subfolders are not the classes, or one is empty.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise DataError(f"{name}: image folder {folder} does not exist")
    try:
        entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"{name}: {folder} cannot be read ({error.strerror})") from error
    folders = [entry.name for entry in entries if entry.is_dir()]
    if not folders:
        raise DataError(f"{name}: {folder} has no folder (one for each class is needed)")
    strays = {e.name for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES)} - set(folders)
    if strays:
        logger.warning(
            "%s: left out %d images that are in no class's folder, such as %s",
            name,
            len(strays),
            folder / min(strays),
        )
    if classes is None:
        numbered = all(entry.isdecimal() for entry in folders)
        # By name first: "1" and "01" are one number, and a folder is listed in any order.
        classes = sorted(sorted(folders), key=int) if numbered else sorted(folders)
    _check_class_folders(name, folder, folders, classes, complete=complete)
    files: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        paths = image_paths(folder / class_name)
        files += map(str, sorted(paths))
        labels += [label] * len(paths)
    return dataset_of_files(name, files, labels, classes, complete=complete)


def load_plain_folder(
    folder: str | Path, *, name: str, classes: Sequence[str]
) -> ClassificationDataset:
    """All images anywhere below a folder, as files in the order of their paths, unlabeled.

    An image whose first subfolder is named like a class has this label for records, others -1.

    Args:
        folder: FOLDER/.../IMAGE.
        name: of the data set.
        classes: of the labeled images, in label order.

    Raises:
        DataError: the folder is missing or has no images.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise DataError(f"{name}: image folder {folder} does not exist")
    paths = image_paths(folder)
    if not paths:
        raise DataError(f"{name}: {folder} has no images (at least one is needed)")
    numbers = {class_name: label for label, class_name in enumerate(classes)}
    first = [path.relative_to(folder).parts[0] for path in paths]
    labels = torch.tensor([numbers.get(entry, -1) for entry in first], dtype=torch.int64)
    files = tuple(map(str, paths))
    return ClassificationDataset(name, labels, tuple(classes), files=files, is_labeled=False)


def read_into_memory(
    dataset: ClassificationDataset, *, on_bad_record: str = "error"
) -> ClassificationDataset:
    """A data set of files with its images in one tensor; they must have one size.

    Args:
        dataset: of files; one in memory is returned as it is.
        on_bad_record: "error" raises at a file that cannot be read; "skip" leaves it out and logs
            how many there are.

    Raises:
        DataError: a file cannot be read, or has another size than the first; or nothing is left of
            a class.
    """
    if dataset.images is not None or not dataset.files:
        return dataset
    images = torch.empty(0, dtype=torch.uint8)
    positions: list[int] = []
    faults: list[str] = []
    for i, file in enumerate(dataset.files):
        try:
            image = read_image(file)
        except DataError as error:
            if on_bad_record == "error":
                raise
            faults.append(str(error))
            continue
        if not positions:
            images = torch.empty((len(dataset), *image.shape), dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            first = dataset.files[positions[0]]
            raise DataError(
                f"{dataset.name}: image {file} is {image.shape[2]} x {image.shape[1]} pixels, "
                f"{first} is {images.shape[3]} x {images.shape[2]} (in memory all must have one "
                "size)"
            )
        images[len(positions)] = image
        positions.append(i)
    if not faults:
        return replace(dataset, images=images, files=())
    return _without_unread(dataset, images, positions, faults)


def _without_unread(
    dataset: ClassificationDataset, images: torch.Tensor, positions: list[int], faults: list[str]
) -> ClassificationDataset:
    """A data set of the images that could be read, which stand at these positions."""
    rest = replace(
        dataset,
        labels=dataset.labels[torch.tensor(positions, dtype=torch.int64)],
        images=images[: len(positions)],
        files=(),
    )
    for name, before, count in zip(dataset.classes, dataset.counts, rest.counts, strict=True):
        if before and not count:
            raise DataError(f"{dataset.name}: no image of {name!r} can be read: {faults[0]}, ...")
    logger.warning(
        "%s: %d images cannot be read and are left out, the first: %s",
        dataset.name,
        len(faults),
        faults[0],
    )
    return rest


def load_cifar10_lt100(root: str | Path, split: Literal["train", "test"]) -> ClassificationDataset:
    """CIFAR-10-LT with ratio 100 (split "first") and CIFAR-10's test set, from PNG files.

    Args:
        root: folder with `cifar10_lt100/{train,test}/CLASS/*.png`.
        split: 12,406 long-tailed or 10,000 balanced images, uint8 (N, 3, 32, 32) in memory.

    Raises:
        DataError: the folder is missing, incomplete or damaged.
    """
    folder = Path(root) / "cifar10_lt100" / split
    name = f"cifar10_lt100_{split}"
    return read_into_memory(load_image_folder(folder, name=name, classes=CIFAR10_CLASSES))


def load_cifar(
    root: str | Path, split: Literal["train", "test"], *, classes: Literal[10, 100] = 10
) -> ClassificationDataset:
    """CIFAR-10 or CIFAR-100 from its original Python pickles; nothing is downloaded.

    Args:
        root: folder with `cifar-10-batches-py` or `cifar-100-python`, checked by their MD5.
        split: 50,000 or 10,000 images, uint8 (N, 3, 32, 32) in memory.
        classes: 10, or 100 for the fine labels.

    Raises:
        DataError: the files are missing or damaged.
        ValueError: `classes` or `split` is not one of these.
    """
    _check_split(split)
    if classes not in (10, 100):
        raise ValueError(f"classes = {classes} is not allowed (must be 10 or 100)")
    reader = CIFAR10 if classes == 10 else CIFAR100
    try:
        content = reader(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(
            f"CIFAR-{classes} not found or damaged: no whole {reader.base_folder} in "
            f"{Path(root).absolute()} (unpack {reader.filename} there)"
        ) from error
    # torchvision has (N, H, W, 3) in one array; a copy, since permuted tensors are slow to index.
    images = torch.from_numpy(content.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(content.targets, dtype=torch.int64)
    return ClassificationDataset(
        f"cifar{classes}_{split}", labels, tuple(content.classes), images=images
    )


def load_digit_images(split: Literal["train", "test"]) -> ClassificationDataset:
    """scikit-learn's handwritten digits as uint8 (N, 3, 32, 32), gray; needs no files.

    Divided as for the digit scenes: every fifth image of a class is for testing. The 8 x 8 pixels
    of 0..16 are enlarged bilinearly and scaled to 0..255.

    Args:
        split: 1,433 or 364 images, about as many of each class.

    Example:
        >>> len(load_digit_images("train")), len(load_digit_images("test"))
        (1433, 364)
    """
    _check_split(split)
    # Imported here: scikit-learn takes a second to import and is needed once.
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.flatnonzero(is_for_testing(digits.target) == (split == "test"))
    pixels = torch.from_numpy(digits.images[chosen].astype(np.float64))[:, None]
    # Weights are multiples of 1/64 and so exact: the result is the same on every machine.
    size = (DIGIT_SIZE, DIGIT_SIZE)
    large = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    images = (large * 255 / 16).round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target[chosen].astype(np.int64))
    return ClassificationDataset(f"digit_images_{split}", labels, DIGIT_CLASSES, images=images)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r} is not allowed (must be 'train' or 'test')")


def check_class_names(name: str, classes: Sequence[str]) -> None:
    """Refuse names of classes that are empty or stand twice; warn of those that are alike.

    Raises:
        DataError: with the place of the first wrong name.
    """
    for label, class_name in enumerate(classes):
        if not is_text(class_name):
            raise DataError(f"{name}: the name of class {label} is {class_name!r} (must be a text)")
        if class_name in classes[:label]:
            first = classes.index(class_name)
            raise DataError(
                f"{name}: classes {first} and {label} are both named {class_name!r} (names are "
                "unique)"
            )


def warn_of_alike_names(name: str, classes: Sequence[str]) -> None:
    """Log names of classes that differ by case or spaces alone: often one class in two ways."""
    by_fold: dict[str, str] = {}
    alike = []
    for class_name in classes:
        other = by_fold.setdefault(folded(class_name), class_name)
        if other != class_name:
            alike.append(f"{other!r} and {class_name!r}")
    if alike:
        listed = ", ".join(alike[:3]) + (f" and {len(alike) - 3} more" if len(alike) > 3 else "")
        logger.warning("%s: classes differ by case or spaces alone: %s", name, listed)


def dataset_of_files(
    name: str,
    files: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    complete: bool = True,
) -> ClassificationDataset:
    """A data set of files.

    Args:
        name: of the data set.
        files: paths.
        labels: 0..C-1, one for each file.
        classes: names in label order.
        complete: whether each class has to have an image; if not, those without are logged.

    Raises:
        DataError: a label is out of range, or a class has no images.
    """
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise DataError(
            f"{name}: labels are {min(labels)}..{max(labels)}, with {len(classes)} classes they "
            f"must be 0..{len(classes) - 1}"
        )
    numbers = torch.tensor(labels, dtype=torch.int64)
    dataset = ClassificationDataset(name, numbers, tuple(classes), files=tuple(files))
    warn_of_alike_names(name, classes)
    empty = [c for c, count in enumerate(dataset.counts) if count == 0]
    if empty:
        listed = ", ".join(f"{c} ({classes[c]})" for c in empty[:3])
        listed += ", ..." if len(empty) > 3 else ""
        lacking = f"{name}: {len(empty)} of {len(classes)} classes have no images: {listed}"
        if complete or len(empty) == len(classes):
            raise DataError(f"{lacking} (each class needs at least 1)")
        logger.warning("%s; what is measured of them is none", lacking)
    return dataset


def _check_class_folders(
    name: str, folder: Path, present: Sequence[str], classes: Sequence[str], *, complete: bool
) -> None:
    missing = [entry for entry in classes if entry not in set(present)]
    unknown = sorted(set(present) - set(classes))
    if missing and complete:
        near = difflib.get_close_matches(missing[0], present, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise DataError(
            f"{name}: {folder} has no folder for {len(missing)} of {len(classes)} classes: "
            f"{', '.join(missing[:3])}{hint}"
        )
    if unknown:
        raise DataError(
            f"{name}: {folder} has a folder {unknown[0]} that is none of the {len(classes)} classes"
        )
