from pathlib import Path

import pytest

from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import get_cfg, load_config, parse_config


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_file_overrides_base_and_command_line_overrides_file(tmp_path):
    write(tmp_path, "base.yaml", "SOLVER: {MAX_ITER: 10, BASE_LR: 0.5}\nSEED: 3\n")
    path = write(tmp_path, "leaf.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 20}\n")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "30"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (30, 0.5, 3)


def test_several_bases_are_read_in_order_relative_to_the_file(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.yaml", "SEED: 1\nLOG_PERIOD: 7\n")
    write(tmp_path / "sub", "b.yaml", "SEED: 2\n")
    path = write(tmp_path / "sub", "leaf.yaml", "_BASE_: [../a.yaml, b.yaml]\n")
    cfg = load_config(path)
    assert (cfg.SEED, cfg.LOG_PERIOD) == (2, 7)


def test_files_are_merged_left_to_right_each_with_its_bases(tmp_path):
    write(tmp_path, "base.yaml", "SEED: 1\nLOG_PERIOD: 7\nSOLVER: {MAX_ITER: 10}\n")
    method = write(tmp_path, "method.yaml", "_BASE_: base.yaml\nSEED: 2\n")
    fragment = write(tmp_path, "fragment.yaml", "SEED: 3\nSOLVER: {BASE_LR: 0.5}\n")
    cfg = load_config([method, fragment], ["SOLVER.BASE_LR", "0.25"])
    assert (cfg.SEED, cfg.LOG_PERIOD, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (3, 7, 10, 0.25)
    assert load_config([fragment, method]).SEED == 2


def test_the_output_folder_is_named_after_the_files_unless_it_is_set(tmp_path):
    first = write(tmp_path, "method.yaml", "SEED: 2\n")
    second = write(tmp_path, "10pct.yaml", "LOG_PERIOD: 7\n")
    third = write(tmp_path, "folder.yaml", "OUTPUT_DIR: out/mine\n")
    folders = [
        load_config(paths, overrides).OUTPUT_DIR
        for paths, overrides in (
            (first, []),
            ([first, second], []),
            ([first], ["OUTPUT_DIR", "out"]),
            ([first, third, second], []),
            ([], []),
        )
    ]
    name = f"output/{tmp_path.name}_method"
    assert folders == [name, f"{name}_10pct", "out", "out/mine", get_cfg().OUTPUT_DIR]


def test_rules_that_tie_keys_name_all_files(tmp_path):
    first = write(tmp_path, "a.yaml", "SOLVER: {MAX_ITER: 5}\n")
    second = write(tmp_path, "b.yaml", "IMWA: {EPISODES: 6}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml \+ .*b\.yaml: IMWA.EPISODES = 6 is not"):
        load_config([first, second])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {MAX_ITERS: 5}", "SOLVER.MAX_ITERS is not a configuration key; did you mean"),
        ("MAX_ITER: 5", "did you mean SOLVER.MAX_ITER?"),
        ("SOLVER: 5", "SOLVER is not a configuration key but a group of keys: SOLVER.MAX_ITER"),
        ("SOLVER: {MAX_ITER: many}", "MAX_ITER = 'many' is not allowed (must be an integer)"),
        ("SOLVER: {MAX_ITER: 5.0}", "must be an integer"),
        ("SOLVER: {MAX_ITER: True}", "must be an integer"),
        ("SOLVER: {BASE_LR: fast}", "must be a number"),
        ("SOLVER: {BASE_LR: .nan}", "must be a finite number"),
        ("SSOD: {ALGORITHM: unbiased_teacher, EMA_DECAY: 1.5}", "EMA_DECAY = 1.5 is not allowed"),
        ("SSOD: {BURN_IN_ITERS: 5}", "BURN_IN_ITERS has no meaning with SSOD.ALGORITHM = 'super"),
        ("SSOD: {ALGORITHM: unbiased_techer, EMA_DECAY: 0.5}", "did you mean 'unbiased_teacher'?"),
        ("TASK: classification\nSSOD: {ALGORITHM: supervised}", "no meaning with TASK = 'class"),
        ("CLS: {LOSS: {NAME: focal}}", "(it belongs to TASK = 'classification')"),
        ("MODEL: {DETECTRON2: {CONFIG: a}}", "(it belongs to MODEL.TOOLKIT = 'detectron2')"),
        ("IMWA: {MEMBERS: 0}", "IMWA.MEMBERS = 0 is not allowed (must be at least 1)"),
        ("IMWA: {EPISODES: 0}", "must be at least 1"),
        ("SOLVER: {MAX_ITER: 5}\nIMWA: {EPISODES: 6}", "must be 1..SOLVER.MAX_ITER = 5"),
        ("SSOD: {ALGORITHM: unbiased_techer}", "did you mean 'unbiased_teacher'?"),
        ("DATASETS: {TRAIN: bccd_train}", "must be a list"),
        ("IMWA: {MEMBERS: 2, COEFFICIENTS: [0.5, 0.4]}", "sum to 0.9 (must be 1 within 1e-6)"),
        ("IMWA: {MEMBERS: 2, COEFFICIENTS: [1.5, -0.5]}", "[1.5, -0.5] is not allowed (must be"),
        ("OUTPUT_DIR: ''", "OUTPUT_DIR = '' is not allowed (must name a folder)"),
        ("IMWA: {MEMBERS: 3, COEFFICIENTS: [0.5, 0.5]}", "has 2 values for IMWA.MEMBERS = 3"),
        ("SOLVER: {IMS_PER_BATCH: 5, ACCUMULATION_STEPS: 2}", "multiple of SOLVER.ACCUMU"),
        ("SOLVER: {STEPS: [20, 10]}", "must increase"),
        ("SOLVER: [1", "is not valid YAML"),
        ("SEED: 1\nSOLVER:\n  STEPS: [1]\n  STEPS: [2]", "line 4: is not valid YAML (STEPS stands"),
        ("SEED: 1\nIMWA: {MEMBERS: 2}\nSEED: 2", "line 3: is not valid YAML (SEED stands twice"),
        ("SOLVER.MAX_ITER: 5\nSOLVER: {MAX_ITER: 6}", "leaf.yaml: SOLVER.MAX_ITER stands twice"),
        ("- 1", "must hold keys and values"),
        ("_BASE_: missing.yaml", "missing.yaml (_BASE_ of"),
        ("_BASE_: leaf.yaml", "leads back to the file itself"),
        ("_BASE_: ../{folder}/leaf.yaml", "leads back to the file itself"),
        ("_BASE_:", "_BASE_ = None is not allowed (must be the name of a YAML file, or a list"),
        ("_BASE_: [1]", "_BASE_ = [1] is not allowed"),
        ("_BASE_: ~nobody_of_this_name/a.yaml", "cannot be read (No such file"),
        ("SOLVER: {BASE_LR: .inf}", "must be a finite number"),
        ("SOLVER: {STEPS: '{[]: 1}'}", "must be a list"),
        ("MODEL: {ANCHOR_GENERATOR: {SIZES: [[a]]}}", "[['a']] is not allowed (must be lists of"),
        ("MODEL: {ANCHOR_GENERATOR: {SIZES: [8]}}", "[8] is not allowed (must be lists of"),
        ("MODEL: {ANCHOR_GENERATOR: {SIZES: [[0]]}}", "[[0]] is not allowed (must be above 0)"),
        ('OUTPUT_DIR: "a\\0b"', "is not allowed (must be a text that a file can hold)"),
        ('DATASETS: {TRAIN: ["\\ud800"]}', "must be a text that a file can hold"),
    ],
)  # fmt: skip
def test_mistakes_name_the_file_the_key_and_what_is_allowed(tmp_path, text, message):
    path = write(tmp_path, "leaf.yaml", text.replace("{folder}", tmp_path.name))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SEED"], "'SEED' stands alone"),
        (["SEEDS", "3"], "command line: SEEDS is not a configuration key; did you mean SEED?"),
        (["SEED", "-1"], "command line: SEED = -1 is not allowed"),
        (["SOLVER.BASE_LR", "1" + "0" * 400], r"0 is not allowed \(must have at most 64 bits"),
        (["SEED", "0x" + "f" * 5000], "SEED = a number of 20000 bits is not allowed"),
        (["SEED", "9" * 5000], r"SEED = '9{99}\.\.\.9{99}' is not allowed \(must be an integer"),
        (["SOLVER.STEPS", "[" * 500], r"SOLVER.STEPS = '\[+\.\.\.\[+' is not allowed"),
        (["DATASETS.TRAIN", "[mine]"], r"TRAIN = '\[mine\]' is .* such as \['a', 'b'\]"),
    ],
)
def test_command_line_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1e-3", 1e-3),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.STEPS", "(10, 20)", [10, 20]),
        ("DATASETS.TRAIN", "['a','b']", ["a", "b"]),
        ("TEST.EVAL_MEMBERS", "true", True),
        ("OUTPUT_DIR", "out/run1", "out/run1"),
        ("OUTPUT_DIR", "7", "7"),
        ("OUTPUT_DIR", "2026_11_27", "2026_11_27"),
        ("OUTPUT_DIR", "1e3", "1e3"),
    ],
)
def test_command_line_values_take_the_type_of_the_key(key, text, value):
    group, _, leaf = key.rpartition(".")
    cfg = load_config(overrides=[key, text])
    found = cfg[group][leaf] if group else cfg[leaf]
    assert found == value
    assert type(found) is type(value)


def test_no_stream_is_spoken_of_that_is_not_read():
    """12 images in 3 parts are 4 each; a key of unlabeled images would have been 16."""
    batch = ["SOLVER.IMS_PER_BATCH", "12", "SOLVER.ACCUMULATION_STEPS", "3"]
    load_config(overrides=["TASK", "classification", *batch])
    load_config(overrides=batch)
    with pytest.raises(ConfigError, match=r"SOLVER.IMS_PER_BATCH_UNLABELED = 16 is not allowed"):
        load_config(overrides=["SSOD.ALGORITHM", "unbiased_teacher", *batch])


def test_yaml_reads_exponents_without_a_dot_as_numbers(tmp_path):
    path = write(tmp_path, "leaf.yaml", "SOLVER: {BASE_LR: 1e-3}")
    assert load_config(path).SOLVER.BASE_LR == 1e-3


def test_loaded_config_is_frozen_and_defaults_untouched():
    cfg = load_config(overrides=["SEED", "9"])
    with pytest.raises(AttributeError):
        cfg.SEED = 1
    assert get_cfg().SEED == 1


def test_a_dumped_config_reads_back_as_it_was():
    cfg = load_config(overrides=["SOLVER.BASE_LR", "1e-3", "DATASETS.TRAIN", "['a']"])
    assert parse_config(cfg.dump(), "dump") == cfg
    with pytest.raises(ConfigError, match="dump: SEEDS is not a configuration key"):
        parse_config("SEEDS: 1", "dump")


EPOCHS = "TASK: classification\nCLS: {SCHEDULE: {EPOCHS: 2}}\n"


@pytest.mark.parametrize("key", ["SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS"])
def test_iterations_after_a_schedule_in_epochs_are_refused(tmp_path, key):
    recipe = write(tmp_path, "recipe.yaml", EPOCHS)
    fragment = write(tmp_path, "fragment.yaml", f"{key}: 8\n")
    rule = rf"{key} has no meaning with CLS\.SCHEDULE\.EPOCHS = 2 \(CLS\.SCHEDULE takes its place"
    with pytest.raises(ConfigError, match=rf"command line: {rule}"):
        load_config(recipe, [key, "8"])
    with pytest.raises(ConfigError, match=rf"fragment\.yaml: {rule}"):
        load_config([recipe, fragment])


def test_iterations_before_epochs_without_them_or_of_a_dump_are_allowed(tmp_path):
    recipe = write(tmp_path, "recipe.yaml", EPOCHS)
    fragment = write(tmp_path, "fragment.yaml", "SOLVER.MAX_ITER: 8\n")
    assert load_config([fragment, recipe]).CLS.SCHEDULE.EPOCHS == 2
    cfg = load_config(recipe, ["SOLVER.MAX_ITER", "8", "CLS.SCHEDULE.EPOCHS", "0"])
    assert cfg.SOLVER.MAX_ITER == 8
    dump = write(tmp_path, "config.yaml", load_config(recipe).dump())
    assert load_config(dump) == load_config(recipe, ["OUTPUT_DIR", load_config(dump).OUTPUT_DIR])


def test_a_home_folder_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = write(tmp_path, "recipe.yaml", "OUTPUT_DIR: ~/runs/a\n")
    assert Path(load_config(recipe).OUTPUT_DIR) == tmp_path / "runs/a"
