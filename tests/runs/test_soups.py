import pytest
import torch

from ssod_imwa.errors import UserError
from ssod_imwa.runs import run
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.results import read_results
from ssod_imwa.runs.soups import build_metric, choose_coefficients, write_average
from ssod_imwa.runs.trained import read_trained


@pytest.fixture
def trained(tmp_path, one_thread):
    """Two runs of two iterations from the same weights."""
    files = []
    for seed in (1, 2):
        settings = {
            "TASK": "classification",
            "OUTPUT_DIR": tmp_path / str(seed),
            "DATASETS.TRAIN": ["digit_images_train"],
            "DATASETS.TEST": ["digit_images_test"],
            "CLS.MODEL.NAME": "cifar_resnet20",
            "CLS.INPUT.FLIP": False,
            "IMWA.FIRST_MEMBER": seed,
            "SOLVER.MAX_ITER": 2,
            "SOLVER.WARMUP_ITERS": 0,
            "SOLVER.IMS_PER_BATCH": 16,
            "MODEL.DEVICE": "cpu",
        }
        cfg = load_config(overrides=[str(x) for pair in settings.items() for x in pair])
        assert run.train(cfg) == 0
        files.append(read_trained(cfg.OUTPUT_DIR))
    return files


def test_the_metric_of_a_runs_own_weights_is_the_one_in_its_results(trained, tmp_path):
    lines = []
    metric = build_metric(trained[0], "digit_images_test", show=lines.append)
    values = [metric(file.weights) for file in trained]
    for file, value in zip(trained, values, strict=True):
        assert value == read_results(file.path.parent).headline().metrics["top1"]
    assert lines == [f"top1 {value:.2f}" for value in values]
    with pytest.raises(UserError, match="--metric AP is not allowed"):
        build_metric(trained[0], "digit_images_test", "AP")(trained[0].weights)
    for name in ("ece", "flipped/zero_recall_classes"):
        with pytest.raises(UserError, match=f"--metric {name} is not allowed"):
            build_metric(trained[0], "digit_images_test", name)

    best = choose_coefficients(trained, "greedy", metric=metric)
    write_average(trained, best, tmp_path / "soup.pth")
    soup = read_trained(tmp_path / "soup.pth")
    assert metric(soup.weights) >= max(values)


def test_weights_are_those_of_the_rule(trained, tmp_path):
    write_average(trained, choose_coefficients(trained, "uniform"), tmp_path / "new" / "soup.pth")
    soup = read_trained(tmp_path / "new" / "soup.pth").weights["classifier.weight"]
    first, second = (file.weights["classifier.weight"] for file in trained)
    torch.testing.assert_close(soup, (first + second) / 2)
    assert choose_coefficients(trained, "fixed", weights=[0.25, 0.75]) == [0.25, 0.75]
    with pytest.raises(UserError, match="--rule fixed: "):
        choose_coefficients(trained, "fixed", weights=[0.5, 0.75])
