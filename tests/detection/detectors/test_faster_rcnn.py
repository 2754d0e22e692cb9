import numpy as np
import pytest
import torch
from support import detector_options
from torch import nn
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FrozenBatchNorm2d, box_iou

from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.objectives import SupervisedLoss

LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}


SMALL = detector_options(
    backbone={"freeze_at": 0},
    resnets={"depth": 18, "norm": "BN"},
    fpn={"out_channels": 16},
    anchor_generator={"sizes": [[16], [24], [32], [48], [64]], "aspect_ratios": [[1.0]]},
    rpn={
        "pre_nms_topk_train": 50,
        "pre_nms_topk_test": 50,
        "post_nms_topk_train": 30,
        "post_nms_topk_test": 30,
    },
    roi_heads={"batch_size_per_image": 16, "score_thresh_test": 0.0},
    roi_box_head={"fc_dim": 32},
)


def small_detector(num_classes=3, **groups):
    torch.manual_seed(0)
    return TorchvisionFasterRCNN(detector_options(SMALL, **groups), num_classes=num_classes)


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


def targets(*counts):
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 8.0, 60.0, 50.0]])
    return [Targets(boxes[:n], torch.tensor([0, 2])[:n]) for n in counts]


def same(first, second, tolerance=1e-4):
    torch.testing.assert_close(first.boxes, second.boxes, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.scores, second.scores, rtol=tolerance, atol=tolerance)
    assert first.labels.tolist() == second.labels.tolist()


def test_losses_have_the_names_of_the_contract_and_reach_every_parameter():
    detector = small_detector()
    losses = detector(images((64, 64), (50, 70)), SupervisedLoss(targets(2, 1)))
    assert set(losses) == LOSSES
    assert all(loss.dim() == 0 and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("loss", ["CrossEntropy", "FocalLoss"])
def test_images_without_boxes_give_finite_losses_and_a_gradient_for_every_parameter(loss):
    detector = small_detector(roi_loss={"loss": loss})
    losses = detector(images((64, 64), (50, 70)), SupervisedLoss(targets(0, 0)))
    assert losses["loss_rpn_loc"].item() == 0
    assert losses["loss_box_reg"].item() == 0
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_initial_classification_loss_is_that_of_a_uniform_guess():
    losses = small_detector(num_classes=9)(images((64, 64)), SupervisedLoss(targets(2)))
    assert losses["loss_cls"].item() == pytest.approx(np.log(10), rel=0.05)


def test_roi_losses_equal_torchvisions_where_the_definitions_coincide():
    heads = small_detector(roi_box_head={"smooth_l1_beta": 1 / 9}).roi_heads
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 4, generator=generator)
    deltas = torch.randn(40, 16, generator=generator)
    labels = torch.randint(4, (40,), generator=generator)
    box_targets = torch.randn(40, 4, generator=generator)
    ours = heads.compute_loss(logits, deltas, labels, box_targets)
    classification, location = fastrcnn_loss(logits, deltas, [labels], [box_targets])
    torch.testing.assert_close(ours["loss_classifier"], classification)
    torch.testing.assert_close(ours["loss_box_reg"], location)


def test_roi_losses_of_no_proposal_are_zero():
    """As of an image without boxes whose proposals are all too small."""
    heads = small_detector().roi_heads
    logits, deltas = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 16, requires_grad=True)
    losses = heads.compute_loss(logits, deltas, torch.zeros(0, dtype=torch.long), deltas[:, :4])
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0]


def rpn_inputs(anchors=200):
    generator = torch.Generator().manual_seed(4)
    labels = [
        torch.randint(-1, 2, (anchors,), generator=generator).float() * (torch.arange(anchors) % 3)
        for _ in range(2)
    ]
    labels = [x.clamp(-1, 1) for x in labels]
    logits = torch.randn(2 * anchors, 1, generator=generator)
    deltas = torch.randn(2 * anchors, 4, generator=generator)
    return logits, deltas, labels, [torch.randn(anchors, 4, generator=generator) for _ in range(2)]


def test_rpn_losses_equal_torchvisions_when_the_sample_is_full():
    rpn = small_detector(
        roi_box_head={"smooth_l1_beta": 1 / 9}, rpn={"batch_size_per_image": 32}
    ).rpn
    torch.manual_seed(0)
    ours = rpn.compute_loss(*rpn_inputs())
    torch.manual_seed(0)
    reference = RegionProposalNetwork.compute_loss(rpn, *rpn_inputs())
    torch.testing.assert_close(ours, reference)


def test_rpn_losses_are_divided_by_the_full_sample_even_when_fewer_anchors_are_sampled():
    rpn = small_detector(rpn={"batch_size_per_image": 1024, "positive_fraction": 1.0}).rpn
    logits, deltas, labels, box_targets = rpn_inputs()
    objectness, location = rpn.compute_loss(logits, deltas, labels, box_targets)
    expected_objectness = expected_location = 0.0
    rows = zip(
        logits.flatten().double(), deltas, torch.cat(labels), torch.cat(box_targets), strict=True
    )
    for logit, delta, label, target in rows:
        if label >= 0:
            p = 1 / (1 + np.exp(-float(logit)))
            expected_objectness -= np.log(p if label == 1 else 1 - p)
        if label == 1:
            expected_location += (delta - target).abs().sum().item()
    assert objectness.item() == pytest.approx(expected_objectness / 2048, rel=1e-5)
    assert location.item() == pytest.approx(expected_location / 2048, rel=1e-5)


def test_positive_fraction_bounds_the_sampled_objects():
    sampler = small_detector(rpn={"positive_fraction": 0.25, "batch_size_per_image": 64}).rpn
    labels = [torch.cat([torch.ones(100), torch.zeros(100)])]
    positive, negative = sampler.fg_bg_sampler(labels)
    assert positive[0].sum() == 16
    assert negative[0].sum() == 48


def test_focal_loss_is_used_in_training():
    batch = images((64, 64)), SupervisedLoss(targets(2))
    values = {}
    for loss, gamma in (("CrossEntropy", 1.5), ("FocalLoss", 1.5)):
        detector = small_detector(roi_loss={"loss": loss}, focal={"focal_gamma": gamma})
        torch.manual_seed(1)
        values[loss] = detector(*batch)["loss_cls"].item()
    # Near the uniform guess of four classes, (1 - p) is about 3/4 for every proposal.
    assert values["FocalLoss"] == pytest.approx(0.75**1.5 * values["CrossEntropy"], rel=0.02)


def test_detections_do_not_depend_on_the_other_images():
    detector = small_detector()
    batch = images((64, 64), (50, 70), (64, 64), (33, 90))
    together = detector.detect(batch)
    for image, found in zip(batch, together, strict=True):
        assert len(found) > 0
        same(detector.detect([image])[0], found)


def test_detections_do_not_depend_on_the_first_image_s_height():
    wide, image = images((20, 90), (64, 64))
    first_wide = small_detector()
    first_wide.detect([wide])  # padding makes it 1.6 times as high
    (found,) = first_wide.detect([image])
    (expected,) = small_detector().detect([image])
    assert torch.equal(found.scores, expected.scores)


def test_detections_are_in_the_image_and_labels_count_from_0():
    for image, found in zip(
        images((50, 70)), small_detector().detect(images((50, 70))), strict=True
    ):
        height, width = image.shape[1:]
        assert found.boxes.min() >= 0
        assert found.boxes[:, [0, 2]].max() <= width
        assert found.boxes[:, [1, 3]].max() <= height
        assert set(found.labels.tolist()) <= {0, 1, 2}
        assert (found.scores.diff() <= 0).all()


def test_detect_restores_modes_and_leaves_batch_norms_alone():
    detector = small_detector()
    detector.backbone.fpn.eval()
    before = {name: x.clone() for name, x in detector.state_dict().items()}
    found = detector.detect(images((64, 64)))
    assert detector.training
    assert not detector.backbone.fpn.training
    assert not found[0].scores.requires_grad
    assert all(torch.equal(x, before[name]) for name, x in detector.state_dict().items())


def test_no_image_gives_no_detections():
    assert small_detector().detect([]) == []


def test_forward_refuses_eval_mode_and_uneven_lists():
    detector = small_detector()
    with pytest.raises(ValueError, match="2 images and 1 targets"):
        detector(images((64, 64), (64, 64)), SupervisedLoss(targets(1)))
    with pytest.raises(ValueError, match="0 images"):
        detector([], SupervisedLoss([]))
    with pytest.raises(RuntimeError, match="training mode"):
        detector.eval()(images((64, 64)), SupervisedLoss(targets(1)))


def test_bgr_detector_sees_swapped_channels():
    mean, std = [10.0, 20.0, 30.0], [1.0, 2.0, 4.0]
    rgb = small_detector(pixels={"pixel_mean": mean, "pixel_std": std})
    bgr = small_detector(
        pixels={"pixel_mean": mean[::-1], "pixel_std": std[::-1]}, image={"format": "BGR"}
    )
    (image,) = images((40, 50))
    rgb_batch, bgr_batch = rgb.batch([image]), bgr.batch([image])
    torch.testing.assert_close(rgb_batch.tensors, bgr_batch.tensors.flip(1))
    expected = (image.double() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(rgb_batch.tensors[0, :, :40, :50].double(), expected)
    assert rgb_batch.tensors.shape == (1, 3, 64, 64)
    assert rgb_batch.tensors[0, :, 40:].abs().sum() == 0


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_fixes_the_first_stages(freeze_at, norm):
    body = small_detector(backbone={"freeze_at": freeze_at}, resnets={"norm": norm}).backbone.body
    stages = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for number, stage in enumerate(stages, start=1):
        frozen = number <= freeze_at
        part = body[stage] if number > 1 else nn.Sequential(body["conv1"], body["bn1"])
        assert all(p.requires_grad != frozen for p in part.parameters())
        norms = [x for x in part.modules() if isinstance(x, (nn.BatchNorm2d, FrozenBatchNorm2d))]
        fixed = [isinstance(x, FrozenBatchNorm2d) for x in norms]
        assert fixed == [frozen or norm == "FrozenBN"] * len(norms)


def test_stride_in_1x1_moves_strides_and_keeps_sizes():
    detector = small_detector(resnets={"depth": 50, "stride_in_1x1": True})
    body = detector.backbone.body
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2), ("layer4", 2)):
        block = body[stage][0]
        assert block.conv1.stride == (stride, stride)
        assert block.conv2.stride == (1, 1)
    shapes = [x.shape[-1] for x in detector.backbone(torch.zeros(1, 3, 64, 64)).values()]
    assert shapes == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"resnets": {"depth": 34}}, "depth = 34"),
        ({"resnets": {"norm": "GN"}}, "norm = 'GN'"),
        ({"backbone": {"freeze_at": 6}}, "freeze_at = 6"),
        ({"roi_loss": {"loss": "Dice"}}, "loss = 'Dice'"),
        ({"image": {"format": "RGBA"}}, "format = 'RGBA'"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"resnets": {"stride_in_1x1": True}}, "depth 18"),
        ({"anchor_generator": {"sizes": [[16]]}}, "1 lists of anchor sizes"),
        ({"anchor_generator": {"sizes": [[16], [16], [16], [16], [9, 24]]}}, "anchors per place"),
        ({"roi_loss": {"loss": "FocalLoss"}, "focal": {"focal_gamma": 0.5}}, "gamma = 0.5"),
        ({"pixels": {"pixel_std": [1.0, 1.0, 0.0]}}, "pixel_std"),
        ({"pixels": {"pixel_mean": [1.0]}}, "must have 3 values"),
        ({"roi_heads": {"iou_thresholds": [0.5, 0.6]}}, "must have 1 values"),
    ],
)
def test_wrong_arguments_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        small_detector(**changes)


def test_autocast_decodes_boxes_in_float32():
    detector = small_detector()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(images((64, 64)), SupervisedLoss(targets(2)))
        found = detector.detect(images((64, 64)))[0]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found.boxes.dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    assert all(x.dtype == torch.float32 for x in detector.rpn.anchor_generator.cell_anchors)


def test_box_coder_weights_are_detectron2s():
    detector = small_detector()
    assert detector.roi_heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
    assert detector.rpn.box_coder.weights == (1.0, 1.0, 1.0, 1.0)
    assert detector.rpn.proposal_matcher.allow_low_quality_matches
    assert isinstance(detector.rpn.proposal_matcher, detection_utils.Matcher)


def digit_like_scenes():
    """Four 64 px images with one bright shape each: a filled or a hollow square."""
    scenes, labels = [], []
    for number, (x, y) in enumerate([(8, 8), (30, 10), (12, 28), (26, 26)]):
        image = torch.full((3, 64, 64), 40, dtype=torch.uint8)
        image[:, y : y + 24, x : x + 24] = 220
        if number % 2:
            image[:, y + 6 : y + 18, x + 6 : x + 18] = 40
        scenes.append(image)
        box = torch.tensor([[x, y, x + 24, y + 24]], dtype=torch.float32)
        labels.append(Targets(box, torch.tensor([number % 2])))
    return scenes, labels


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["CrossEntropy", "FocalLoss"])
def test_a_few_images_are_learned_by_heart(loss):
    detector = small_detector(
        num_classes=2,
        roi_loss={"loss": loss},
        roi_heads={"score_thresh_test": 0.05},
        fpn={"out_channels": 32},
        roi_box_head={"fc_dim": 128},
    )
    scenes, labels = digit_like_scenes()
    optimizer = torch.optim.AdamW(detector.parameters())
    steps = 150
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        sum(detector(scenes, SupervisedLoss(labels)).values()).backward()
        optimizer.step()
    for found, target in zip(detector.detect(scenes), labels, strict=True):
        assert found.labels[0] == target.labels[0]
        assert box_iou(found.boxes[:1], target.boxes).item() > 0.7
