import math

import pytest
import torch
from torch import nn

from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.prediction import (
    evaluate_classifier,
    evaluate_logits,
    predict_readable,
)
from ssod_imwa.data.batches import Part
from ssod_imwa.errors import NonFiniteError

CLASSES, COUNTS = ("cat", "dog", "cow"), [200, 40, 5]


def one():
    return CifarResNet(3, depth=8)


@pytest.fixture(params=[one, lambda: Experts(one, 2)], ids=["one", "experts"])
def network(request):
    torch.manual_seed(0)
    model = request.param().eval()
    for layer in model.modules():  # statistics under which logits tell images apart
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2)
    return model


@pytest.fixture
def images():
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(12) % 3


def batches(images):
    return [
        Part({"image": part}, LABELS[i : i + 5], torch.arange(i, i + len(part)))
        for i, part in zip((0, 5, 10), images.split(5), strict=True)
    ]


def evaluate(network, images, **settings):
    return evaluate_classifier(
        network, batches(images), classes=CLASSES, train_counts=COUNTS, **settings
    )


def test_flipping_adds_the_figures_of_the_mean_with_mirror_images(network, images):
    plain, both = evaluate(network, images), evaluate(network, images, flip=True)
    assert plain == {name: x for name, x in both.items() if not name.startswith("flipped/")}
    with torch.no_grad():
        rows = []
        for image in images:
            mirrored = torch.from_numpy(image.numpy()[:, :, ::-1].copy())  # columns, right to left
            rows.append((network(image[None])[0] + network(mirrored[None])[0]) / 2)
    expected = evaluate_logits(
        torch.stack(rows).numpy(), LABELS.numpy(), classes=CLASSES, train_counts=COUNTS
    )
    for name, value in expected.items():
        if not name.startswith("recall-"):
            assert both[f"flipped/{name}"] == pytest.approx(value, rel=1e-4), name
    assert both["flipped/ece"] != pytest.approx(both["ece"], rel=1e-4)


def test_flipping_judges_each_expert_too(images):
    torch.manual_seed(0)
    experts = Experts(one, 2).eval()
    metrics = evaluate(experts, images, flip=True)
    with torch.no_grad():
        logits = experts.expert_logits(images) + experts.expert_logits(images.flip(3))
    right = [100 * float((of_expert.argmax(1) == LABELS).float().mean()) for of_expert in logits]
    assert [metrics[f"flipped/expert{k}/top1"] for k in (1, 2)] == pytest.approx(right)
    assert metrics["flipped/experts/top1"] == pytest.approx(sum(right) / 2)


def test_post_hoc_adjustment_is_that_of_logits_less_the_log_prior(network, images):
    counts, tau = (20, 50, 400), 8.0  # the class that both random networks prefer is frequent

    def evaluate(**settings):
        return evaluate_classifier(
            network, batches(images), classes=CLASSES, train_counts=counts, **settings
        )

    plain, both = evaluate(), evaluate(post_hoc_tau=tau)
    assert plain == {name: x for name, x in both.items() if not name.startswith("adjusted/")}
    with torch.no_grad():
        logits = network(images)
    said = logits.argmax(1)
    for k, count in enumerate(counts):
        logits[:, k] -= tau * math.log(count / sum(counts))
    right = (logits.argmax(1) == LABELS).float()
    recalls = [float(right[k == LABELS].mean()) for k in range(3)]
    assert both["adjusted/top1"] == pytest.approx(100 * float(right.mean()))
    assert both["adjusted/mean_recall"] == pytest.approx(100 * sum(recalls) / 3)
    assert not torch.equal(logits.argmax(1), said)  # it does something


def test_logits_that_are_no_numbers_are_said_in_one_line(network, images):
    images[4] = 1e38  # finite, but nothing behind the first layer is
    with pytest.raises(NonFiniteError, match=r"^logits of 1 of 12 images are not finite: "):
        evaluate(network, images)


def test_rows_are_of_the_images_that_were_read(network, images):
    """Of two that cannot be read one stands inside a batch and one begins one."""
    read = [i for i in range(12) if i not in (2, 5)]
    some = [Part({"image": images[i]}, LABELS[i], torch.tensor(i)) for i in (read[:4], read[4:])]
    positions, logits, labels = predict_readable(network, some[::-1])
    assert positions.tolist() == read
    assert labels.tolist() == LABELS[read].tolist()
    with torch.no_grad():
        expected = network(images)[..., read, :]
    torch.testing.assert_close(torch.from_numpy(logits), expected)
