"""The example and the benchmarks run and say what they promise."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_example_trains_and_averages():
    results = load(ROOT / "examples/imwa_in_plain_pytorch.py").main()
    assert len(results) == 5
    for members, averaged in results:
        assert len(members) == 2
        assert averaged >= min(members)
    # Shown in its docstring; the last digits depend on the machine.
    assert results[0][1] == pytest.approx(73.9, abs=2)
    assert results[-1][1] == pytest.approx(79.7, abs=2)


@pytest.mark.slow
def test_benchmark_writes_its_table(tmp_path, capsys):
    output = tmp_path / "averaging.json"
    benchmark = load(ROOT / "benchmarks/averaging.py")
    arguments = ["--device", "cpu", "--models", "small", "--repeats", "1", "--members", "3"]
    benchmark.main([*arguments, "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["hardware"]["copy_gigabytes_per_second"] > 0
    assert {row["operation"] for row in written["rows"]} == {"average", "re-seed", "EMA step"}
    assert all(row["milliseconds"] > 0 for row in written["rows"])
    assert capsys.readouterr().out.count("\n") == 2 + len(written["rows"])


@pytest.mark.slow
def test_overhead_benchmark_sees_what_a_second_member_holds(tmp_path):
    output = tmp_path / "overhead.json"
    command = [sys.executable, str(ROOT / "benchmarks/imwa_overhead.py"), "--small-images"]
    settings = ["--device", "cpu", "--steps", "1", "--episodes", "2", "--members", "1", "2"]
    subprocess.run([*command, *settings, "--output", str(output)], check=True, capture_output=True)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["store"], row["members"]) for row in rows] == [
        (store, members) for store in ("dict", "stream") for members in (1, 2)
    ]
    for plain, imwa in (rows[:2], rows[2:]):
        assert imwa["boundary_seconds"] > plain["boundary_seconds"]
    # A dict holds the finished member's student and teacher; a stream's float64 sum is twice that.
    for number, copies in ((0, 1), (2, 2)):
        extra = rows[number + 1]["peak_bytes"] - rows[number]["peak_bytes"]
        assert extra == pytest.approx(copies * rows[0]["pair_bytes"], rel=0.05)
