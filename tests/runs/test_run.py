import errno
import json
import logging
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from support import assert_equal, final_weights, mean_of, train_in_parts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.detection import build
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.detection.task import DetectionTask
from ssod_imwa.engine.hooks import LRHook
from ssod_imwa.engine.trainer import Trainer
from ssod_imwa.errors import CheckpointError, ConfigError, DataError, UserError
from ssod_imwa.runs import run
from ssod_imwa.runs.progress import build_time_left, stopped_line
from ssod_imwa.runs.results import read_results
from ssod_imwa.visualization.plots import run_figures

pytestmark = pytest.mark.usefixtures("one_thread")


DRAWN = ("DATALOADER.BATCH_RULE", "drawn", "DATALOADER.DRAWN_TOGETHER", "4")
METHODS = [
    "unbiased_teacher",
    "dense_teacher",
    pytest.param("mean_teacher", marks=pytest.mark.slow),
    pytest.param("soft_teacher", marks=pytest.mark.slow),
]


@pytest.fixture
def config(detection_config):
    return detection_config


def rows(cfg):
    """metrics.json without what depends on the clock and the machine."""
    lines = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    free = ("time", "data_time", "eta_seconds", "peak_memory_mb")
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in lines]


def test_a_run_leaves_results_models_and_curves_that_agree(config):
    cfg = config("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "TEST.EVAL_MEMBERS", True)
    assert run.train(cfg) == 0
    results = read_results(cfg.OUTPUT_DIR)
    stages = [(x.model, x.stage, x.episode, x.member) for x in results.evaluations]
    expected = [
        (model, stage, episode, member)
        for episode, last in ((0, "average"), (1, "final"))
        for stage, member in (("member", 0), ("member", 1), (last, None))
        for model in ("student", "teacher")
    ]
    assert stages == expected
    assert results.burn_in == 1
    assert run.evaluate(cfg) == pytest.approx(results.headline().metrics, nan_ok=True)
    apart = [row for row in rows(cfg) if "imwa/distance-student" in row]
    assert [(row["iteration"], row["imwa/distance-teacher"] > 0) for row in apart] == [
        *((3, True), (7, True))
    ]
    steps = [row["iteration"] for row in rows(cfg) if "total_loss" in row]
    assert steps == list(range(8))


@pytest.mark.parametrize("method", METHODS)
def test_one_member_is_plain_training_whatever_the_episodes(config, method):
    plain = config("SSOD.ALGORITHM", method, output="plain")
    cut = config("SSOD.ALGORITHM", method, "IMWA.EPISODES", 3, output="cut")
    for cfg in (plain, cut):
        run.train(cfg)
    assert_equal(final_weights(plain), final_weights(cut))


def test_one_episode_is_the_mean_of_separate_runs(config):
    together = config("IMWA.MEMBERS", 2, output="together")
    alone = [config("IMWA.FIRST_MEMBER", m, output=f"member{m}") for m in range(2)]
    for cfg in (together, *alone):
        run.train(cfg)
    first, second = (final_weights(cfg) for cfg in alone)
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert_equal(final_weights(together), mean_of(first, second))


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        pytest.param("unbiased_teacher", 1, marks=pytest.mark.slow),
        ("unbiased_teacher", 3),  # the first step of the second member
        pytest.param("unbiased_teacher", 5, marks=pytest.mark.slow),
        # The first member's second step on dense labels.
        pytest.param("dense_teacher", 5, marks=pytest.mark.slow),
        # The middle of the second episode's first member.
        pytest.param("mean_teacher", 4, marks=pytest.mark.slow),
        pytest.param("soft_teacher", 4, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(config, method, stop):
    settings = ("SSOD.ALGORITHM", method, "IMWA.MEMBERS", 2, "IMWA.EPISODES", 2)
    settings += ("SOLVER.OPTIMIZER", "AdamW")
    if method == "soft_teacher":
        settings += DRAWN
    whole, parts = config(*settings, output="whole"), config(*settings, output="parts")
    run.train(whole)
    train_in_parts(parts, stop)
    assert_equal(final_weights(whole), final_weights(parts))
    assert rows(whole) == rows(parts)
    first, second = (read_results(cfg.OUTPUT_DIR).evaluations for cfg in (whole, parts))
    assert str(first) == str(second)  # as text: NaN is not equal to itself


@pytest.mark.slow  # two worker processes import torch
def test_worker_processes_change_nothing(config):
    alone, helped = config(output="alone"), config("DATALOADER.NUM_WORKERS", 2, output="helped")
    for cfg in (alone, helped):
        run.train(cfg)
    assert_equal(final_weights(alone), final_weights(helped))


def test_a_resume_with_other_settings_is_refused_and_names_them(config):
    run.train(config())
    changed = config("SEED", 7, "SOLVER.BASE_LR", 0.5, "LOG_PERIOD", 9)
    with pytest.raises(CheckpointError, match=r"SEED \(saved 1, now 7\)") as caught:
        run.train(changed, resume_from=True)
    assert "SOLVER.BASE_LR" in str(caught.value)
    assert "LOG_PERIOD" not in str(caught.value)


def test_a_used_output_folder_is_refused_and_left_alone(config):
    cfg = config()
    run.train(cfg)
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(cfg.OUTPUT_DIR)}
    with pytest.raises(CheckpointError, match="--resume"):
        run.train(cfg)
    after = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(cfg.OUTPUT_DIR)}
    assert before == after


def test_an_overwriting_run_that_does_no_step_leaves_every_file_alone(config, monkeypatch):
    def files(cfg):
        found = Path(cfg.OUTPUT_DIR).iterdir()
        return {p.name: p.read_bytes() for p in found if not p.name.startswith("events.")}

    cfg = config()
    run.train(cfg)
    before = files(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(LRHook, "before_step", lambda hook: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train(config("SEED", 7), overwrite=True)
    assert files(cfg) == before
    run.train(config("SEED", 7), overwrite=True)
    assert {name for name, content in files(cfg).items() if before[name] == content} <= {
        "last_checkpoint",
        ".run.lock.guard",  # empty, and never removed
    }


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["MODEL.DEVICE", "cuda"], UserError, "no GPU is found"),
        (["MODEL.DEVICE", "warp"], UserError, "must be auto, cpu, cuda or cuda:N"),
        (["DATASETS.TRAIN", "[]"], ConfigError, "DATASETS.TRAIN"),
        (["DATASETS.TEST", "[]"], ConfigError, "DATASETS.TEST"),
        (["DATASETS.TRAIN", "['digit_train']"], DataError, "digits_train"),
        (["DATASETS.SPLIT.PERCENT", "100"], ConfigError, "no unlabeled images"),
        (["DATASETS.SPLIT.PERCENT", "1"], DataError, "percent"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "5"], ConfigError, "has 2 classes"),
        (["MODEL.WEIGHTS", "absent.pth"], UserError, "absent.pth"),
        (["INPUT.MIN_SIZE_TRAIN", "[100]", "INPUT.MAX_SIZE_TRAIN", "50"], ConfigError, "INPUT"),
        (["DATALOADER.BATCH_RULE", "drawn"], ConfigError, r"TOGETHER = 5 .* multiple of 5"),
        (
            [*DRAWN, "SOLVER.ACCUMULATION_STEPS", "2"],
            ConfigError,
            "ACCUMULATION_STEPS = 2 is not allowed with DATALOADER.BATCH_RULE = 'drawn'",
        ),
    ],
)
def test_bad_input_stops_before_anything_is_written(config, settings, error, message):
    cfg = config(*settings)
    with pytest.raises(error, match=message):
        run.train(cfg)
    assert not os.path.exists(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))


@pytest.mark.parametrize(("overrides", "images"), [([], 4), (["SSOD.ALGORITHM", "supervised"], 2)])
def test_out_of_memory_counts_the_images_that_are_read(config, monkeypatch, overrides, images):
    def exhaust(trainer):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Trainer, "train", exhaust)
    message = rf"out of memory .* and {images} images an iteration \(Tried to allocate 2 GiB\)"
    with pytest.raises(UserError, match=message):
        run.train(config(*overrides))


def test_a_test_image_that_is_cut_off_stops_the_run_before_it_trains(config, root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    image = tmp_path / "data" / "test" / "2.png"
    image.write_bytes(image.read_bytes()[:-200])
    cfg = config("DATASETS.ROOT", tmp_path / "data", "DATASETS.ON_BAD_RECORD", "skip")
    with pytest.raises(DataError, match=re.escape(f"image {image} cannot be read")):
        run.train(cfg)
    assert not os.path.exists(cfg.OUTPUT_DIR)


def test_recomputed_batch_norms_are_those_of_the_first_batch(config):
    cfg = config("SSOD.ALGORITHM", "supervised", "SSOD.STRONG_LABELED", False)
    task = DetectionTask(cfg)
    detector = build_detector(task.cfg, 2).eval()
    norm = next(m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
    reads = {"labeled": ("weak",)}
    batches = task.build_batches(EpisodeSchedule(4), torch.device("cpu"), reads)
    task.build_bn_recomputation(batches, count=1)({"student": detector})
    assert not any(module.training for module in detector.modules())
    assert len(seen) == 1
    torch.testing.assert_close(norm.running_mean.double(), seen[0].mean((0, 2, 3)))
    # fvcore estimates the population's variance, without Bessel's correction.
    torch.testing.assert_close(norm.running_var.double(), seen[0].var((0, 2, 3), correction=0))


def test_swapped_categories_are_refused_by_resume_and_evaluation(config, root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    cfg = config("SSOD.ALGORITHM", "supervised", "DATASETS.ROOT", tmp_path / "data")
    run.train(cfg)
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}.json"
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry["category_id"] = 3 - entry["category_id"]
        path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"differs in labeled images \(saved .*\); undo"):
        run.train(cfg, resume_from=True)
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}.json"
        path.write_text(path.read_text().replace('"dark"', '"gray"'))
    with pytest.raises(CheckpointError, match="label 0 is 'dark' there and 'gray' here"):
        run.evaluate(cfg)


def test_a_plain_run_is_evaluated_by_its_iterations_without_a_changed_bit(config):
    plain = config("SOLVER.MAX_ITER", 5, output="plain")
    often = config("SOLVER.MAX_ITER", 5, "TEST.EVAL_PERIOD", 2, output="often")
    for cfg in (plain, often):
        run.train(cfg)
    assert_equal(final_weights(plain), final_weights(often))
    results = read_results(often.OUTPUT_DIR)
    students = [(x.stage, x.t) for x in results.evaluations if x.model == "student"]
    assert students == [("running", 1), ("running", 3), ("final", 4)]
    assert results.headline().stage == "final"


@pytest.mark.parametrize(
    ("period", "expected"), [(4, [("final", 3)]), (1, [("running", t) for t in range(3)])]
)
def test_the_last_iteration_is_evaluated_once(config, period, expected):
    cfg = config("TEST.EVAL_PERIOD", period)
    run.train(cfg)
    results = read_results(cfg.OUTPUT_DIR)
    students = [(x.stage, x.t) for x in results.evaluations if x.model == "student"]
    assert students == (expected if period == 4 else [*expected, ("final", 3)])


def test_members_are_evaluated_by_their_own_iterations(config):
    cfg = config("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "TEST.EVAL_PERIOD", 1)
    run.train(cfg)
    running = [
        (x.episode, x.member, x.t)
        for x in read_results(cfg.OUTPUT_DIR).evaluations
        if x.stage == "running" and x.model == "student"
    ]
    assert running == [
        (e, m, t) for e, ts in ((0, (0, 1)), (1, (2, 3))) for m in (0, 1) for t in ts
    ]


def test_a_resumed_run_has_the_same_evaluations(config):
    settings = ("TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 4)
    whole, parts = config(*settings, output="whole"), config(*settings, output="parts")
    run.train(whole)
    train_in_parts(parts, 2)
    first, second = (read_results(cfg.OUTPUT_DIR) for cfg in (whole, parts))
    assert str(first.evaluations) == str(second.evaluations)
    assert str(first.summary()) == str(second.summary())


def test_what_is_trained_is_said_at_the_start(config, caplog):
    caplog.set_level(logging.INFO)
    run.train(config("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "SOLVER.MAX_ITER", 2))
    start = caplog.messages[: caplog.messages.index(f"output folder: {config().OUTPUT_DIR}")]
    assert start[-5:] == [
        "detection: unbiased_teacher on coco:train.json:train 50 %, tested on coco:test.json:test",
        "images: 4 labeled, 4 unlabeled, 4 tested",
        "classes: 2 (dark, bright)",
        "device: cpu (1 thread)",
        "schedule: 2 iterations of each of 2 members, 4 global steps in all, in 2 episodes; "
        "2 + 2 images an iteration",
    ]


def test_the_time_left_counts_what_this_run_will_do(config, monkeypatch):
    """Phases of the method, and evaluations of two members and their average in two episodes."""
    built = []

    def build(*arguments):
        built.append(build_time_left(*arguments))
        return built[0]

    monkeypatch.setattr(run, "build_time_left", build)
    cfg = config("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "TEST.EVAL_MEMBERS", True)
    run.train(cfg)
    (left,) = built
    # Labeled: 2 views of 2 images with gradients; unlabeled: 1 view of the teacher, 1 learned.
    assert (left._starts, left._work) == ([0, 1], [12.0, 12.0 + 2 * 4])
    assert left._evaluation_work == 4
    # Of student and teacher: members before their row, averages after it; steps count from 0.
    assert left._evaluations == [2, 2, 6, 6, 7, 7, 10, 10, 14, 14, 15, 15]
    assert len(left._evaluated) == 12
    assert [row["eta_seconds"] > 0 for row in eta_rows(cfg)] == [True] * 8


def eta_rows(cfg):
    lines = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "total_loss" in row]


def test_a_run_that_was_stopped_before_its_first_checkpoint_says_so(tmp_path):
    line = stopped_line([tmp_path / "generation1", tmp_path], "python tools/train_net.py --resume")
    assert line == f"{tmp_path} holds no checkpoint yet: the run has to begin anew"


def test_a_run_that_was_stopped_in_a_generation_names_the_checkpoint_there(tmp_path):
    folders = [tmp_path / "generation1", tmp_path / "generation2", tmp_path]
    for folder in folders[:2]:
        folder.mkdir()
        (folder / "model_0000007.pth").touch()
    line = stopped_line(folders, "COMMAND")
    checkpoint = folders[1] / "model_0000007.pth"
    assert line == f"{checkpoint} is the checkpoint of global step 8; go on with: COMMAND"


def test_divergence_is_a_users_error_of_one_line(config):
    with pytest.raises(UserError, match="loss or gradient is not finite at global step") as caught:
        run.train(config("SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0))
    assert "\n" not in str(caught.value)
    assert "SOLVER.BASE_LR" in str(caught.value)


@pytest.mark.parametrize("after_writing", ["results.json", "model_0000001.pth"])
def test_an_output_folder_that_is_removed_is_a_users_error(config, monkeypatch, after_writing):
    """Whoever writes next: the checkpoint, or results.json where an evaluation comes first."""
    cfg = config("IMWA.EPISODES", 4, "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_EPISODES", 2)
    replace = os.replace

    def and_remove(source, target):
        replace(source, target)
        if Path(target).name == after_writing:
            shutil.rmtree(cfg.OUTPUT_DIR)
            monkeypatch.setattr(os, "replace", replace)

    monkeypatch.setattr(os, "replace", and_remove)
    with pytest.raises(CheckpointError, match="was removed while the run wrote to it") as caught:
        run.train(cfg)
    assert str(cfg.OUTPUT_DIR) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, CheckpointError), (5, OSError)])
def test_a_full_disk_is_a_users_error_whichever_file_meets_it(config, monkeypatch, code, expected):
    def full(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("ssod_imwa.engine.writers.JSONWriter.write", full)
    with pytest.raises(expected, match=os.strerror(code)):
        run.train(config())


@pytest.mark.parametrize("where", ["build_data", "build_detector"])
def test_a_signal_at_start_up_leaves_no_lock(config, monkeypatch, caplog, where):
    module = "build" if where == "build_data" else "task"
    name = f"ssod_imwa.detection.{module}.{where}"
    monkeypatch.setattr(name, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    cfg = config()
    with pytest.raises(SystemExit) as stop:
        run.train(cfg)
    assert stop.value.code == 143
    assert not Path(cfg.OUTPUT_DIR, "run.lock").exists()
    assert "SIGTERM received outside training" in caplog.text


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGINT), (signal.SIGHUP,) * 2])
def test_the_lock_goes_with_a_second_signal(config, monkeypatch, signals):
    cfg = config()
    pid = os.fork()
    if pid == 0:
        send = partial(os.kill, os.getpid())
        monkeypatch.setattr(SupervisedLoss, "__call__", lambda *_: list(map(send, signals)))
        run.train(cfg)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signals[1]
    assert not Path(cfg.OUTPUT_DIR, "run.lock").exists()
    assert not list(Path(cfg.OUTPUT_DIR).glob("*.pth"))


def test_a_run_says_what_its_teacher_taught_and_judges_it_by_the_hidden_truth(config):
    """Half of the images lost their labels to the split, so the truth of all labels is known."""
    cfg = config("SOLVER.MAX_ITER", 4, "SSOD.PICTURE_PERIOD", 2)
    run.train(cfg)
    output = Path(cfg.OUTPUT_DIR)
    taught = [row for row in rows(cfg) if "labels/per_image" in row]
    assert [row["t"] for row in taught] == [1, 2, 3]  # burn-in is one iteration
    for row in taught:
        assert row["labels/per_image"] == pytest.approx(row["pseudo_boxes"])
        assert 0 <= row["labels/recall"] <= 100
        assert sum(row[f"labels/scores-0.{tenth}"] for tenth in range(10)) == pytest.approx(100)
    counts = read_results(output).class_counts
    assert sum(counts.values()) == len(DetectionTask(cfg).data.labeled)  # a box each
    pictures = sorted(path.name for path in (output / "pseudo_labels").iterdir())
    assert pictures == ["member0_t0000001.png", "member0_t0000003.png"]
    assert {"labels.png"} <= run_figures(output).keys()


def points_of(folder):
    """Steps of each TensorBoard scalar, in the order in which it is drawn."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def points_in_rows(cfg):
    points = {}
    for row in rows(cfg):
        for name in (name for name, value in row.items() if (name, value) != ("member", None)):
            points.setdefault(name, []).append(row["iteration"])
    return points


@pytest.mark.slow
@pytest.mark.parametrize("evaluation", [3, 4])
def test_tensorboard_shows_no_point_twice_after_a_kill_in_an_evaluation(
    config, monkeypatch, evaluation
):
    """Student and teacher are evaluated after each of 4 steps; the second time is cut short."""
    cfg = config("IMWA.EPISODES", 4, "SSOD.BURN_IN_ITERS", 0)
    evaluate, calls = build.evaluate_detections, []

    def killing(*arguments, **options):
        calls.append(1)
        if len(calls) == evaluation:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(*arguments, **options)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(build, "evaluate_detections", killing)
        run.train(cfg)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert run.train(cfg, resume_from=True) == 0
    for _ in range(2):  # a finished run has nothing to add
        points = {
            name: steps
            for name, steps in points_of(cfg.OUTPUT_DIR).items()
            if name not in ("time", "data_time", "eta_seconds", "peak_memory_mb")
        }
        expected = points_in_rows(cfg)
        del expected["iteration"]
        assert points == expected
        assert points["average/teacher/AP"] == [0, 1, 2, 3]
        assert run.train(cfg, resume_from=True) == 0


def test_resuming_what_has_not_begun_begins_it(config, caplog):
    caplog.set_level("INFO")
    cfg = config()
    assert run.train(cfg, resume_from=True) == 0
    line = f"no checkpoint in {cfg.OUTPUT_DIR}: training starts from its beginning"
    assert line in caplog.messages


def test_a_folder_without_a_checkpoint_cannot_be_resumed_from(config, tmp_path):
    cfg = config()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
        run.train(cfg, resume_from=tmp_path / "nowhere")
    assert not list(Path(cfg.OUTPUT_DIR).glob("model*"))
