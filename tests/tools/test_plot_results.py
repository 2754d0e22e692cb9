import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.runs.results import Evaluation, Results, write_results


@pytest.fixture
def plot(call):
    return partial(call, "plot_results")


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    rows = [{"iteration": g, "t": g, "member": 0, "total_loss": 1.0} for g in range(3)]
    (path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add_results(run_dir):
    write_results(
        run_dir / "results.json",
        Results(
            task="detection",
            dataset="digits",
            method="supervised",
            imwa={"members": 1, "episodes": 1},
            seed=1,
            iterations=3,
            wall_time=1.0,
            peak_memory=1,
            evaluations=(Evaluation("student", "final", 0, None, {"AP": 10.0, "APs": 1.0}),),
        ),
    )


def size(path):
    with Image.open(path) as image:
        assert np.asarray(image).std() > 0  # something is drawn
        return image.size


def test_a_run_without_evaluations_has_curves_and_says_why_no_more(plot, run_dir):
    status, out, _ = plot(run_dir)
    assert status == 0
    assert "no episodes.png" in out
    assert sorted(path.name for path in run_dir.glob("*.png")) == ["training.png"]


def test_a_finished_run_has_curves_and_episodes(plot, run_dir, tmp_path):
    add_results(run_dir)
    status, out, _ = plot(run_dir, "--output", tmp_path / "plots")
    assert status == 0
    assert out.split() == [str(tmp_path / "plots" / x) for x in ("training.png", "episodes.png")]
    narrow, _ = size(tmp_path / "plots" / "episodes.png")
    plot(run_dir, "--metrics", "AP", "APs")
    assert size(run_dir / "episodes.png")[0] == 2 * narrow  # a panel for each figure


def test_classes_of_data_sets(plot, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    annotations = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [box],
    }
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    status, out, error = plot(
        "--datasets", "coco:a.json:images", "--data-root", tmp_path, "--output", tmp_path / "out"
    )
    assert (status, error) == (0, "")
    assert out.strip() == str(tmp_path / "out" / "classes.png")
    size(tmp_path / "out" / "classes.png")


def test_a_box_without_area_does_not_hide_the_classes(plot, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    boxes = [[1, 1, 9, 9], [1, 1, 0, 9]]
    annotations = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    output = tmp_path / "out"
    status, _, _ = plot(
        "--datasets", "coco:a.json:images", "--data-root", tmp_path, "--output", output
    )
    assert status == 0
    assert "skipped 1 x box without area" in caplog.text
    size(output / "classes.png")


def test_mistakes_are_one_line_and_status_2(plot, run_dir, tmp_path):
    status, _, error = plot(tmp_path / "nowhere")
    assert status == 2
    assert error.startswith("error: ")
    assert "cannot be read" in error
    add_results(run_dir)
    status, _, error = plot(run_dir, "--metrics", "APx")
    assert (status, "no figure APx" in error) == (2, True)
    assert plot()[0] == 2
    assert plot("--datasets", "digits_test")[0] == 2
    _, _, error = plot(run_dir, "--data-root", tmp_path)
    assert "--data-root is of --datasets" in error
    _, _, error = plot("--datasets", "digits_test", "--output", tmp_path, "--metrics", "AP")
    assert "--metrics is of a RUN_DIR" in error
    assert not list(run_dir.glob("*.png"))
