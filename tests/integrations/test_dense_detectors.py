"""detectron2's one-stage detectors behind our interface: maps of all locations, Dense Teacher."""

import pytest
import torch
from detectron2_toys import CLASSES, DENSE, SMALL, TARGETS, config, images, unlabeled_batch

from ssod_imwa.detection.build import build_method
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.errors import ConfigError

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]


@pytest.mark.parametrize("detector", DENSE)
def test_dense_detectors_map_all_locations(detector):
    model = build_detector(config(detector=detector), CLASSES)
    assert model.abilities == {"dense"}
    maps = model.dense_maps(images())
    height = width = 96  # both images in one batch, padded to multiples of 32
    per_place = 1 if "fcos" in detector else len(SMALL["MODEL.ANCHOR_GENERATOR.SIZES"][0])
    cells = [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]
    assert maps.levels == tuple(per_place * rows * columns for rows, columns in cells)
    assert maps.logits.shape == (2, sum(maps.levels), CLASSES)
    assert (maps.quality is None) == ("fcos" not in detector)
    assert not maps.logits.requires_grad


@pytest.mark.parametrize("detector", DENSE)
def test_detections_are_the_best_of_the_maps(detector):
    """What a detection says stands in the maps at one place: its box and its score."""
    torch.manual_seed(0)
    model = build_detector(config(detector=detector), CLASSES)
    head = model.model.head
    with torch.no_grad():
        for layer in (head.cls_score, head.bbox_pred):
            layer.weight.normal_(std=0.1)
        head.cls_score.bias.zero_()
        (image, _) = images()
        maps = model.dense_maps([image])
        (found,) = model.detect([image])
    scores = maps.logits[0].sigmoid()
    if maps.quality is not None:
        scores = (scores * maps.quality[0].sigmoid()[:, None]).sqrt()
    boxes = maps.boxes[0].clone()
    boxes[:, 0::2].clamp_(0, image.shape[2])
    boxes[:, 1::2].clamp_(0, image.shape[1])
    assert len(found) > 20
    for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
        near = (boxes - box).abs().amax(1) < 1e-3
        assert (scores[near, label] - score).abs().min() < 1e-5


@pytest.mark.parametrize("detector", DENSE)
def test_dense_teacher_trains_detectron2s_dense_detectors(detector):
    method = {"SSOD.ALGORITHM": "dense_teacher", "SSOD.BURN_IN_ITERS": 0}
    cfg = config(detector=detector, **method, **{"SSOD.EMA_START_ITERS": 0})
    method = build_method(cfg, build_detector(cfg, CLASSES))
    method.student.train()
    losses = method.losses(unlabeled_batch(), 1)
    assert {"loss_cls_pseudo", "loss_box_reg_pseudo"} <= losses.keys()
    assert ("loss_quality_pseudo" in losses) == ("fcos" in detector)
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    trained = [p for p in method.student.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_two_stage_detector_is_refused_dense_teacher():
    cfg = config(**{"SSOD.ALGORITHM": "dense_teacher"})
    message = "DenseTeacher needs .* 'dense' .* detectron2's GeneralizedRCNN does not have"
    with pytest.raises(ConfigError, match=message):
        build_method(cfg, build_detector(cfg, CLASSES))


def test_the_loss_normalizer_of_dense_detectors_is_a_members_state():
    cfg = config(detector=DENSE[0], **{"SSOD.ALGORITHM": "unbiased_teacher"})
    method = build_method(cfg, build_detector(cfg, CLASSES))
    assert method.state_dict() == {}
    method.student.train()(images(), SupervisedLoss(TARGETS))
    saved = method.state_dict()
    assert list(saved.values()) == [method.student.model.loss_normalizer]
    method.load_state_dict(dict.fromkeys(saved, 12.5))
    assert method.student.model.loss_normalizer == 12.5


@pytest.mark.parametrize("algorithm", ["unbiased_teacher", "mean_teacher"])
@pytest.mark.parametrize("detector", DENSE)
def test_pseudo_labels_leave_the_loss_normalizer_of_labeled_images(detector, algorithm):
    start = {"SSOD.BURN_IN_ITERS": 0} if algorithm == "unbiased_teacher" else {}
    cfg = config(detector=detector, **{"SSOD.ALGORITHM": algorithm}, **start)
    method = build_method(cfg, build_detector(cfg, CLASSES))
    method.student.train()
    losses = method.losses(unlabeled_batch(), 0)
    assert "loss_cls_pseudo" in losses
    labeled = build_detector(cfg, CLASSES).train()
    labeled(2 * images(), SupervisedLoss(2 * TARGETS))  # as weak and as strong views
    assert method.student.outside_state() == labeled.outside_state() != {}
