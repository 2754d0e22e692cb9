"""A detector of few formulas, and what Soft Teacher makes of it in plain loops."""

import math

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_iou, clip_boxes_to_image

from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.geometric_views import GeometricOptions, GeometricView
from ssod_imwa.detection.data.records import Detections, Targets, View
from ssod_imwa.detection.data.views import WeakView
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.parts import Parts, RegionOutputs, Regions, SampledBoxes
from ssod_imwa.detection.methods.soft_teacher import (
    SoftTeacher,
    SoftTeacherOptions,
)
from ssod_imwa.engine.seeding import counted_generator

CLASSES = 3

# ------------------------------------------------------------------ a detector of few formulas


class ToyParts(Parts, Regions):
    """Everything is a simple function of boxes; an image's first pixel is its number."""

    def __init__(self, detector, images):
        super().__init__(detector.name, images)
        self.toy = detector
        self.numbers = [int(image[0, 0, 0]) for image in images]

    @property
    def regions(self):
        return self

    def losses(self, targets):
        return {"loss_cls": self.toy.scores.square().sum() * (1 + sum(map(len, targets)))}

    def detections(self):
        return [self.toy.found[number] for number in self.numbers]

    def propose(self, targets):
        total = sum(target.boxes.double().sum() for target in targets) / 100
        losses = {"loss_rpn_cls": total * self.toy.scores.mean(), "loss_rpn_loc": total}
        return [self.toy.proposed[number] for number in self.numbers], losses

    def sample(self, proposals, targets):
        return [self._sample(*pair) for pair in zip(proposals, targets, strict=True)]

    def _sample(self, proposals, target):
        boxes = torch.cat([proposals, target.boxes])
        labels = torch.full((len(boxes),), CLASSES)
        matched = torch.zeros_like(boxes)
        if len(target):
            overlap, best = box_iou(boxes, target.boxes).max(dim=1)
            labels = torch.where(overlap >= 0.5, target.labels[best], CLASSES)
            matched = target.boxes[best]
        return SampledBoxes(boxes, labels, matched)

    def predict(self, boxes):
        joined = torch.cat(list(boxes)).double() / 100
        deltas = (joined @ self.toy.changes).tanh().view(-1, CLASSES, 4)
        return RegionOutputs(list(boxes), joined @ self.toy.scores, deltas)

    def refine(self, outputs):
        changed = torch.cat(outputs.boxes)[:, None].double() + 5 * outputs.deltas
        of_images = changed.split([len(item) for item in outputs.boxes])
        sizes = [image.shape[-2:] for image in self.images]
        return [clip_boxes_to_image(x, size) for x, size in zip(of_images, sizes, strict=True)]

    def box_loss(self, outputs, sampled):
        labels = torch.cat([item.labels for item in sampled])
        chosen = torch.where(labels < CLASSES)[0]
        wanted = torch.cat([item.matched - item.boxes for item in sampled])[chosen].double() / 5
        distance = (outputs.deltas[chosen, labels[chosen]] - wanted).abs().sum()
        return distance / max(len(labels), 1)


class Toy(Detector):
    abilities = frozenset({"regions"})

    def __init__(self, seed=0):
        super().__init__(CLASSES)
        generator = torch.Generator().manual_seed(seed)
        self.scores = nn.Parameter(torch.randn(4, CLASSES + 1, generator=generator).double())
        self.changes = nn.Parameter(torch.randn(4, 4 * CLASSES, generator=generator).double())
        self.found, self.proposed = {}, {}

    def parts(self, images):
        return ToyParts(self, images)


STRONG = GeometricView(WeakView([60, 90], 300), GeometricOptions(erasing=[]))


def make_views(number, generator):
    """A weak and a strong view of an image with a number; geometries of the real transforms."""
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    views = []
    for transform in (WeakView([60, 90], 300), STRONG):
        moved, matrix = transform(image, generator)
        moved = moved.clone()
        moved[0, 0, 0] = number
        views.append(View(moved, matrix, None))
    return views


def boxes_in(view, count, generator, smallest=5):
    height, width = view.image.shape[-2:]
    corners = generator.uniform(0, (width - smallest, height - smallest), (count, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + smallest], axis=1)
    return torch.from_numpy(boxes).float()


def toy_batch(method, seed, images, found):
    """Random views, detections of the teacher and proposals of the student."""
    generator = counted_generator(seed)
    weak, strong, colored = [], [], []
    for number in range(images):
        views = make_views(number, generator)
        weak.append(views[0])
        strong.append(views[1])
        count = int(generator.integers(found + 1)) if found else 0
        # Scores on both sides of each threshold.
        scores = torch.from_numpy(generator.choice([0.3, 0.6, 0.93, 0.99], count)).float()
        labels = torch.from_numpy(generator.integers(0, CLASSES, count))
        boxes = boxes_in(weak[-1], count, generator)
        method.teacher.model.found[number] = Detections(boxes, labels, scores)
        method.student.proposed[number] = boxes_in(strong[-1], 6, generator)
        targets = Targets(torch.rand(1, 4), torch.tensor([0]))
        colored.append(View(views[0].image, views[0].matrix, targets))
    indices = torch.arange(images)
    return Batch(
        labeled=Part({"colored": colored}, None, indices),
        unlabeled=Part({"weak": weak, "strong": strong}, None, indices),
    )


def soft_teacher(**changes):
    # The toy's refined boxes move a good deal.
    options = SoftTeacherOptions(**{"box_deviation": 0.06, "unsup_loss_weight": 2.0, **changes})
    method = SoftTeacher(Toy(), options)
    with torch.no_grad():  # a teacher that is not the student
        method.teacher.model.scores.add_(Toy(seed=7).scores)
        method.teacher.model.changes.mul_(0.3)
    return method


# ---------------------------------------------------------------------- the same in plain loops


def move_box(box, matrix, height, width):
    """The hull of the four moved corners, clipped."""
    points = []
    for x in (box[0], box[2]):
        for y in (box[1], box[3]):
            points.append(
                [sum(matrix[i][j] * c for j, c in enumerate((x, y, 1.0))) for i in (0, 1)]
            )
    xs = [min(max(p[0], 0.0), width) for p in points]
    ys = [min(max(p[1], 0.0), height) for p in points]
    return [min(xs), min(ys), max(xs), max(ys)]


def intersection_over_union(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return both / (sum(areas) - both) if both else 0.0


class Reference:
    """Soft Teacher's unlabeled losses of one batch, a box at a time in Python's floats."""

    def __init__(self, method, batch, noise):
        self.method, self.options = method, method.options
        self.weak, self.strong = (batch["unlabeled"].views[name] for name in ("weak", "strong"))
        self.noise = noise  # of each image: [copy][box][coordinate]

    def between(self, source, target):
        return (target.matrix @ torch.linalg.inv(source.matrix)).tolist()

    def scores_of(self, model, box):
        weights = model.scores.tolist()
        return [sum(box[k] / 100 * weights[k][c] for k in range(4)) for c in range(CLASSES + 1)]

    def softmax(self, logits):
        top = max(logits)
        exponentials = [math.exp(x - top) for x in logits]
        return [x / sum(exponentials) for x in exponentials]

    def change_of(self, model, box, label):
        weights = model.changes.tolist()
        return [
            math.tanh(sum(box[k] / 100 * weights[k][4 * label + j] for k in range(4)))
            for j in range(4)
        ]

    def deviation(self, i, number, box, label):
        teacher, copies = self.method.teacher.model, []
        height, width = self.weak[i].image.shape[-2:]
        for copy_noise in self.noise[i]:
            edges = [max(box[2] - box[0], 1.0), max(box[3] - box[1], 1.0)] * 2
            moved = [
                box[k] + self.options.jitter_scale * edges[k] * copy_noise[number][k]
                for k in range(4)
            ]
            change = self.change_of(teacher, moved, label)
            refined = [moved[k] + 5 * change[k] for k in range(4)]
            bounds = (width, height, width, height)
            copies.append([min(max(x, 0.0), b) for x, b in zip(refined, bounds, strict=True)])
        means = [sum(c[k] for c in copies) / len(copies) for k in range(4)]
        edges = [max(means[2] - means[0], 1.0), max(means[3] - means[1], 1.0)] * 2
        total = 0.0
        for k in range(4):
            variance = sum((c[k] - means[k]) ** 2 for c in copies) / (len(copies) - 1)
            total += math.sqrt(variance) / edges[k] / 4
        return total

    def labels(self):
        """Boxes and classes of each image for proposals, classification and box regression."""
        options = self.options
        kinds = {"proposed": [], "classified": [], "refined": []}
        deviations = []
        for i, (weak, strong) in enumerate(zip(self.weak, self.strong, strict=True)):
            found = self.method.teacher.model.found[i]
            matrix = self.between(weak, strong)
            height, width = strong.image.shape[-2:]
            of_image = {name: [] for name in kinds}
            number = 0
            for box, label, score in zip(
                found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
            ):
                edges = (box[2] - box[0], box[3] - box[1])
                if not score > options.initial_threshold or min(edges) <= options.min_box_size:
                    continue
                deviation = self.deviation(i, number, box, label)
                deviations.append(deviation)
                number += 1
                moved = move_box(box, matrix, height, width)
                if min(moved[2] - moved[0], moved[3] - moved[1]) <= max(1e-5, options.min_box_size):
                    continue
                if score > options.rpn_threshold:
                    of_image["proposed"].append((moved, label))
                if score > options.bbox_threshold:
                    of_image["classified"].append((moved, label))
                if deviation < options.box_deviation:
                    of_image["refined"].append((moved, label))
            for name, items in of_image.items():
                kinds[name].append(items)
        return kinds, deviations

    def assigned(self, i, labels):
        """Boxes, classes and matched boxes of an image's proposals and labels."""
        proposals = self.method.student.proposed[i].tolist()
        for box in [*proposals, *(box for box, _ in labels)]:
            overlaps = [intersection_over_union(box, other) for other, _ in labels]
            best = max(range(len(labels)), key=overlaps.__getitem__) if labels else None
            if best is not None and overlaps[best] >= 0.5:
                yield box, labels[best][1], labels[best][0]
            else:
                yield box, CLASSES, None

    def losses(self):
        kinds, deviations = self.labels()
        student, teacher = self.method.student, self.method.teacher.model
        total = sum(sum(box) for items in kinds["proposed"] for box, _ in items) / 100
        terms = weights = distance = 0.0
        reliabilities, sampled = [], 0
        for i, (weak, strong) in enumerate(zip(self.weak, self.strong, strict=True)):
            matrix = self.between(strong, weak)
            height, width = weak.image.shape[-2:]
            for box, label, _ in self.assigned(i, kinds["classified"][i]):
                weight = 1.0
                if label == CLASSES:
                    moved = move_box(box, matrix, height, width)
                    weight = self.softmax(self.scores_of(teacher, moved))[CLASSES]
                    reliabilities.append(weight)
                terms -= weight * math.log(self.softmax(self.scores_of(student, box))[label])
                weights += weight
            for box, label, matched in self.assigned(i, kinds["refined"][i]):
                sampled += 1
                if label < CLASSES:
                    change = self.change_of(student, box, label)
                    distance += sum(abs(change[k] - (matched[k] - box[k]) / 5) for k in range(4))
        factor = self.options.unsup_loss_weight
        images = len(self.weak)
        return {
            "loss_rpn_cls_pseudo": factor * total * student.scores.mean().item(),
            "loss_rpn_loc_pseudo": factor * total,
            "loss_cls_pseudo": factor * terms / max(weights, 1.0),
            "loss_box_reg_pseudo": factor * distance / max(sampled, 1),
            "pseudo_boxes": sum(map(len, kinds["classified"])) / images,
            "pseudo_boxes_refined": sum(map(len, kinds["refined"])) / images,
            "pseudo_deviation": sum(deviations) / max(len(deviations), 1),
            "background_weight": sum(reliabilities) / max(len(reliabilities), 1),
        }


def noise_of(method, seed):
    """The numbers that `losses` draws: of each image's boxes above the initial threshold."""
    torch.manual_seed(seed)
    found = method.teacher.model.found
    counts = [
        int((found[number].scores > method.options.initial_threshold).sum())
        for number in range(len(found))
    ]
    return [torch.randn(method.options.jitters, count, 4).tolist() for count in counts]
