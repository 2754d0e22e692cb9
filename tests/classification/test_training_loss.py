import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.classification.methods.base import TrainingNetwork
from ssod_imwa.classification.training_loss import spread_over_classes, training_loss
from ssod_imwa.data.batches import Part
from ssod_imwa.runs.open import open_task


class Head(TrainingNetwork):
    """Projects in training what nobody tests."""

    def outputs(self, images):
        raise AssertionError("the training branch is not asked")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3))


def parts(*sizes):
    """Batches of these sizes."""
    made = []
    for size in sizes:
        images, labels = torch.randn(size, 3, 2, 2), torch.randint(3, (size,))
        made.append(Part({"image": images}, labels, torch.arange(size)))
    return made


@pytest.mark.parametrize("wrap", [lambda x: x, Head], ids=["network", "training network"])
def test_it_is_the_mean_cross_entropy_and_leaves_no_trace(wrap):
    model, batches = wrap(network()), parts(4, 4, 1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    generator = torch.get_rng_state()
    loss = training_loss(model, batches)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        model.eval()
        rows = [
            torch.log_softmax(model(image[None]).double(), 1)[0, label]
            for batch in batches
            for image, label in zip(batch.views["image"], batch.targets, strict=True)
        ]
    assert loss == pytest.approx(-float(torch.stack(rows).mean()), rel=1e-6)


@pytest.mark.parametrize("images", [1, 3, 7, 20])
def test_classes_are_as_equal_as_can_be(images):
    labels = np.random.default_rng(0).permutation([0] * 10 + [1] * 4 + [3] * 1)
    positions = spread_over_classes(labels, images)
    assert len(positions) == len(set(positions)) == min(images, 15)
    counts = np.bincount(labels[positions], minlength=4)[[0, 1, 3]]
    available = np.array([10, 4, 1])
    # Nobody has two more than one who has images left.
    for count, more in zip(counts, available, strict=True):
        assert count == more or counts.max() <= count + 1


def test_the_task_keeps_images_of_all_classes(digits_config):
    """The rarest class has a tenth of the images of the most frequent one."""
    task = open_task(digits_config("CLS.IMBALANCE.RATIO", 10))
    train = task.data.train
    positions = spread_over_classes(train.labels.numpy(), 40)
    assert np.bincount(train.labels[positions]).tolist() == [4] * 10
    loss = task.build_training_loss(40)
    model = task.build_method(torch.device("cpu")).student
    view = next(iter(task.plain_train_batches(positions)))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(view.views["image"]), view.targets)
    assert loss(model) == loss(model.train()) == pytest.approx(float(expected), rel=1e-5)
