"""Whole runs beside which the last averages are averaged (IMWA.LAWA)."""

from functools import partial
from pathlib import Path

import pytest
import torch
from support import assert_equal, final_weights

from ssod_imwa.averaging.lawa import LatestAverages
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.engine.evaluation import EvaluationHook
from ssod_imwa.errors import UserError
from ssod_imwa.runs import run
from ssod_imwa.runs.results import read_results
from ssod_imwa.visualization.plots import run_figures
from ssod_imwa.visualization.table import results_table

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ("IMWA.EPISODES", 4)
IMWA = (*PLAIN, "IMWA.MEMBERS", 2)


@pytest.fixture
def config(digits_config):
    """Runs of four iterations of a small network and its EMA on long-tailed digits."""
    settings = ("CLS.IMBALANCE.RATIO", 20, "CLS.EMA_DECAY", 0.9, "SOLVER.BASE_LR", 0.1)
    settings += ("SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 1, "SOLVER.IMS_PER_BATCH", 16)
    return partial(digits_config, *settings, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_EPISODES", 0)


def lawa_file(cfg):
    return Path(cfg.OUTPUT_DIR, "model_lawa.pth")


def figures(cfg):
    return [
        (x.stage, x.model, x.member, x.global_step)
        for x in read_results(cfg.OUTPUT_DIR).evaluations
    ]


class KilledError(Exception):
    pass


def killed(*arguments):
    raise KilledError


def kill_in_step_2(monkeypatch, cfg):
    """Train up to the evaluation after the checkpoint of global step 2."""
    step = EvaluationHook.after_step
    with monkeypatch.context() as patch:
        patch.setattr(
            EvaluationHook,
            "after_step",
            lambda hook: killed() if hook.trainer.iter == 2 else step(hook),
        )
        with pytest.raises(KilledError):
            run.train(cfg)


@pytest.mark.parametrize("changes", [PLAIN, pytest.param(IMWA, marks=pytest.mark.slow)])
def test_the_mean_of_the_last_averages_stands_beside_the_run(config, monkeypatch, changes):
    ends = []
    add = LatestAverages.add

    def add_and_note(latest, modules):
        add(latest, modules)
        ends.append(
            {n: {k: v.double() for k, v in m.state_dict().items()} for n, m in modules.items()}
        )

    monkeypatch.setattr(LatestAverages, "add", add_and_note)
    without, cfg = config(*changes, output="without"), config(*changes, "IMWA.LAWA", 3)
    for each in (without, cfg):
        run.train(each)
    assert_equal(final_weights(without), final_weights(cfg))
    assert not lawa_file(without).exists()
    assert len(ends) == 4

    models = read_models(lawa_file(cfg)).models
    for model, state in models.items():
        for name, tensor in state.items():
            if tensor.is_floating_point():
                mean = sum(end[model][name] for end in ends[-3:]) / 3
                assert torch.equal(tensor, mean.float()), name
    assert not torch.equal(
        models["student"]["classifier.weight"], final_weights(cfg)["student.classifier.weight"]
    )

    last = 3 if changes is PLAIN else 7
    assert figures(cfg) == [
        (stage, model, None, last)
        for stage in ("final", "lawa")
        for model in ("student", "teacher")
    ]
    results = read_results(cfg.OUTPUT_DIR)
    (of_teacher,) = results.of_lawa("teacher")
    assert run.evaluate(cfg, lawa_file(cfg)) == pytest.approx(of_teacher.metrics)
    assert results.headline().stage == "final"
    top1 = results.summary()["teacher"]["top1"]
    assert (top1["lawa"], top1["final"]) == (
        of_teacher.metrics["top1"],
        results.headline().metrics["top1"],
    )
    assert "lawa" not in read_results(without.OUTPUT_DIR).summary()["teacher"]["top1"]
    assert "lawa" in results_table(results).columns[1]._cells
    assert "episodes.png" in run_figures(Path(cfg.OUTPUT_DIR))


def test_one_average_is_the_final_model_bitwise(config, caplog):
    caplog.set_level("INFO")
    cfg = config("IMWA.LAWA", 5)
    run.train(cfg)
    final = read_models(Path(cfg.OUTPUT_DIR, "model_final.pth")).models
    lawa = read_models(lawa_file(cfg)).models
    for name, state in final.items():
        assert_equal(lawa[name], state)
    words = "IMWA.LAWA = 5: the run has 1 episodes, so all of them are averaged"
    assert caplog.messages.count(words) == 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [PLAIN, IMWA])
def test_a_stopped_and_resumed_run_has_the_same(config, monkeypatch, changes):
    """Stopped inside the run, and then in the evaluation of the last average."""
    whole = config(*changes, "IMWA.LAWA", 3, output="whole")
    parts = config(*changes, "IMWA.LAWA", 3, output="parts")
    run.train(whole)

    kill_in_step_2(monkeypatch, parts)
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationHook, "_run", killed)
        with pytest.raises(KilledError):
            run.train(parts, resume_from=True)
    lawa_file(parts).unlink()  # as if it had not been written yet
    assert run.train(parts, resume_from=True) == 0
    assert figures(parts) == figures(whole)
    assert str(read_results(parts.OUTPUT_DIR).evaluations) == str(
        read_results(whole.OUTPUT_DIR).evaluations
    )
    one, other = (read_models(lawa_file(cfg)).models for cfg in (whole, parts))
    for name, state in one.items():
        assert_equal(other[name], state)
    assert_equal(final_weights(whole), final_weights(parts))


@pytest.mark.slow
def test_batch_norms_are_re_estimated_where_averages_are(config):
    changes = ("IMWA.BN", "recompute", "IMWA.BN_BATCHES", 2, *IMWA)
    without, cfg = config(*changes, output="without"), config(*changes, "IMWA.LAWA", 4)
    for each in (without, cfg):
        run.train(each)
    assert_equal(final_weights(without), final_weights(cfg))
    mean = config(*changes[4:], "IMWA.LAWA", 4, output="mean")
    run.train(mean)
    one, other = (read_models(lawa_file(x)).models["student"] for x in (cfg, mean))
    norms = [name for name in one if "running_" in name]
    assert all(not torch.equal(one[name], other[name]) for name in norms)


def test_another_number_after_the_end_is_refused(config):
    run.train(config(*PLAIN, "IMWA.LAWA", 3))
    message = "IMWA.LAWA = 2 is not allowed: the run has ended with 3, and that mean is written"
    with pytest.raises(UserError, match=message):
        run.train(config(*PLAIN, "IMWA.LAWA", 2), resume_from=True)


def test_an_overwritten_runs_file_is_removed(config):
    cfg = config("IMWA.LAWA", 2)
    run.train(cfg)
    assert lawa_file(cfg).exists()
    run.train(config("SEED", 2), overwrite=True)
    assert not lawa_file(cfg).exists()


@pytest.mark.parametrize("is_finished", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resume_may_begin_with_it(config, monkeypatch, is_finished):
    """One average is left, which is the final model."""
    if is_finished:
        run.train(config(*PLAIN))
    else:
        kill_in_step_2(monkeypatch, config(*PLAIN))
    cfg = config(*PLAIN, "IMWA.LAWA", 3)
    assert run.train(cfg, resume_from=True) == 0
    assert_equal(
        read_models(lawa_file(cfg)).models["student"],
        read_models(Path(cfg.OUTPUT_DIR, "model_final.pth")).models["student"],
    )
    assert {x[0] for x in figures(cfg)} == {"final", "lawa"}
