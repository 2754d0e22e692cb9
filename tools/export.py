#!/usr/bin/env python
"""Export a trained detector as one state dict that torchvision loads without this package.

Examples:
  a finished run    %(prog)s output/digits_unbiased_teacher_imwa --output detector.pth
  one of its files  %(prog)s RUN_DIR/model_averaged.pth --output detector.pth

Takes the averaged EMA model (the student if the method has no EMA or burn-in is not over), and
prints the SHA-256 of the written file and the Python lines that load it.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from ssod_imwa.cli import run_main
from ssod_imwa.config import load_config
from ssod_imwa.detection.build import build_detector
from ssod_imwa.detection.detectors.export import exported_state, loading_code
from ssod_imwa.detection.detectors.pretrained import CLASSIFIER
from ssod_imwa.engine.atomic import damage, load_checkpoint, write_checkpoint
from ssod_imwa.engine.output import FINAL
from ssod_imwa.errors import CheckpointError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_DIR|CHECKPOINT",
        help=f"OUTPUT_DIR of a finished run, or its {FINAL} or model_averaged.pth",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write, such as x.pth"
    )
    return parser.parse_args()


def read_models(source: Path) -> tuple[Path, Mapping[str, Any]]:
    """The checkpoint's path and its verified content."""
    path = source / FINAL if source.is_dir() else source
    reason = damage(path)
    if reason is not None:
        hint = f" (is the run finished? {FINAL} is written at its end)" if source.is_dir() else ""
        raise CheckpointError(f"{path} cannot be exported: {reason}{hint}")
    content = load_checkpoint(path)
    if not isinstance(content, Mapping) or "inference_model" not in content:
        raise CheckpointError(
            f"{path} cannot be exported: it holds no averaged model (take {FINAL} or "
            "model_averaged.pth)"
        )
    return path, content


def read_config(content: Mapping[str, Any], path: Path) -> CfgNode:
    """The run's configuration, with the checkpoint as the weights to load."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"configuration in {path.name}"
        file.write_text(content["config"], encoding="utf-8")
        cfg = load_config(file).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(path)
    return cfg


def main() -> None:
    """Write the file and say how to load it."""
    arguments = parse_arguments()
    path, content = read_models(arguments.source)
    cfg = read_config(content, path)
    model = content["inference_model"]
    detector = build_detector(cfg, num_classes=len(content[model][CLASSIFIER]) - 1)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(arguments.output, exported_state(detector))
    digest = hashlib.sha256(arguments.output.read_bytes()).hexdigest()
    print(f"{arguments.output}: the {model} of {path}")
    print(f"sha256 {digest}\n")
    print("# Class 0 is background; labels count from 1.")
    print(
        loading_code(
            detector,
            str(arguments.output),
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
        ),
        end="",
    )


if __name__ == "__main__":
    run_main(main)
