"""Whether short runs still end in the very weights that they ended in before a change.

Examples:
  compare with what is recorded for this machine  python tests/digests.py
  record, at the revision before the change       python tests/digests.py --record

Six recipes cover both tasks: two detection methods, and the losses, mixing, contrastive views,
experts, EMA and averages of classification. Bits depend on the processor and on torch, so digests
are kept for each pair of them in digests.json. Takes two minutes on one core; exit status 1 when a
digest differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests/digests.json"
SHORT_DETECTION = ["SOLVER.MAX_ITER", "12", "SOLVER.WARMUP_ITERS", "4"]
SHORT_TEACHER = ["SSOD.BURN_IN_ITERS", "4", "SSOD.BBOX_THRESHOLD", "0.1", "IMWA.EPISODES", "3"]
SHORT_CLASSIFICATION = ["CLS.SCHEDULE.EPOCHS", "2", "CLS.SCHEDULE.WARMUP", "0.5"]
RECIPES = {
    "digits supervised": ["configs/digits/supervised.yaml", *SHORT_DETECTION],
    "digits unbiased_teacher + imwa": [
        *("configs/digits/unbiased_teacher_imwa.yaml", *SHORT_DETECTION, *SHORT_TEACHER),
    ],
    "digit images cross_entropy + imwa + ema": [
        *("configs/digit_images/cross_entropy.yaml", "configs/digit_images/imwa.yaml"),
        *("configs/digit_images/ema.yaml", *SHORT_CLASSIFICATION),
    ],
    "digit images mfw": ["configs/digit_images/mfw.yaml", *SHORT_CLASSIFICATION],
    "digit images bcl + imwa": [
        *("configs/digit_images/bcl.yaml", "configs/digit_images/imwa.yaml"),
        *SHORT_CLASSIFICATION,
    ],
    "digit images ecl": ["configs/digit_images/ecl.yaml", *SHORT_CLASSIFICATION],
}


def environment() -> str:
    """What bits depend on beside this repository."""
    cpu = platform.processor()
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        names = [x for x in lines.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def digest(model_file: Path) -> str:
    """SHA-256 of the names and bytes of all tensors of all models."""
    content = torch.load(model_file, map_location="cpu", weights_only=True)
    result = hashlib.sha256()
    for model in sorted(key for key, value in content.items() if isinstance(value, dict)):
        for name, tensor in sorted(content[model].items()):
            result.update(f"{model} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            result.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def train(arguments: list[str], output: Path) -> str:
    """Train a recipe in a process of its own; the digest of what it ends with."""
    command = [sys.executable, "tools/train_net.py", "--config-file", *arguments]
    command += ["OUTPUT_DIR", str(output), "MODEL.DEVICE", "cpu"]
    # One thread: sums in another order round differently.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return digest(output / "model_final.pth")


def main() -> int:
    """Train all recipes, then record or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="keep the digests of this revision")
    arguments = parser.parse_args()
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known = records.get(environment())
    if known is None and not arguments.record:
        print(f"nothing is recorded for {environment()}: run --record at the revision before")
        return 2
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            found[name] = train(recipe, Path(folder) / name.replace(" ", "_"))
            same = (
                "" if arguments.record else ("  same" if found[name] == known[name] else "  OTHER")
            )
            print(f"{found[name][:16]}  {name}{same}", flush=True)
    if arguments.record:
        RECORD.write_text(json.dumps(records | {environment(): found}, indent=1) + "\n")
        return 0
    return int(found != known)


if __name__ == "__main__":
    sys.exit(main())
