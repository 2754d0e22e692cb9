import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ssod_imwa.analysis.snapshots import course_of, last_rate, last_students, measured_figure
from ssod_imwa.errors import UserError
from ssod_imwa.runs import run
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import Evaluation, Results, write_results
from ssod_imwa.runs.trained import read_trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def advise(call):
    return partial(call, "advise")


@pytest.fixture
def plain(digits_config):
    """A run of one member that keeps its last four checkpoints."""

    def train(*overrides, output="run"):
        cfg = digits_config(
            *("SOLVER.MAX_ITER", 8, "IMWA.EPISODES", 8, "SOLVER.CHECKPOINT_KEEP", 3),
            *("SOLVER.IMS_PER_BATCH", 16, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.02),
            *("CLS.IMBALANCE.RATIO", 10, "DATALOADER.NUM_WORKERS", 0),
            *overrides,
            output=output,
        )
        run.train(cfg)
        return cfg

    return train


def top1(cfg, weights):
    """By a loop over the test images."""
    task = open_task(cfg)
    model = task.load_model(str(Path(cfg.OUTPUT_DIR, "model_final.pth"))).eval()
    model.load_state_dict(weights)
    right = []
    with torch.no_grad():
        for batch in task.test_batches(task.data.tests[0]):
            right += (model(batch.views["image"]).argmax(1) == batch.targets).tolist()
    return 100 * float(np.mean(right))


def checkpoints(cfg):
    """Students of the resume files, oldest first."""
    files = sorted(Path(cfg.OUTPUT_DIR).glob("model_0*.pth"))
    return [torch.load(f, weights_only=True)["trainer"]["models"]["student"] for f in files]


def test_the_mean_of_snapshots_is_measured_beside_the_last(advise, plain):
    cfg = plain()
    students = checkpoints(cfg)
    assert len(students) == 4
    means = {k: torch.stack([x[k].double() for x in students[-3:]]).mean(0) for k in students[0]}
    mean = {k: value.to(students[0][k].dtype) for k, value in means.items()}
    status, out, error = advise(cfg.OUTPUT_DIR, "--last", 3)
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert lines[1].startswith("warning: digit_images_test is of the run's DATASETS.TEST")
    assert lines[2] == (
        f"top1 on digit_images_test: student {top1(cfg, students[-1]):.2f}, mean of the last 3 "
        f"students {top1(cfg, mean):.2f}"
    )
    questions = [line.split("  ")[0] for line in lines[3:]]
    assert questions == ["longer run", "lower rate", "EMA", "LAWA", "IMWA", "advice"]
    status, out, _ = advise(cfg.OUTPUT_DIR, "--last", 1, "--dataset", "digit_images_train")
    assert "warning" not in out
    assert "only one snapshot" in out
    for metric, message in (("AP", "must be one of top1"), ("ece", "of which more is better")):
        status, _, error = advise(cfg.OUTPUT_DIR, "--metric", metric)
        assert (status, message in error.splitlines()[-1]) == (2, True), error


@pytest.mark.slow
def test_batch_norms_of_the_mean_are_re_estimated_if_asked(advise, plain):
    cfg = plain("SOLVER.BASE_LR", 0.2)
    measured = [advise(cfg.OUTPUT_DIR, "--bn-batches", n)[1].splitlines()[2] for n in (0, 8)]
    students = [line.partition(", mean")[0] for line in measured]
    assert students[0] == students[1]
    assert measured[0] != measured[1]


@pytest.mark.slow
def test_an_ema_and_snapshots_of_the_classifier_are_found(advise, plain):
    cfg = plain("CLS.EMA_DECAY", 0.5, "CLS.SNAPSHOT_PERIOD", 1)
    students = last_students(cfg.OUTPUT_DIR, 100)
    assert len(students) == 8
    for student, older in zip(students, reversed(checkpoints(cfg)), strict=False):
        assert all(torch.equal(student[name], older[name]) for name in student)
    assert len(last_students(cfg.OUTPUT_DIR, 2)) == 2
    out = advise(cfg.OUTPUT_DIR)[1]
    teacher = top1(cfg, read_trained(cfg.OUTPUT_DIR).models["teacher"])
    assert f", teacher {teacher:.2f}, mean of the last 5" in out


@pytest.mark.slow
def test_of_a_run_that_kept_one_checkpoint_its_own_lawa_is_taken(advise, plain):
    cfg = plain("IMWA.LAWA", 3, "SOLVER.CHECKPOINT_KEEP", 1)
    for path in Path(cfg.OUTPUT_DIR).glob("model_0*.pth"):
        path.unlink()
    mean = torch.load(Path(cfg.OUTPUT_DIR, "model_lawa.pth"), weights_only=True)["student"]
    out = advise(cfg.OUTPUT_DIR)[1]
    assert f", mean of the last 3 students {top1(cfg, mean):.2f}" in out


@pytest.mark.slow
def test_a_detector_is_measured_by_its_ap(advise, detection_config):
    cfg = detection_config("IMWA.EPISODES", 4, "SOLVER.CHECKPOINT_KEEP", 3)
    run.train(cfg)
    status, out, _ = advise(cfg.OUTPUT_DIR, "--metric", "AP50")
    assert (status, "AP50 on coco:test.json:test: student" in out) == (0, True)


@pytest.mark.parametrize(
    ("asked", "why"), [(0, "without IMWA.ADVISE"), (10, "and no average of two that were finite")]
)
def test_of_averages_that_were_not_measured_the_reason_is_named(advise, tmp_path, asked, why):
    final = Evaluation("student", "final", 0, None, {"top1": 6.0}, 3, 1)
    imwa = {"members": 2, "episodes": 1, "advise": asked}
    results = Results("classification", "some", "some", imwa, 1, 2, 1.0, 1, (final,))
    write_results(tmp_path / "results.json", results)
    (tmp_path / "metrics.json").write_text('{"total_loss": 1, "episode": 0}\n')
    status, _, error = advise(tmp_path)
    assert status == 2
    assert f"is a run of 2 members {why} (only runs of one" in error


@pytest.mark.slow
def test_of_several_members_the_lines_of_training_are_shown(advise, plain):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "SOLVER.MAX_ITER", 4)
    advised = plain(*settings, "IMWA.ADVISE", 10, output="advised")
    status, out, _ = advise(advised.OUTPUT_DIR)
    begins = [line.partition(": ")[0] for line in out.splitlines()[1:]]
    assert (status, begins) == (0, ["average of episode 1", "average of episode 2"])
    _, with_dataset, _ = advise(advised.OUTPUT_DIR, "--dataset", "digit_images_test")
    note = "nothing is measured afterwards of several members: these lines are of training"
    assert with_dataset.splitlines() == [*out.splitlines()[:1], note, *out.splitlines()[1:]]
    status, _, error = advise(plain(*settings, output="silent").OUTPUT_DIR)
    assert status == 2
    assert "is a run of 2 members without IMWA.ADVISE" in error


def test_what_could_not_be_measured_is_named():
    with pytest.raises(UserError, match=r"APs could not be measured on pets_val, which has noth"):
        measured_figure({"AP": 40.0, "APs": float("nan")}, "APs", "pets_val")
    with pytest.raises(UserError, match=r"--metric top1 is not allowed \(must be one of AP\)"):
        measured_figure({"AP": 40.0}, "top1", "pets_val")


def test_the_trend_is_of_the_metric_that_was_asked_for():
    rows = [(9, {"a/AP": 1.0, "a/AP50": 3.0, "b/AP": 5.0}), (19, {"a/AP": 2.0, "a/AP50": 4.0})]
    evaluations = [
        *(Evaluation("student", "running", 0, 0, metrics, t, t) for t, metrics in rows),
        Evaluation("student", "final", 0, None, {"a/AP50": 6.0, "b/AP": 7.0, "a/AP": 8.0}, 29, 29),
    ]
    imwa = {"members": 1, "episodes": 1}
    results = Results("detection", "some", "supervised", imwa, 1, 30, 1.0, 1, tuple(evaluations))
    assert course_of(results, "AP50") == [(10, 3.0), (20, 4.0), (30, 6.0)]
    assert course_of(results, "b/AP") == course_of(results, "AP") == [(10, 5.0), (30, 7.0)]
    assert course_of(results, "ECE") == []


@pytest.mark.slow
def test_a_data_set_without_objects_measures_nothing(advise, detection_config, root):
    cfg = detection_config("IMWA.EPISODES", 4)
    run.train(cfg)
    content = json.loads((root / "test.json").read_text())
    (root / "none.json").write_text(json.dumps({**content, "annotations": []}))
    for option in ("--dataset", "--training-set"):
        status, _, error = advise(cfg.OUTPUT_DIR, option, "coco:none.json:test")
        line = error.splitlines()[-1]
        assert status == 2
        assert line.startswith("error: AP could not be measured on coco:none.json:test")


def test_the_last_rate_is_a_share_of_the_highest(tmp_path):
    rows = [{"lr": 0.1}, {"lr": 0.4}, {"evaluation": 1}, {"lr": 0.1}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    assert last_rate(tmp_path) == 0.25


def test_mistakes_are_one_line(advise, tmp_path):
    (tmp_path / "metrics.json").write_text('{"loss": 1}\n')
    for arguments, message in (
        ((tmp_path / "absent",), "absent does not exist (a run writes it"),
        ((tmp_path, "--last", 0), "--last 0 is not allowed (must be at least 1)"),
        ((tmp_path, "--bn-batches", -1), "--bn-batches -1 is not allowed"),
    ):
        status, _, error = advise(*arguments)
        assert (status, message in error.splitlines()[-1]) == (2, True), error
