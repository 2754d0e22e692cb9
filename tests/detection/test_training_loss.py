import pytest
import torch

from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.data.views import read_record
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.detection.training_loss import SEED
from ssod_imwa.runs.open import open_task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "detector", ["FCOS", pytest.param("GeneralizedRCNN", marks=pytest.mark.slow)]
)
def test_it_is_the_detectors_own_losses_and_leaves_no_trace(detection_config, detector):
    settings = ("SSOD.ALGORITHM", "supervised", "DATASETS.SPLIT.PERCENT", 100)
    task = open_task(
        detection_config(*settings, "MODEL.META_ARCHITECTURE", detector, "TEST.IMS_PER_BATCH", 3)
    )
    model = task.build_method(torch.device("cpu")).student
    model.backbone.eval()  # a frozen part stays as it is
    loss = task.build_training_loss(4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    value = loss(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert value == loss(model)
    assert value == pytest.approx(expected_loss(task, model), rel=1e-5)


def expected_loss(task, model):
    """Of every second of the eight images, in batches of three and one, by the detector itself."""
    records = [task.data.labeled.records[i] for i in (0, 2, 4, 6)]
    images, targets = zip(*map(seen, records), strict=True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(SEED)
    total = 0.0
    with torch.no_grad():
        for part in (slice(0, 3), slice(3, 4)):
            losses = model(list(images[part]), SupervisedLoss(targets[part]))
            total += len(images[part]) * float(sum(losses.values()))
    return total / 4


def seen(record):
    """The stored image, whose size is that of tests, and its boxes."""
    annotations = record.annotations
    boxes = torch.as_tensor(annotations.boxes, dtype=torch.float32)
    return read_record(record), Targets(boxes, torch.as_tensor(annotations.labels))
