"""FCOS and RetinaNet of torchvision's parts: maps, detections, gradients, export."""

import math

import pytest
import torch
from dense_toys import (
    ANCHORS,
    BACKGROUND,
    BUILDERS,
    CLASSES,
    COMMON,
    IMAGES,
    SIZES,
    TARGETS,
    fcos,
    images,
    overlap_by_hand,
    retinanet,
    sigmoid,
)
from support import on_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_iou

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.dense import best_detections, one_hot_targets
from ssod_imwa.detection.detectors.fcos import ScaledRegressionHead
from ssod_imwa.detection.detectors.options import (
    AnchorOptions,
    BackboneOptions,
    DenseLevelOptions,
    DetectionOptions,
    FPNOptions,
    ImageOptions,
    ResNetOptions,
)
from ssod_imwa.detection.detectors.parts import DenseMaps
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.errors import UserError, WeightsError


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("targets", [TARGETS, BACKGROUND], ids=["boxes", "no boxes"])
def test_every_parameter_has_a_finite_gradient(build, targets):
    detector = build()
    losses = detector(IMAGES, SupervisedLoss(targets))
    sum(losses.values()).backward()
    assert losses["loss_cls"] > 0
    if targets is BACKGROUND:
        assert losses["loss_box_reg"] == 0
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("build", BUILDERS)
def test_maps_hold_all_locations_of_the_padded_batch(build):
    detector = build()
    maps = detector.dense_maps(IMAGES)
    per_place = 1 if build is fcos else 4
    assert maps.levels == tuple(per_place * n for n in (96, 24, 6, 2, 1))
    count = sum(maps.levels)
    assert maps.logits.shape == (2, count, CLASSES)
    assert maps.boxes.shape == (2, count, 4)
    assert (maps.quality is None) == (build is retinanet)
    assert not maps.logits.requires_grad
    assert detector.training
    again = detector.parts(IMAGES).dense_maps()
    torch.testing.assert_close(again.boxes, maps.boxes)
    assert again.boxes.requires_grad


FINE = {"levels": DenseLevelOptions([2, 3, 4])}


@pytest.mark.parametrize(
    ("levels", "sizes", "counts"),
    [([2, 3, 4], 4, (384, 96, 24, 6, 2)), ([3, 4], 3, (96, 24, 6, 2))],
)
def test_a_pyramid_stands_on_other_levels(levels, sizes, counts):
    changes = {"levels": DenseLevelOptions(levels)}
    detector = fcos(common={**COMMON, **changes}, sizes_of_interest=SIZES[:sizes])
    assert detector.dense_maps(IMAGES).levels == counts
    assert detector.size_divisor == 2 ** levels[-1]
    points, strides = detector.parts(IMAGES)._locations.points, changes["levels"].strides
    assert strides == tuple(2 ** (levels[0] + number) for number in range(len(counts)))
    for level, stride in zip(points.split(list(counts)), strides, strict=True):
        assert level.tolist() == [
            [x, y] for y in range(0, 64, stride) for x in range(0, 96, stride)
        ]
    anchors = AnchorOptions(sizes=ANCHORS.sizes[: len(counts)], aspect_ratios=[[1.0, 2.0]])
    maps = retinanet(common={**COMMON, **changes}, anchors=anchors).dense_maps(IMAGES)
    assert maps.levels == tuple(4 * count for count in counts)


def test_anchors_of_fine_levels_stand_on_the_points_of_fcos():
    parts = retinanet(common={**COMMON, **FINE}).parts(IMAGES)
    points = fcos(common={**COMMON, **FINE}).parts(IMAGES)._locations.points
    centers = (parts._anchors[:, :2] + parts._anchors[:, 2:]) / 2
    assert torch.equal(centers, points.repeat_interleave(4, 0))


def test_boxes_of_fcos_are_points_plus_scaled_distances():
    detector = fcos()
    parts = detector.parts(IMAGES)
    head = detector.head.regression_head
    raw = [head.bbox_reg(head.conv(level)) for level in parts._features]
    number = 0
    for level, (outputs, stride) in enumerate(zip(raw, (8, 16, 32, 64, 128), strict=True)):
        scale = head.scales[level].item()
        for row in range(outputs.shape[2]):
            for column in range(outputs.shape[3]):
                values = outputs[1, :, row, column].tolist()
                distances = [max(0, scale * x) * stride for x in values]
                x, y = column * stride, row * stride
                left, top, right, bottom = distances
                box = parts.dense_maps().boxes[1, number].tolist()
                assert box == pytest.approx([x - left, y - top, x + right, y + bottom], abs=1e-3)
                number += 1


@pytest.mark.parametrize("seed", range(5))
def test_every_side_of_a_new_fcos_box_can_learn(seed):
    torch.manual_seed(seed)
    head = ScaledRegressionHead(64, 4, 2)
    distances, _ = head([torch.randn(2, 64, size, size).relu() for size in (8, 4)])
    assert distances.min() > 0  # below, a ReLU has no gradient
    assert distances.mean().item() == pytest.approx(1, abs=0.2)


def maps_of(levels, classes, *, quality, seed):
    generator = torch.Generator().manual_seed(seed)
    count = sum(levels)
    start = 60 * torch.rand(1, count, 2, generator=generator)
    boxes = torch.cat([start, start + 5 + 30 * torch.rand(1, count, 2, generator=generator)], 2)
    logits = 2 * torch.randn(1, count, classes, generator=generator) - 2
    qualities = torch.randn(1, count, generator=generator) if quality else None
    return DenseMaps(logits, boxes, qualities, levels)


def detections_by_hand(maps, size, *, score_thresh, topk, at_most_locations, nms_thresh, limit):
    height, width = size
    candidates, first = [], 0
    for count in maps.levels:
        pairs = []
        for place in range(first, first + count):
            for label, logit in enumerate(maps.logits[0, place].tolist()):
                pairs.append((sigmoid(logit), place, label))
        pairs.sort(reverse=True)
        for p, place, label in pairs[: min(topk, count) if at_most_locations else topk]:
            if p > score_thresh:
                score = p
                if maps.quality is not None:
                    score = math.sqrt(p * sigmoid(maps.quality[0, place].item()))
                x1, y1, x2, y2 = maps.boxes[0, place].tolist()
                box = [min(x1, width), min(y1, height), min(x2, width), min(y2, height)]
                candidates.append((score, label, box))
        first += count
    kept = []
    for candidate in sorted(candidates, reverse=True):
        _, label, box = candidate
        if all(
            other != label or overlap_by_hand(box, better)[0] <= nms_thresh
            for _, other, better in kept
        ):
            kept.append(candidate)
    return kept[:limit]


@pytest.mark.parametrize("quality", [True, False])
@pytest.mark.parametrize("at_most_locations", [True, False])
def test_detections_equal_the_rules_pair_by_pair(quality, at_most_locations):
    settings = {
        "score_thresh": 0.15,
        "topk": 25,
        "at_most_locations": at_most_locations,
        "nms_thresh": 0.4,
        "limit": 20,
    }
    for seed in range(3):
        maps = maps_of((40, 10, 2), CLASSES, quality=quality, seed=seed)
        (found,) = best_detections(maps, [(70, 80)], **settings)
        expected = detections_by_hand(maps, (70, 80), **settings)
        assert len(expected) > 10
        assert found.labels.tolist() == [label for _, label, _ in expected]
        assert found.scores.tolist() == pytest.approx([score for score, _, _ in expected])
        for box, (_, _, wanted) in zip(found.boxes.tolist(), expected, strict=True):
            assert box == pytest.approx(wanted, abs=1e-4)


def test_a_level_gives_no_more_candidates_than_it_has_locations():
    maps = maps_of((2,), CLASSES, quality=False, seed=0)
    maps.logits.fill_(3.0)
    settings = {"score_thresh": 0.1, "topk": 100, "nms_thresh": 1.0, "limit": 100}
    counts = [
        len(best_detections(maps, [(99, 99)], at_most_locations=flag, **settings)[0])
        for flag in (True, False)
    ]
    assert counts == [2, 2 * CLASSES]


@pytest.mark.parametrize("build", BUILDERS)
def test_detections_do_not_depend_on_the_other_images(build):
    detector = build(score_thresh_test=0.01)
    batch = images((64, 64), (50, 70), (64, 64), (33, 90))
    for image, found in zip(batch, detector.detect(batch), strict=True):
        assert len(found) > 0
        (alone,) = detector.detect([image])
        assert alone.labels.tolist() == found.labels.tolist()
        torch.testing.assert_close(alone.boxes, found.boxes, rtol=1e-3, atol=1e-2)
        height, width = image.shape[1:]
        assert found.boxes.min() >= 0
        assert found.boxes[:, 0::2].max() <= width
        assert found.boxes[:, 1::2].max() <= height
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("build", BUILDERS)
def test_autocast_decodes_boxes_in_float32(build):
    detector = build(score_thresh_test=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(IMAGES, SupervisedLoss(TARGETS))
        maps = detector.dense_maps(IMAGES)
        (found, _) = detector.detect(IMAGES)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert maps.logits.dtype == maps.boxes.dtype == found.boxes.dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("build", BUILDERS)
def test_gradients_in_bfloat16_are_near_those_in_float32_on_maps_of_one_pixel(build):
    """torch's own, of a convolution with stride 2, hold what was in memory before."""
    found = []
    for enabled in (False, True):
        detector = build()
        rubbish = [torch.full((64, 64, 3, 3), 1e30, dtype=torch.bfloat16) for _ in range(20)]
        del rubbish
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = detector(IMAGES[1:], SupervisedLoss(TARGETS[:1]))
        sum(losses.values()).backward()
        found.append(detector.backbone.fpn.extra_blocks.p7.weight.grad)
    # As a whole, and against 1e30: ReLUs of the head near 0 decide over 1.3 times the gradient on a
    # processor without bfloat16, and over less than half of it on others.
    assert (found[1] - found[0]).norm() < 3 * found[0].norm()


@pytest.mark.parametrize("build", BUILDERS)
def test_no_ability_but_dense(build):
    assert build().abilities == {"dense"}
    assert build().name in ("torchvision's FCOS", "torchvision's RetinaNet")


def test_labels_outside_the_classes_are_no_targets():
    labels = torch.tensor([[0, 2, 3, -1]])
    found = one_hot_targets(torch.zeros(1, 4, 3), labels)
    assert found.tolist() == [[[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("build", "changes", "match"),
    [
        (fcos, {"sizes_of_interest": [1.0]}, r"sizes_of_interest = .*must have 4 values"),
        (fcos, {"common": {**COMMON, "levels": DenseLevelOptions([3, 4])}}, "must have 3 values"),
        (fcos, {"sizes_of_interest": [9.0, 8.0, 90.0, 99.0]}, "must be ascending"),
        (fcos, {"focal_loss_gamma": 0.5}, "gamma = 0.5"),
        (fcos, {"quality": "size"}, "quality = 'size'"),
        (fcos, {"common": {**COMMON, "fpn": FPNOptions(out_channels=32)}}, "at least 64"),
        (retinanet, {"common": {**COMMON, "fpn": FPNOptions(out_channels=48)}}, "multiple of 32"),
        (retinanet, {"iou_thresholds": [0.5]}, "must have 2 values"),
        (retinanet, {"iou_thresholds": [0.5, 0.4]}, "must be ascending"),
        (retinanet, {"norm": "BN"}, "norm = 'BN'"),
        (retinanet, {"anchors": AnchorOptions(sizes=[[9.0]])}, "1 lists of anchor sizes"),
    ],
)
def test_wrong_arguments_are_refused(build, changes, match):
    with pytest.raises(ValueError, match=match):
        build(**changes)


def test_retinanet_without_group_norm_takes_any_width():
    common = {**COMMON, "fpn": FPNOptions(out_channels=8)}
    detector = retinanet(common=common, norm="")
    assert not [x for x in detector.modules() if isinstance(x, nn.GroupNorm)]
    assert all(x > 0 for x in detector(IMAGES, SupervisedLoss(TARGETS)).values())


@pytest.mark.parametrize("build", BUILDERS)
def test_weights_move_between_detectors_of_the_same_classes(tmp_path, build):
    trained, detector = build(), build()
    with torch.no_grad():
        for x in trained.parameters():
            x.add_(0.01)
    torch.save({"student": trained.state_dict()}, tmp_path / "x.pth")
    detector.load_weights(str(tmp_path / "x.pth"))
    for name, x in trained.state_dict().items():
        assert torch.equal(detector.state_dict()[name], x)
    name = detector.classifier
    state = trained.state_dict()
    state[name] = torch.cat([state[name], state[name]])
    torch.save(state, tmp_path / "y.pth")
    with pytest.raises(WeightsError, match="was trained on 6 classes, the model has 3"):
        detector.load_weights(str(tmp_path / "y.pth"))


SMALL = {**COMMON, "detections": DetectionOptions(detections_per_image=30)}


LITE = {"backbone": BackboneOptions(name="timm:tf_efficientnet_lite0", freeze_at=0)}


@pytest.mark.parametrize("build", BUILDERS)
def test_they_train_on_bodies_of_timm(build):
    detector = build(common={**COMMON, **LITE})
    sum(detector(IMAGES, SupervisedLoss(TARGETS)).values()).backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"image": ImageOptions(format="BGR")}, LITE, FINE],
    ids=["RGB", "BGR", "timm", "fine"],
)
def test_the_printed_lines_make_a_torchvision_model_with_equal_detections(tmp_path, build, changes):
    detector = build(common={**SMALL, **changes}, score_thresh_test=0.05)
    names = {}
    classes = ["a", "b", "c"]
    file = tmp_path / "exported.pth"
    exec(detector.export(file, min_size=96, max_size=128, about={"classes": classes}), names)
    assert names["classes"] == classes  # labels count from 0
    assert names["input_size"] == {"min_size": 96, "max_size": 128}
    model = names["model"]
    assert type(model).__module__.startswith("torchvision.")
    # Neither edge is a multiple of 128: torchvision's own points of p6 and p7 would be elsewhere.
    (image,) = images((96, 128))
    (ours,) = detector.detect([image])
    with torch.no_grad():
        plain = model([image / 255])[0]
    assert len(ours) == 30
    assert plain["labels"].tolist() == ours.labels.tolist()
    torch.testing.assert_close(ours.scores, plain["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.boxes, plain["boxes"], rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("build", BUILDERS)
def test_an_export_fills_a_detector_of_rgb_alone(tmp_path, build):
    trained, detector = build(), build()
    with torch.no_grad():
        for x in trained.parameters():  # scales, too, which torchvision's FCOS does not have
            x.add_(0.01)
    file = tmp_path / "exported.pth"
    trained.export(file, min_size=96, max_size=128, about={})
    detector.load_weights(str(file))
    for name, x in trained.state_dict().items():
        assert torch.equal(detector.state_dict()[name], x)
    with pytest.raises(WeightsError, match="is an export, which takes RGB images, not BGR"):
        build(common={**COMMON, "image": ImageOptions(format="BGR")}).load_weights(str(file))


def test_a_scale_below_0_cannot_be_exported(tmp_path):
    detector = fcos()
    with torch.no_grad():
        detector.head.regression_head.scales[2] = -0.5
    with pytest.raises(UserError, match="the scale of a level is not positive"):
        detector.export(tmp_path / "x.pth", min_size=96, max_size=128, about={})
    assert not (tmp_path / "x.pth").exists()


class TwoRanks(Group):
    """A group whose other process has found as many positive locations as is said."""

    def __init__(self, other):
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def mean(self, number):
        return (number + self.other) / 2


@pytest.mark.parametrize("build", BUILDERS)
def test_losses_are_divided_by_the_mean_of_positive_locations_over_ranks(build):
    detector = build()
    alone = detector(IMAGES, SupervisedLoss(TARGETS))
    detector.group = TwoRanks(0)
    shared = detector(IMAGES, SupervisedLoss(TARGETS))
    for name, loss in alone.items():
        assert shared[name].item() == pytest.approx(2 * loss.item(), rel=1e-5)


def gradients(detector, student, pictures, targets):
    losses = student(pictures, SupervisedLoss(targets))
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in detector.named_parameters()}


def exchanged_gradients(rank):
    """Of one image on each rank, of which one has boxes."""
    detector = fcos(common={**COMMON, "resnets": ResNetOptions(depth=18, norm="FrozenBN")})
    detector.group = Group(rank, 2)
    student = DistributedDataParallel(detector, broadcast_buffers=False)
    pictures = images((64, 96), (64, 96))
    return gradients(detector, student, pictures[rank : rank + 1], TARGETS[rank : rank + 1])


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_their_batch_on_one(tmp_path):
    found = on_two_ranks(exchanged_gradients, tmp_path)
    detector = fcos()
    expected = gradients(detector, detector, images((64, 96), (64, 96)), TARGETS)
    for name, gradient in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS)
def test_a_few_images_are_learned_by_heart(build):
    common = {**COMMON, "resnets": ResNetOptions(depth=18, norm="BN")}
    detector = build(common=common, prior_prob=0.01, initial=True)
    scenes, labels = [], []
    for number, (x, y) in enumerate([(8, 8), (30, 10), (12, 28), (26, 26)]):
        image = torch.full((3, 64, 64), 40, dtype=torch.uint8)
        image[:, y : y + 24, x : x + 24] = 220
        if number % 2:
            image[:, y + 6 : y + 18, x + 6 : x + 18] = 40
        scenes.append(image)
        box = torch.tensor([[x, y, x + 24, y + 24]], dtype=torch.float32)
        labels.append(Targets(box, torch.tensor([number % 2])))
    optimizer = torch.optim.AdamW(detector.parameters())
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 60)
        optimizer.zero_grad()
        sum(detector(scenes, SupervisedLoss(labels)).values()).backward()
        optimizer.step()
    for found, target in zip(detector.detect(scenes), labels, strict=True):
        assert found.labels[0] == target.labels[0]
        assert box_iou(found.boxes[:1], target.boxes).item() > 0.7
