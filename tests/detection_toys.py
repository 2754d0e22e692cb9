"""Small detectors and batches for tests of methods."""

from functools import partial

import torch
from support import detector_options, on_two_ranks
from torch import nn

from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Detections, Targets, View
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.detectors.fcos import TorchvisionFCOS
from ssod_imwa.detection.detectors.options import FCOSOptions, RetinaNetOptions
from ssod_imwa.detection.detectors.retinanet import TorchvisionRetinaNet

NAMES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg")


class LinearDetector(Detector):
    """Losses are quadratic in four weights; scores are the image's first pixels over 100."""

    def __init__(self):
        super().__init__(num_classes=3)
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.calls = []

    def parts(self, images):
        raise NotImplementedError

    def forward(self, images, objective):
        assert self.training
        targets = objective.targets
        self.calls.append(([int(x[0, 0, 0]) for x in images], [len(t) for t in targets]))
        brightness = torch.stack([x.double().mean() for x in images]).mean()
        self.mean = 0.9 * self.mean + 0.1 * brightness
        boxes = sum(len(t) for t in targets)
        return {n: (w - brightness - boxes) ** 2 for n, w in zip(NAMES, self.weight, strict=True)}

    def detect(self, images):
        assert not self.training
        scores = [image[0, 0, :3].float() / 100 for image in images]
        return [Detections(torch.rand(3, 4), torch.arange(3), s) for s in scores]


def part(*rows, labeled):
    """The weak views' first pixels are given, the strong views' are 100 more."""
    views = {"weak": [], "strong": []}
    for row in rows:
        image = torch.tensor(row, dtype=torch.uint8).expand(3, 2, 3)
        targets = Targets(torch.rand(2, 4), torch.tensor([0, 1])) if labeled else None
        views["weak"].append(View(image, torch.eye(3), targets))
        views["strong"].append(View(image + 100, torch.eye(3), targets))
    return Part(views, None, torch.arange(len(rows)))


def batch():
    return Batch(
        labeled=part((1, 1, 1), (2, 2, 2), labeled=True),
        unlabeled=part((90, 71, 70), (10, 20, 30), labeled=False),
    )


def train(method, steps, first=0):
    optimizer = torch.optim.SGD(method.student.parameters(), lr=1e-3)
    for t in range(first, first + steps):
        method.student.train()
        losses = method.losses(batch(), t)
        optimizer.zero_grad()
        sum(x for name, x in losses.items() if name.startswith("loss")).backward()
        optimizer.step()
        method.after_step(t)
        yield t


def small_faster_rcnn(norm="BN"):
    torch.manual_seed(0)
    options = detector_options(
        backbone={"freeze_at": 0},
        resnets={"depth": 18, "norm": norm},
        fpn={"out_channels": 8},
        rpn={"pre_nms_topk_train": 20, "post_nms_topk_train": 10},
        roi_heads={"batch_size_per_image": 8},
        roi_box_head={"fc_dim": 16},
    )
    return TorchvisionFasterRCNN(options, num_classes=3)


def small_fcos():
    torch.manual_seed(0)
    options = detector_options(
        FCOSOptions(),
        backbone={"freeze_at": 0},
        resnets={"depth": 18, "norm": "BN"},
        fpn={"out_channels": 64},
        fcos={"num_convs": 1, "sizes_of_interest": [12.0, 24.0, 48.0, 96.0]},
    )
    return TorchvisionFCOS(options, num_classes=3)


def small_retinanet():
    torch.manual_seed(0)
    options = detector_options(
        RetinaNetOptions(),
        backbone={"freeze_at": 0},
        resnets={"depth": 18, "norm": "BN"},
        fpn={"out_channels": 16},
        anchor_generator={"sizes": [[12.0], [24.0], [48.0], [96.0], [192.0]]},
        retinanet={"norm": ""},
    )
    return TorchvisionRetinaNet(options, num_classes=3)


BOX = Targets(torch.tensor([[4.0, 4.0, 40.0, 50.0]]), torch.tensor([1]))


def pictures(first, count, targets=BOX):
    def view(seed, *, labeled):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        return View(image, torch.eye(3), targets if labeled else None)

    def part(first, *, labeled):
        views = {
            name: [view(first + 2 * n + number, labeled=labeled) for n in range(count)]
            for number, name in enumerate(("weak", "strong"))
        }
        return Part(views, None, torch.arange(count))

    return Batch(labeled=part(first, labeled=True), unlabeled=part(first + 50, labeled=False))


def check_mean_of_gradients(gradients_of, folder, *, rtol=1e-4, atol=1e-6):
    """Two ranks exchange the mean of what each has alone: `gradients_of(rank, parallel=...)`."""
    exchanged = on_two_ranks(partial(gradients_of, parallel=True), folder)
    alone = [gradients_of(rank, parallel=False) for rank in range(2)]
    for name, gradient in exchanged[0].items():
        assert torch.equal(gradient, exchanged[1][name])
        expected = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol)
