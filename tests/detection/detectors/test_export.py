import pytest
import torch
from support import detector_options
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn

from ssod_imwa.detection.detectors.export import exported_state, loading_code
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.detectors.options import FasterRCNNOptions
from ssod_imwa.errors import WeightsError

SMALL = detector_options(
    resnets={"depth": 18},
    fpn={"out_channels": 8},
    roi_box_head={"fc_dim": 16, "pooler_resolution": 5},
    anchor_generator={"sizes": [[16], [24], [32], [48], [64]], "aspect_ratios": [[1.0]]},
    rpn={"pre_nms_topk_test": 50, "post_nms_topk_test": 20, "nms_thresh": 0.6},
    roi_heads={"score_thresh_test": 0.01, "nms_thresh_test": 0.4},
    detections={"detections_per_image": 7},
)
CAFFE = detector_options(
    image={"format": "BGR"},
    pixels={"pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1.0, 1.0, 1.0]},
    resnets={"stride_in_1x1": True},
)
NARROW = {"fpn": {"out_channels": 16}, "roi_box_head": {"fc_dim": 32}}
TIMM = {
    "backbone": {"name": "timm:tf_efficientnet_lite0", "freeze_at": 2},
    "levels": {"levels": [3, 4, 5]},
    "anchor_generator": {"sizes": [[16], [24], [32], [48]]},
}


def trained_detector(base=None, **groups):
    """A detector whose batch norms hold something, so that forgetting them would show."""
    torch.manual_seed(0)
    detector = TorchvisionFasterRCNN(detector_options(base, **groups), num_classes=3)
    for name, x in detector.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            x.add_(0.1 * torch.rand_like(x))
        if name.endswith(("bn3.weight", "body.bn1.weight")):
            # Frozen norms do not tame the activations of random weights.
            x.mul_(0.1 if "bn3" in name else detector.pixel_std.mean() / 60)
    torch.nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.3)
    return detector


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_plain_torchvision_loads_the_state_strictly(norm):
    detector = trained_detector(resnets={"norm": norm})
    plain = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    state = exported_state(detector.state_dict(), swap_input=False)
    plain.load_state_dict(state, strict=True)
    assert state.keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("base", "groups"),
    [
        (SMALL, {}),
        (SMALL, {"resnets": {"norm": "BN"}, "backbone": {"freeze_at": 0}}),
        (SMALL, {"image": {"format": "BGR"}}),
        (SMALL, {"levels": {"levels": [3, 4]}, "anchor_generator": {"sizes": [[24], [32], [48]]}}),
        (SMALL, TIMM),
        (SMALL, {**TIMM, "levels": {"levels": [2, 3, 4]}, "image": {"format": "BGR"}}),
        pytest.param(None, {}, marks=pytest.mark.slow),
        pytest.param(None, {"resnets": {"depth": 101}}, marks=pytest.mark.slow),
        pytest.param(CAFFE, NARROW, marks=pytest.mark.slow),
        pytest.param(CAFFE, {}, marks=pytest.mark.slow),
    ],
)
def test_the_printed_lines_make_a_model_with_equal_predictions(tmp_path, base, groups):
    detector = trained_detector(base, **groups)
    names = {}
    exec(
        detector.export(
            tmp_path / "exported.pth", min_size=96, max_size=128, about={"classes": []}
        ),
        names,
    )
    assert isinstance(names["model"], FasterRCNN)
    assert not names["model"].training
    generator = torch.Generator().manual_seed(1)
    # 96 x 128 is a size that torchvision's own resizing leaves alone.
    image = torch.randint(256, (3, 96, 128), generator=generator, dtype=torch.uint8)
    ours = detector.detect([image])[0]
    with torch.no_grad():
        plain = names["model"]([image / 255])[0]
    assert len(ours) > 0
    assert (ours.labels + 1).tolist() == plain["labels"].tolist()
    torch.testing.assert_close(ours.scores, plain["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.boxes, plain["boxes"], rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("groups", [{}, TIMM], ids=["resnet", "timm"])
def test_an_export_takes_rgb_whatever_the_detector_took(tmp_path, groups):
    pixels = {"pixel_mean": [100.0, 110.0, 120.0], "pixel_std": [50.0, 60.0, 70.0]}
    bgr = trained_detector(SMALL, **groups, image={"format": "BGR"}, pixels=pixels)
    file = tmp_path / "exported.pth"
    bgr.export(file, min_size=96, max_size=128, about={"classes": []})
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    (expected,) = bgr.detect([image])
    with pytest.raises(WeightsError) as caught:
        bgr.load_weights(str(file))
    assert str(caught.value) == (
        f"{file}: is an export, which takes RGB images, not BGR (set INPUT.FORMAT RGB, and turn "
        "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD around; or name the run's own file)"
    )
    assert torch.equal(bgr.detect([image])[0].boxes, expected.boxes)  # nothing was changed
    turned = {name: values[::-1] for name, values in pixels.items()}
    rgb = TorchvisionFasterRCNN(detector_options(SMALL, **groups, pixels=turned), num_classes=3)
    rgb.load_weights(str(file))
    (found,) = rgb.detect([image])
    assert len(found) > 0
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-3, atol=2e-2)


def test_an_export_s_predictions_do_not_depend_on_its_first_image(tmp_path):
    detector = trained_detector(SMALL)
    names = {}
    file = tmp_path / "exported.pth"
    exec(detector.export(file, min_size=96, max_size=128, about={"classes": []}), names)
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, 96, 128), generator=generator, dtype=torch.uint8)
    (ours,) = detector.detect([image])
    with torch.no_grad():
        names["model"]([torch.zeros(3, 20, 128)])  # which is padded to 32
        (plain,) = names["model"]([image / 255])
    assert len(ours) > 0
    torch.testing.assert_close(ours.scores, plain["scores"], rtol=1e-3, atol=1e-4)


def test_exported_tensors_are_copies():
    detector = trained_detector(SMALL)
    state = exported_state(detector.state_dict(), swap_input=False)
    for name, x in detector.state_dict().items():
        before = state[name].clone()
        x.add_(1)
        assert torch.equal(state[name], before)


def test_a_default_r50_needs_few_lines():
    code = loading_code(FasterRCNNOptions(), 3, "model.pth", min_size=800, max_size=1333)
    assert code == (
        "# Class 0 is background; labels count from 1.\n"
        "import torch\n"
        "from torchvision.models.detection import fasterrcnn_resnet50_fpn\n"
        "model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)\n"
        "from torchvision.ops.poolers import initLevelMapper\n"
        "pool = model.roi_heads.box_roi_pool\n"
        "pool.scales = [0.25, 0.125, 0.0625, 0.03125]\n"
        "pool.map_levels = initLevelMapper(2, 5)\n"
        "content = torch.load('model.pth', weights_only=True)\n"
        "model.load_state_dict(content['model'])\n"
        "model.eval()\n"
        "classes = ['background', *content['classes']]  # of labels 0, 1, ...\n"
        "input_size = content['input']  # pixels; the model resizes images itself,\n"
        "# without antialiasing: scores differ a little from those of the run where it does\n"
    )
