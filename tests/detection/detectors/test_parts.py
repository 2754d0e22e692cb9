"""The contract between detectors and objectives, kept by a real detector and by toys."""

import pytest
import torch
import torch.nn.functional as F
from detection_toys import check_mean_of_gradients
from support import Softened, detector_options
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import generalized_box_iou_loss

from ssod_imwa.detection.data.records import Detections, Targets
from ssod_imwa.detection.detectors.base import Detector, padded_size
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.detectors.parts import DenseMaps, Parts
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.errors import ConfigError, UserError, WeightsError

CLASSES = 3
TARGETS = [
    Targets(torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 8.0, 60.0, 50.0]]), torch.tensor([2, 0])),
    Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]
BOXES = [
    torch.tensor([[4.0, 4.0, 30.0, 40.0], [0.0, 0.0, 20.0, 20.0], [10.0, 10.0, 60.0, 50.0]]),
    torch.tensor([[5.0, 5.0, 45.0, 45.0]]),
]


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


IMAGES = images((64, 64), (50, 70))


def faster_rcnn(**groups):
    torch.manual_seed(0)
    options = detector_options(
        backbone={"freeze_at": 0},
        resnets={"depth": 18, "norm": "FrozenBN"},
        fpn={"out_channels": 16},
        anchor_generator={"sizes": [[16], [24], [32], [48], [64]], "aspect_ratios": [[1.0]]},
        rpn={"post_nms_topk_train": 30, "pre_nms_topk_train": 50},
        roi_heads={"batch_size_per_image": 16, "score_thresh_test": 0.0},
        roi_box_head={"fc_dim": 32},
    )
    detector = TorchvisionFasterRCNN(detector_options(options, **groups), num_classes=CLASSES)
    with torch.no_grad():  # initial heads tell no class from another
        detector.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
        detector.roi_heads.box_predictor.bbox_pred.weight.normal_(std=0.1)
    return detector


def all_gradients(detector, objective):
    detector.zero_grad()
    losses = detector(IMAGES, objective)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in detector.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_an_objective_of_regions_can_say_what_the_own_losses_say(beta):
    # As many samples as there are: what is drawn does not depend on the generators.
    everything = {"batch_size_per_image": 4096, "positive_fraction": 1.0}
    detector = faster_rcnn(
        rpn=everything, roi_heads=everything, roi_box_head={"smooth_l1_beta": beta}
    )
    losses, gradients = all_gradients(detector, Softened(TARGETS, TARGETS, background=1.0))
    own_losses, own_gradients = all_gradients(detector, SupervisedLoss(TARGETS))
    assert losses.keys() == own_losses.keys()
    for name, loss in own_losses.items():
        assert loss > 0
        torch.testing.assert_close(losses[name], loss)
    for name, gradient in own_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("confident", [TARGETS, TARGETS[1:] * 2], ids=["boxes", "no boxes"])
def test_a_second_sampling_and_weights_train_every_parameter(confident):
    detector = faster_rcnn()
    losses, gradients = all_gradients(detector, Softened(confident, TARGETS, background=0.2))
    assert all(loss.isfinite() for loss in losses.values())
    assert all(x is not None and x.isfinite().all() for x in gradients.values())


def test_boxes_are_sampled_with_their_targets():
    detector = faster_rcnn()
    sampled = detector.parts(IMAGES).regions.sample(BOXES, TARGETS)
    # The targets' boxes join the proposals; the third proposal overlaps the second target.
    assert sampled[0].labels.tolist() == [2, CLASSES, 0, 2, 0]
    for item in sampled:
        for box, label, matched in zip(item.boxes, item.labels, item.matched, strict=True):
            if label < CLASSES:
                target = TARGETS[0].labels.tolist().index(label)
                assert torch.equal(matched, TARGETS[0].boxes[target])
                assert not box.requires_grad
    assert sampled[1].labels.tolist() == [CLASSES]
    assert torch.equal(sampled[1].boxes, BOXES[1])


def test_given_boxes_train_backbone_and_heads():
    detector = faster_rcnn()
    labels = torch.tensor([2, 3, 0, 3])

    def given_boxes(parts):
        return {"loss_cls": F.cross_entropy(parts.regions.predict(BOXES).logits, labels)}

    _, gradients = all_gradients(detector, given_boxes)
    for name, gradient in gradients.items():
        trained = ("backbone.body.", "roi_heads.box_head.", "cls_score")
        if any(part in name for part in trained):
            assert gradient.abs().sum() > 0, name
        if name.startswith("rpn."):
            assert gradient is None


def test_regions_are_scored_as_detections_are():
    detector = faster_rcnn(roi_heads={"nms_thresh_test": 1.0, "score_thresh_test": 0.0})
    detector.train()
    scored = detector.score_regions(IMAGES, BOXES)
    assert detector.training
    with torch.no_grad():
        heads = detector.eval().roi_heads
        for image, boxes, item in zip(IMAGES, BOXES, scored, strict=True):
            batch = detector.batch([image])
            results, _ = heads(detector.backbone(batch.tensors), [boxes], batch.image_sizes)
            assert item.probabilities.shape == (len(boxes), CLASSES + 1)
            assert not item.probabilities.requires_grad
            torch.testing.assert_close(item.probabilities.sum(1), torch.ones(len(boxes)))
            expected = item.probabilities[:, :CLASSES].flatten().sort(descending=True)
            torch.testing.assert_close(results[0]["scores"], expected.values)
            refined = item.boxes.flatten(0, 1)[expected.indices]
            torch.testing.assert_close(results[0]["boxes"], refined, rtol=1e-4, atol=1e-3)


def test_regions_of_an_image_do_not_depend_on_the_other_images():
    detector = faster_rcnn()
    together = detector.score_regions(IMAGES, BOXES)
    for image, boxes, item in zip(IMAGES, BOXES, together, strict=True):
        (alone,) = detector.score_regions([image], [boxes])
        torch.testing.assert_close(alone.probabilities, item.probabilities)
        torch.testing.assert_close(alone.boxes, item.boxes)


def test_an_image_may_have_no_regions():
    none = torch.zeros(0, 4)
    first, second = faster_rcnn().score_regions(IMAGES, [none, BOXES[1]])
    assert first.probabilities.shape == (0, CLASSES + 1)
    assert first.boxes.shape == (0, CLASSES, 4)
    assert len(second.boxes) == 1
    (alone,) = faster_rcnn().score_regions(IMAGES[:1], [none])
    assert alone.boxes.shape == (0, CLASSES, 4)


def test_parts_see_the_images_once(monkeypatch):
    detector = faster_rcnn().eval()
    passes = []
    detector.backbone.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        parts = detector.parts(images((64, 64), (64, 64)))
        detections = parts.detections()
        scored = parts.regions.score([item.boxes for item in detections])
    assert len(passes) == 1
    assert [len(item.boxes) for item in scored] == [len(item) for item in detections]


def test_numbers_of_images_and_lists_have_to_agree():
    detector = faster_rcnn()
    with pytest.raises(ValueError, match="2 images and 1 lists of boxes"):
        detector.score_regions(IMAGES, BOXES[:1])
    for what in (lambda x: x.predict(BOXES[:1]), lambda x: x.sample(BOXES, TARGETS[:1])):
        with pytest.raises(ValueError, match="2 images and 1 "):
            what(detector.parts(IMAGES).regions)


class DenseParts(Parts):
    """One location for each 8 x 8 pixels, on one level."""

    def __init__(self, detector, images):
        super().__init__(detector.name, images)
        height, width = padded_size(images, 8)
        batch = torch.zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image / 255
        outputs = detector.head(F.avg_pool2d(batch, 8))
        logits, distances, quality = outputs.flatten(2).mT.split([CLASSES, 4, 1], dim=2)
        y, x = torch.meshgrid(torch.arange(height // 8), torch.arange(width // 8), indexing="ij")
        points = 8 * torch.stack([x, y], dim=-1).flatten(0, 1) + 4
        start, end = distances.exp().split(2, dim=2)
        boxes = torch.cat([points - start, points + end], dim=2)
        self._maps = DenseMaps(logits, boxes, quality[..., 0], (len(points),))

    def dense_maps(self):
        return self._maps

    def losses(self, targets):
        self.check_count("targets", targets)
        return {"loss_cls": self._maps.logits.square().mean()}

    def detections(self):
        best = self._maps.logits.sigmoid().flatten(1).max(1)
        return [
            Detections(boxes[index // CLASSES, None], index[None] % CLASSES, score[None])
            for boxes, score, index in zip(self._maps.boxes, best.values, best.indices, strict=True)
        ]


class ToyDense(Detector):
    abilities = frozenset({"dense"})
    size_divisor = 8

    def __init__(self):
        super().__init__(CLASSES)
        self.head = nn.Conv2d(3, CLASSES + 5, 1)

    def parts(self, images):
        return DenseParts(self, images)


class DenseLoss:
    """As Dense Teacher trains: the teacher's maps are the labels of its best locations."""

    def __init__(self, maps, ratio):
        self.maps, self.ratio = maps, ratio

    def __call__(self, parts):
        student, teacher = parts.dense_maps(), self.maps
        scores = teacher.logits.sigmoid()
        best = scores.amax(2).flatten()
        chosen = best.topk(max(1, int(self.ratio * len(best)))).indices
        labels = torch.zeros_like(scores).flatten(0, 1)
        labels[chosen] = scores.flatten(0, 1)[chosen]
        logits = student.logits.flatten(0, 1)
        focal = (labels - logits.sigmoid()).square() * F.binary_cross_entropy_with_logits(
            logits, labels, reduction="none"
        )
        boxes = (maps.boxes.flatten(0, 1)[chosen] for maps in (student, teacher))
        quality = (maps.quality.flatten()[chosen] for maps in (student, teacher))
        predicted, wanted = quality
        return {
            "loss_cls": focal.sum() / best[chosen].sum(),
            "loss_box_reg": generalized_box_iou_loss(*boxes, reduction="mean"),
            "loss_quality": F.binary_cross_entropy_with_logits(predicted, wanted.sigmoid()),
        }


def test_a_dense_objective_trains_a_dense_detector():
    torch.manual_seed(0)
    student, teacher = ToyDense(), ToyDense().eval()
    maps = teacher.dense_maps(IMAGES)
    assert maps.logits.shape == (2, 8 * 9, CLASSES)  # both images in 64 x 72 pixels
    assert sum(maps.levels) == maps.boxes.shape[1]
    assert not maps.logits.requires_grad
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    history = []
    for _ in range(100):
        losses = student(IMAGES, DenseLoss(maps, ratio=0.1))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["loss_cls"] < 0.5 * history[0]["loss_cls"]
    assert history[-1]["loss_box_reg"] < 0.5 * history[0]["loss_box_reg"]
    assert history[-1]["loss_quality"] < history[0]["loss_quality"]


def test_a_dense_detector_detects_through_the_same_parts():
    detections = ToyDense().detect(IMAGES)
    assert [len(item) for item in detections] == [1, 1]
    assert not detections[0].boxes.requires_grad


class NeedsRegions(DetectionMethod):
    needs = frozenset({"regions"})

    def losses(self, batch, t):
        raise NotImplementedError


def test_a_method_is_refused_a_detector_without_what_it_needs():
    NeedsRegions(faster_rcnn())
    with pytest.raises(ConfigError) as caught:
        NeedsRegions(ToyDense())
    assert str(caught.value) == (
        "NeedsRegions needs a detector with the ability 'regions' (to score given boxes), which "
        "ToyDense does not have"
    )


def test_an_objective_is_refused_what_its_detector_cannot_do():
    message = "Softened needs .* 'regions' .* which ToyDense does not have"
    with pytest.raises(ConfigError, match=message):
        ToyDense()(IMAGES, Softened(TARGETS, TARGETS, background=1.0))
    message = "DenseLoss needs .* 'dense' .* which torchvision's Faster R-CNN does not have"
    with pytest.raises(ConfigError, match=message):
        faster_rcnn()(IMAGES, DenseLoss(None, ratio=0.1))
    with pytest.raises(ConfigError, match=r"needs .* 'dense' \(to map all locations\)"):
        faster_rcnn().dense_maps(IMAGES)
    with pytest.raises(ConfigError, match=r"needs .* 'regions' \(to score given boxes\)"):
        ToyDense().score_regions(IMAGES, BOXES)


def test_a_detector_of_any_class_is_filled_and_not_exported(tmp_path):
    trained, detector = ToyDense(), ToyDense()
    torch.save({"student": trained.state_dict()}, tmp_path / "x.pth")
    detector.load_weights("")
    assert not torch.equal(detector.head.weight, trained.head.weight)
    detector.load_weights(str(tmp_path / "x.pth"))
    assert torch.equal(detector.head.weight, trained.head.weight)
    with pytest.raises(WeightsError, match="no such file"):
        detector.load_weights(str(tmp_path / "y.pth"))
    with pytest.raises(UserError, match="ToyDense cannot be exported"):
        detector.export(tmp_path / "z.pth", min_size=8, max_size=8, about={})


def gradients_of(rank, *, parallel):
    detector = faster_rcnn()
    student = DistributedDataParallel(detector, broadcast_buffers=False) if parallel else detector
    torch.manual_seed(rank)
    losses = student(
        images((64, 64), (50, 70), seed=rank), Softened(TARGETS, TARGETS, background=0.2)
    )
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in detector.named_parameters()}


@pytest.mark.slow
def test_an_objective_under_ddp_averages_the_ranks_gradients(tmp_path):
    check_mean_of_gradients(gradients_of, tmp_path)
