import runpy
from pathlib import Path

import pytest

from ssod_imwa.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"


@pytest.fixture
def parse(monkeypatch):
    parse_arguments = runpy.run_path(str(TOOL))["parse_arguments"]

    def parse(line):
        monkeypatch.setattr("sys.argv", ["train_net.py", *line.split()])
        return parse_arguments()

    return parse


@pytest.mark.parametrize(
    "line",
    [
        "--config-file a.yaml b.yaml SEED 3 LOG_PERIOD 5 --resume --num-gpus 2",
        "--config-file a.yaml b.yaml SEED 3 --resume LOG_PERIOD 5 --num-gpus 2",
        "--config-file a.yaml b.yaml --resume --num-gpus 2 SEED 3 LOG_PERIOD 5",
        "SEED 3 LOG_PERIOD 5 --resume --num-gpus 2 --config-file a.yaml b.yaml",
        "--num-gpus 2 SEED 3 --resume LOG_PERIOD 5 --config-file a.yaml b.yaml",
    ],
)
def test_files_pairs_and_options_stand_in_any_order(parse, line):
    arguments = parse(line)
    assert arguments.config_file == ["a.yaml", "b.yaml"]
    assert arguments.overrides == ["SEED", "3", "LOG_PERIOD", "5"]
    assert (arguments.resume, arguments.num_gpus) == (True, 2)


def test_a_value_may_end_in_yaml_but_a_file_must(parse):
    arguments = parse("--config-file a.yaml MODEL.DETECTRON2.CONFIG b.yaml")
    assert arguments.config_file == ["a.yaml"]
    assert arguments.overrides == ["MODEL.DETECTRON2.CONFIG", "b.yaml"]
    with pytest.raises(UserError, match=r"^b.yml is neither a file that ends in .yaml nor a key$"):
        parse("--config-file a.yaml b.yml SEED 3")
