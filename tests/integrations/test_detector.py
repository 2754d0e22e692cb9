"""detectron2's detectors behind our interface, and the same numbers as from torchvision's."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2_toys import (
    CLASSES,
    DENSE,
    FASTER_RCNN,
    SMALL,
    TARGETS,
    config,
    images,
    unlabeled_batch,
)
from PIL import Image
from support import Softened

from ssod_imwa.detection.build import build_method
from ssod_imwa.detection.coco_ap import coco_metrics
from ssod_imwa.detection.data.records import Annotations, Detections
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import load_config

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]


def detectron2_state(state):
    """torchvision's weights under detectron2's names, and its background class last."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^backbone\.body\.(conv1|bn1)", r"backbone.bottom_up.stem.\1", name)
        name = re.sub(
            r"^backbone\.body\.layer(\d)",
            lambda found: f"backbone.bottom_up.res{int(found[1]) + 1}",
            name,
        )
        name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for ours, theirs in (("inner_blocks", "fpn_lateral"), ("layer_blocks", "fpn_output")):
            name = re.sub(
                rf"fpn\.{ours}\.(\d)\.0", lambda found, t=theirs: f"{t}{int(found[1]) + 2}", name
            )
        name = name.replace("rpn.head.conv.0.0", "proposal_generator.rpn_head.conv")
        name = name.replace("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits")
        name = name.replace("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas")
        name = name.replace("box_head.fc6", "box_head.fc1").replace("box_head.fc7", "box_head.fc2")
        if "box_predictor.cls_score" in name:
            value = torch.cat([value[1:], value[:1]])
        elif "box_predictor.bbox_pred" in name:
            value = value[4:]
        renamed[name] = value
    return renamed


def with_equal_weights(torchvision_cfg, detectron2_cfg, num_classes):
    """The two toolkits' Faster R-CNN."""
    torch.manual_seed(0)
    ours = build_detector(torchvision_cfg, num_classes)
    ours.rpn.min_size = 1e-9  # torchvision drops proposals below a thousandth of a pixel
    with torch.no_grad():  # initial heads tell no class from another
        for layer in ("cls_score", "bbox_pred"):
            getattr(ours.roi_heads.box_predictor, layer).weight.normal_(std=0.3)
    theirs = build_detector(detectron2_cfg, num_classes)
    state = {n: x for n, x in ours.state_dict().items() if "num_batches_tracked" not in n}
    missing, unknown = theirs.model.load_state_dict(detectron2_state(state), strict=False)
    assert not unknown
    assert all("num_batches_tracked" in name for name in missing)
    return ours, theirs


@pytest.fixture
def pair():
    return with_equal_weights(config("torchvision"), config(), CLASSES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_recipe_for_comparing_toolkits_makes_their_losses_equal(dtype):
    """With anchors that torchvision has nothing to round of, and one a place: it orders them so."""
    folder = Path(__file__).parents[2] / "configs"
    recipe = folder / "digits" / "unbiased_teacher_imwa.yaml"
    fragment = folder / "models" / "detectron2_r18_as_torchvision.yaml"
    names = [name for name in SMALL if "BATCH_SIZE" in name or "ANCHOR" in name]
    changes = [text for name in names for text in (name, str(SMALL[name]))]
    files = ([recipe], [recipe, fragment])
    pair = with_equal_weights(*(load_config(paths, changes) for paths in files), 10)
    losses = []
    for detector in pair:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            losses.append(detector.train()(images(), SupervisedLoss(TARGETS)))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        assert loss.item() == pytest.approx(losses[1][name].item(), rel=tolerance), name
        assert loss.item() > 0


def test_regions_are_not_rounded_under_autocast():
    from detectron2.structures import Boxes

    pooler = build_detector(config(), CLASSES).model.roi_heads.box_pooler
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 8, 512 // s, 512 // s, generator=generator) for s in (4, 8, 16, 32)]
    rounded = [feature.bfloat16() for feature in features]
    boxes = [Boxes(torch.tensor([[257.3, 131.7, 323.9, 201.4], [300.6, 3.2, 509.1, 400.7]]))]
    exact = pooler([feature.float() for feature in rounded], boxes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pooler(rounded, boxes)
    assert torch.equal(pooled, exact.bfloat16())


def test_the_same_targets_give_the_same_losses(pair):
    losses = [detector.train()(images(), SupervisedLoss(TARGETS)) for detector in pair]
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        assert float(losses[0][name]) == pytest.approx(float(losses[1][name]), rel=1e-4), name
        assert float(losses[0][name]) > 0


def test_the_same_weights_find_the_same_boxes(pair):
    for detector in pair:  # running statistics that suit the images
        detector.train()(images(), SupervisedLoss(TARGETS))
    ours, theirs = (detector.detect(images()) for detector in pair)
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) > 0
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)


def given_boxes():
    return [target.boxes.clamp(max=64) for target in (TARGETS[0], TARGETS[0])]


def test_an_objective_of_regions_gives_the_same_losses(pair):
    objective = Softened(TARGETS, TARGETS, background=1.0)
    losses = [detector.train()(images(), objective) for detector in pair]
    theirs = pair[1](images(), SupervisedLoss(TARGETS))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[1].items():
        assert losses[0][name].item() == pytest.approx(value.item(), rel=1e-4), name
        if name != "loss_cls":  # theirs is a focal loss
            assert theirs[name].item() == pytest.approx(value.item(), rel=1e-5), name
    sum(losses[1].values()).backward()
    assert all(p.grad is not None for p in pair[1].parameters() if p.requires_grad)


def test_the_same_weights_score_given_boxes_alike(pair):
    for detector in pair:
        assert detector.abilities == {"regions"}
        detector.train()(images(), SupervisedLoss(TARGETS))
    ours, theirs = (detector.score_regions(images(), given_boxes()) for detector in pair)
    for one, other in zip(ours, theirs, strict=True):
        assert one.probabilities.shape == (2, CLASSES + 1)
        torch.testing.assert_close(one.probabilities, other.probabilities, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)


def test_regions_without_a_box_or_without_classes_are_scored():
    agnostic = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
    detector = build_detector(config(**agnostic), CLASSES)
    with torch.no_grad():
        detector.model.roi_heads.box_predictor.bbox_pred.weight.normal_(std=0.1)
    empty, scored = detector.score_regions(images(), [torch.zeros(0, 4), given_boxes()[0]])
    assert empty.boxes.shape == (0, CLASSES, 4)
    assert scored.boxes.shape == (2, CLASSES, 4)
    assert torch.equal(scored.boxes[:, 0], scored.boxes[:, 1])
    assert scored.boxes[1, 0].tolist() != given_boxes()[0][1].tolist()
    losses = detector.train()(images(), Softened(TARGETS, TARGETS, background=1.0))
    expected = detector(images(), SupervisedLoss(TARGETS))["loss_box_reg"].item()
    assert losses["loss_box_reg"].item() == pytest.approx(expected, rel=1e-5)


def test_detections_come_from_shared_features_as_from_the_model():
    detector = build_detector(config(), CLASSES).eval()
    (image, _) = images()
    with torch.no_grad():
        instances = detector.model([{"image": image}])[0]["instances"]
    (detections,) = detector.detect([image])
    assert len(detections) > 0
    assert torch.equal(instances.pred_boxes.tensor, detections.boxes)
    assert torch.equal(instances.scores, detections.scores)


@pytest.mark.parametrize(
    ("detector", "changes", "name"),
    [
        (DENSE[0], {}, "RetinaNet"),
        (DENSE[1], {}, "FCOS"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", {"MODEL.MASK_ON": False}, "GeneralizedRCNN"),
        (
            FASTER_RCNN,
            {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True},
            "GeneralizedRCNN",
        ),
    ],
)
def test_detectors_without_regions_are_refused_them(detector, changes, name):
    changes = {**changes, "MODEL.ROI_HEADS.LOSS": "CrossEntropy"}
    model = build_detector(config(detector=detector, **changes), CLASSES)
    assert "regions" not in model.abilities
    message = f"Softened needs .* 'regions' .* which detectron2's {name} does not have"
    with pytest.raises(ConfigError, match=message):
        model.train()(images(), Softened(TARGETS, TARGETS, background=1.0))


SOFT = {
    "SSOD.ALGORITHM": "soft_teacher",
    "SSOD.EMA_BUFFERS": "ema",
    "SSOD.INITIAL_THRESHOLD": 0.2,
    "SSOD.RPN_THRESHOLD": 0.3,
    "SSOD.BBOX_THRESHOLD": 0.3,
    "SSOD.BOX_DEVIATION": 0.2,
}


UNBIASED = {
    "SSOD.ALGORITHM": "unbiased_teacher",
    "SSOD.BURN_IN_ITERS": 0,
    "SSOD.BBOX_THRESHOLD": 0.3,
}


@pytest.mark.parametrize(
    "settings",
    [
        UNBIASED,
        SOFT,
        {**SOFT, "SSOD.TEACHER_PROPOSALS": "test"},
    ],
    ids=["unbiased_teacher", "soft_teacher", "soft_teacher, mmdetection's proposals"],
)
def test_methods_have_the_same_loss_terms(pair, settings):
    batch = unlabeled_batch()
    records = []
    for toolkit, detector in zip(("torchvision", "detectron2"), pair, strict=True):
        method = build_method(config(toolkit, **settings), detector)
        method.student.train()
        torch.manual_seed(0)  # of the jitter: sampling draws nothing, as everything is taken
        records.append(method.losses(batch, 0))
    assert records[0]["pseudo_boxes"] > 0
    assert records[0].keys() == records[1].keys()
    for name in records[0]:
        values = [record[name].item() for record in records]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name


CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_HEADS.LOSS": "CrossEntropy",
}


def test_box_losses_of_all_stages_of_a_cascade_have_the_weight_of_boxes():
    weights = {"SSOD.UNSUP_LOSS_WEIGHT": 4.0, "SSOD.UNSUP_BOX_LOSS_WEIGHT": 0.0}
    cfg = config(**CASCADE, **weights, **{**UNBIASED, "SSOD.BBOX_THRESHOLD": 0.0})
    torch.manual_seed(0)
    method = build_method(cfg, build_detector(cfg, CLASSES))
    method.student.train()
    losses = method.losses(unlabeled_batch(), 0)
    assert losses["pseudo_boxes"] > 0
    for stage in range(3):
        assert losses[f"loss_cls_stage{stage}_pseudo"] > 0
        assert losses[f"loss_box_reg_stage{stage}"] > 0
        assert losses[f"loss_box_reg_stage{stage}_pseudo"] == 0


def test_the_focal_loss_is_refused_for_a_cascade():
    changes = {**CASCADE, "MODEL.ROI_HEADS.LOSS": "FocalLoss"}
    with pytest.raises(ConfigError, match="FocalLoss' is not allowed for CascadeROIHeads, which"):
        build_detector(config(**changes), CLASSES)


@pytest.mark.parametrize("detector", [FASTER_RCNN, *DENSE])
def test_every_kind_of_detector_trains_and_detects(detector):
    model = build_detector(config(detector=detector), CLASSES).train()
    losses = model(images(), SupervisedLoss(TARGETS))
    assert {"loss_cls", "loss_box_reg"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    found = model.detect(images())
    assert [type(found), *map(type, found)] == [list, Detections, Detections]
    assert model.training


def test_detections_do_not_depend_on_the_other_images():
    detector = build_detector(config(), CLASSES)
    together = detector.detect(images())
    for image, found in zip(images(), together, strict=True):
        assert len(found) > 0
        assert torch.equal(detector.detect([image])[0].boxes, found.boxes)


def test_images_are_handed_over_in_the_models_channel_order():
    detector = build_detector(config(), CLASSES)
    found = detector.detect(images())
    detector.image_format = "BGR"
    flipped = detector.detect([image.flip(0) for image in images()])
    for one, other in zip(found, flipped, strict=True):
        assert len(one) > 0
        assert torch.equal(one.boxes, other.boxes)


def test_its_evaluator_counts_as_ours_does(tmp_path):
    from detectron2.evaluation import COCOEvaluator

    from ssod_imwa.detection.data.catalog import register
    from ssod_imwa.detection.data.records import DetectionDataset, ImageRecord
    from ssod_imwa.integrations.detectron2 import register_in_detectron2, run_evaluator

    rng = np.random.default_rng(0)
    records, predictions = [], {}
    for number in range(1, 13):
        corners = rng.uniform(0, 60, (4, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 40, (4, 2))], 1)
        labels = rng.integers(0, CLASSES, 4)
        none = np.zeros(4, dtype=bool)
        annotations = Annotations(boxes.astype(np.float32), labels, none, none)
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (100, 100)).save(file)
        records.append(ImageRecord(str(file), number, 100, 100, annotations))
        guessed = np.concatenate([boxes + rng.normal(0, 3, (4, 4)), boxes + 20])
        predictions[number] = Detections(
            torch.tensor(guessed, dtype=torch.float32),
            torch.tensor(np.concatenate([labels, labels])),
            torch.tensor(rng.uniform(0.1, 1, 8), dtype=torch.float32),
        )
    dataset = DetectionDataset("boxes_for_both", tuple(records), ("a", "b", "c"))
    register("boxes_for_both", lambda root: dataset)
    register_in_detectron2(["boxes_for_both"])

    evaluator = COCOEvaluator("boxes_for_both", tasks=("bbox",), output_dir=str(tmp_path))
    theirs = run_evaluator(evaluator, dataset, predictions)["bbox"]
    ours = coco_metrics(
        [r.annotations for r in records],
        [predictions[r.image_id] for r in records],
        classes=dataset.classes,
    )
    for name in ("AP", "AP50", "AP75", "AP-a", "AP-b", "AP-c"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-6), name
    assert 5 < ours["AP"] < 95


def test_keys_of_detectron2_that_nothing_reads_are_warned_of_by_name(caplog):
    config(**{"DATALOADER.REPEAT_THRESHOLD": 0.0, "TEST.AUG.ENABLED": False})  # its defaults
    assert "to no effect" not in caplog.text
    config(**{"TEST.AUG.ENABLED": True, "SOLVER.BIAS_LR_FACTOR": 2.0})
    assert "SOLVER.BIAS_LR_FACTOR, TEST.AUG.ENABLED: set to no effect" in caplog.text
