"""Names the output folder of a composed recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def output_folder(paths: Sequence[str | Path]) -> str:
    """Where a run writes that sets no OUTPUT_DIR: the first file's folder, then the files' names.

    Args:
        paths: at least one YAML file, in the order of merging.

    Example:
        >>> output_folder(["configs/digits/supervised.yaml"])
        'output/digits_supervised'
        >>> output_folder(["configs/coco/unbiased_teacher.yaml", "configs/coco/10pct.yaml",
        ...                "configs/averaging/imwa.yaml"])
        'output/coco_unbiased_teacher_10pct_imwa'
        >>> output_folder(["mine.yaml"])
        'output/mine'
    """
    folder = Path(paths[0]).parent.name
    names = [Path(path).stem for path in paths]
    return "output/" + "_".join(names if folder in ("", "..") else [folder, *names])
