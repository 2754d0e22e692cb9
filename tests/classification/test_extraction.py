"""Features in several views, against a loop over images and the norms that were folded away."""

import pytest
import timm
import torch
from torch import nn

from ssod_imwa.classification.data.augmentation import Statistics
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.small_views import small_view
from ssod_imwa.classification.extraction import FeatureOptions, fold_norms, view_features
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError

OPTIONS = FeatureOptions(size=16, strong=2, seed=5)


@pytest.fixture
def net():
    """A convolution that sees where pixels are."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 12, 16), nn.Flatten()).eval()


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (7, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ClassificationDataset("noise", torch.zeros(7, dtype=torch.int64), ("a",), images=images)


@torch.no_grad()
def test_views_are_the_image_its_mirror_image_and_strong_ones(net, dataset):
    views = list(view_features(net, dataset, OPTIONS, batch_size=3))
    assert len(views) == OPTIONS.views == 4
    assert OPTIONS.weak == 2
    pixels = Statistics((127 / 255,) * 3, (128 / 255,) * 3)
    plain = small_view("none", pixels, size=16, stored=8)
    strong = small_view("randaugment", pixels, size=16, stored=8)
    numbers = [
        torch.from_numpy(counted_generator(5, "cached view", k).random((7, strong.numbers)))
        for k in range(2)
    ]
    for i, image in enumerate(dataset.images):
        seen = [
            plain(image[None], torch.empty(1, 0)),
            plain(image.flip(2)[None], torch.empty(1, 0)),
            *(strong(image[None], rows[i : i + 1]) for rows in numbers),
        ]
        for view, inputs in zip(views, seen, strict=True):
            torch.testing.assert_close(view[i], net(inputs)[0].half(), atol=2e-3, rtol=0)


def test_batches_of_any_size_give_the_same_views(net, dataset):
    small = view_features(net, dataset, OPTIONS, batch_size=2)
    large = view_features(net, dataset, OPTIONS, batch_size=7)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_pixels_are_what_the_packages_were_trained_on(net, dataset):
    gray = torch.full_like(dataset.images, 255)
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    next(view_features(net, ClassificationDataset("x", dataset.labels, ("a",), images=gray),
                       OPTIONS))  # fmt: skip
    assert seen[0].unique().tolist() == [1.0]  # (255 - 127) / 128


def test_images_in_files_are_refused(net):
    files = ClassificationDataset("x", torch.zeros(1, dtype=torch.int64), ("a",), files=("a.png",))
    with pytest.raises(DataError, match="x: images must be in memory and square"):
        next(view_features(net, files, OPTIONS))


@torch.no_grad()
def test_folded_norms_change_nothing_but_rounding():
    torch.manual_seed(3)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
    model.double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    fold_norms(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(images), expected)
