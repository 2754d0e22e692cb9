import pytest

from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.batch_scale import scale_batch
from ssod_imwa.runs.config import load_config


def config(*overrides):
    settings = {
        "SSOD.ALGORITHM": "unbiased_teacher",
        "SSOD.BURN_IN_ITERS": 100,
        "SSOD.EMA_DECAY": 0.99,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 32,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": 1000,
        "SOLVER.STEPS": [600, 800],
        "SOLVER.WARMUP_ITERS": 50,
    }
    pairs = [str(x) for pair in settings.items() for x in pair]
    return load_config(overrides=[*pairs, *map(str, overrides)])


def test_a_quarter_of_the_batch_sees_as_many_images():
    cfg, changes = scale_batch(config(), 4)
    by_key = {change.key: (change.before, change.after) for change in changes}
    assert by_key == {
        "SOLVER.IMS_PER_BATCH": (16, 4),
        "SOLVER.IMS_PER_BATCH_UNLABELED": (32, 8),
        "SOLVER.BASE_LR": (0.01, 0.0025),
        "SOLVER.MAX_ITER": (1000, 4000),
        "SOLVER.STEPS": ([600, 800], [2400, 3200]),
        "SOLVER.WARMUP_ITERS": (50, 200),
        "SSOD.BURN_IN_ITERS": (100, 400),
        "SSOD.EMA_DECAY": (0.99, pytest.approx(0.99**0.25, abs=1e-9)),
    }
    for key, (_, after) in by_key.items():
        value = cfg
        for part in key.split("."):
            value = value[part]
        assert value == after


def test_the_moving_average_forgets_as_much_over_as_many_images():
    cfg, _ = scale_batch(config(), 2)
    assert pytest.approx(0.99) == cfg.SSOD.EMA_DECAY**8


def test_adamws_rate_goes_with_the_root():
    cfg, _ = scale_batch(config("SOLVER.OPTIMIZER", "AdamW"), 4)
    assert pytest.approx(0.005) == cfg.SOLVER.BASE_LR


def test_the_same_batch_changes_nothing():
    cfg, changes = scale_batch(config(), 16)
    assert (cfg, changes) == (config(), [])


def test_back_and_forth_is_where_it_was():
    there, _ = scale_batch(config(), 8)
    back, _ = scale_batch(there, 16)
    assert back.SOLVER == config().SOLVER
    assert pytest.approx(0.99, abs=1e-9) == back.SSOD.EMA_DECAY


def test_what_happens_still_does():
    cfg, _ = scale_batch(config("SOLVER.WARMUP_ITERS", 1, "TEST.EVAL_PERIOD", 0), 160)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD) == (1, 0)


def test_what_follows_is_checked_as_what_is_written():
    message = r"^--scale-batch 6: SOLVER.IMS_PER_BATCH = 6 is not allowed \(must be a multiple of"
    with pytest.raises(ConfigError, match=message):
        scale_batch(config("SOLVER.ACCUMULATION_STEPS", 4), 6)
    with pytest.raises(ConfigError, match=r"IMWA.EPISODES = 900"):
        scale_batch(config("IMWA.MEMBERS", 2, "IMWA.EPISODES", 900), 32)


def test_steps_that_would_fall_on_one_iteration_are_refused():
    message = r"^--scale-batch 160: SOLVER.STEPS = \[60, 60\] is not allowed \(must increase\)"
    with pytest.raises(ConfigError, match=message):
        scale_batch(config("SOLVER.STEPS", [600, 602]), 160)


def test_no_images_are_refused():
    with pytest.raises(ConfigError, match="--scale-batch = 0 is not allowed"):
        scale_batch(config(), 0)
