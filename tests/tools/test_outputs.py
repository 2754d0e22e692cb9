"""Where nothing can be written, each command says so in a line, before it has worked for long."""

import json

import pytest

from ssod_imwa.runs.results import Evaluation, Results, write_results

# Commands that write a file, or into a folder: OUT.
SPLITS = ("coco:all.json:images", "--root", "RUN", "--percent", 50)
FILES = {
    "average_checkpoints": ("RUN", "RUN", "--output", "OUT"),
    "export": ("RUN", "--output", "OUT"),
    "extract_features": ("digit_images_test", "--output", "OUT"),
    "keys": ("--write", "OUT"),
    "prepare_splits": (*SPLITS, "--output", "OUT"),
    "report": ("RUN", "--no-models", "--output", "OUT"),
}
FOLDERS = {
    "analyze": ("calibration", "RUN", "--output", "OUT"),
    "plot_results": ("RUN", "--output", "OUT"),
    "predict": ("RUN", "RUN", "--output", "OUT"),
    "prepare_digits": ("--root", "OUT", "--train-scenes", 10, "--test-scenes", 10),
    "prepare_splits": (*SPLITS, "--format", "coco", "--output", "OUT"),
    "reproduce": ("configs/tables/digits_demo.yaml", "--output", "OUT"),
    "train_net": ("--config-file", "configs/digit_images/cross_entropy.yaml", "OUTPUT_DIR", "OUT"),
    "visualize": ("RUN", "--output", "OUT"),
}


@pytest.fixture
def run_dir(tmp_path, write_image):
    """What a run of one step wrote, but for its models, and a data set."""
    folder = tmp_path / "run"
    folder.mkdir()
    evaluations = (Evaluation("student", "final", 0, None, {"AP": 10.0}),)
    imwa = {"members": 1, "episodes": 1}
    results = Results("detection", "some", "supervised", imwa, 1, 1, 1.0, 1, evaluations)
    write_results(folder / "results.json", results)
    (folder / "metrics.json").write_text(json.dumps({"iteration": 0, "total_loss": 1.0}))
    for i in range(2):
        write_image(folder / f"images/{i}.png", 9, 9)
    images = [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 9} for i in range(2)]
    box = {"category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    boxes = [{"id": i, "image_id": i, **box} for i in range(2)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "all.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def refused(call, run_dir, tmp_path):
    """A function that runs a command; the line that it prints, once it was seen to be all."""

    def run(tool, arguments, output):
        words = {"RUN": run_dir, "OUT": output}
        before = sorted(tmp_path.rglob("*"))
        status, out, error = call(tool, *(words.get(x, x) for x in arguments))
        assert (status, out) == (2, ""), error
        assert sorted(tmp_path.rglob("*")) == before
        (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert error.endswith(f"{line}\n")
        return line

    return run


@pytest.mark.parametrize("depth", ["x", "deep/x"])
@pytest.mark.parametrize(("tool", "arguments"), [*FILES.items(), *FOLDERS.items()])
def test_a_path_below_a_file_is_named(refused, tmp_path, tool, arguments, depth):
    (tmp_path / "file").write_text("mine")
    line = refused(tool, arguments, tmp_path / "file" / depth)
    assert str(tmp_path / "file") in line
    assert "Not a directory" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("tool", "arguments"), [*FILES.items(), *FOLDERS.items()])
def test_a_folder_that_takes_nothing_is_named(refused, tool, arguments):
    """As a read-only one, which a superuser could write to."""
    line = refused(tool, arguments, "/proc/x")
    assert "/proc" in line
    assert "No such file or directory" in line


@pytest.mark.parametrize(("tool", "arguments"), FILES.items())
def test_a_folder_is_no_file(refused, run_dir, tool, arguments):
    line = refused(tool, arguments, run_dir)
    assert f"{run_dir} is there already" in line or f"{run_dir} cannot be written: Is a" in line


@pytest.mark.parametrize(("tool", "arguments"), FOLDERS.items())
def test_a_file_is_no_folder(refused, run_dir, tool, arguments):
    file = run_dir / "results.json"
    line = refused(tool, arguments, file)
    assert str(file) in line
    assert "is there already" in line or "Not a directory" in line


def test_the_folder_of_a_run_may_be_unwritable_too(refused, run_dir):
    (run_dir / "pictures").write_text("")
    (run_dir / "report.html").mkdir()
    for tool, arguments in (("analyze", ("tau", "RUN")), ("visualize", ("RUN",))):
        assert f"{run_dir}/pictures cannot be written: Not a" in refused(tool, arguments, "")
    line = refused("report", ("RUN", "--no-models"), "")
    assert line == f"error: {run_dir}/report.html cannot be written: Is a directory"
    (run_dir / "training.png").mkdir()
    assert f"{run_dir}/training.png cannot be" in refused("plot_results", ("RUN",), "")
