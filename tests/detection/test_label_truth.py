import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from ssod_imwa.detection.data.records import Annotations, Detections
from ssod_imwa.detection.label_truth import judge_labels


def annotations(boxes, labels, *, crowd=None, difficult=None):
    none = np.zeros(len(labels), bool)
    return Annotations(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        none if crowd is None else np.array(crowd),
        none if difficult is None else np.array(difficult),
    )


def detections(boxes, labels):
    scores = torch.linspace(0.9, 0.1, len(labels))
    return Detections(torch.tensor(boxes).float().view(-1, 4), torch.tensor(labels).long(), scores)


def everything(item):
    return [torch.ones(len(item), dtype=torch.bool)]


def test_a_label_is_right_on_an_object_of_its_class_that_no_surer_one_has():
    found = detections(
        [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]], [0, 0, 1, 0]
    )
    truth = annotations([[0, 0, 10, 10], [30, 30, 40, 40]], [0, 1])
    judged = judge_labels([found], [truth], everything(found))
    assert judged.right.tolist() == [True, False, False, False]
    assert judged.judged.all()
    assert judged.objects.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["crowd", "difficult"])
def test_what_lies_on_an_object_that_does_not_count_is_not_judged(kind):
    found = detections([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0])
    truth = annotations([[0, 0, 10, 10]], [0], **{kind: [True]})
    judged = judge_labels([found], [truth], everything(found))
    assert judged.judged.tolist() == [False, True]
    assert not judged.right.any()
    assert len(judged.objects) == 0


def test_nothing_is_known_of_an_image_without_truth():
    found = detections([[0, 0, 10, 10]], [0])
    other = detections([[0, 0, 10, 10]], [0])
    truth = annotations([[0, 0, 10, 10]], [0])
    judged = judge_labels([found, other], [None, truth], everything(found) * 2)
    assert judged.judged.tolist() == [False, True]
    assert judged.right.tolist() == [False, True]


def test_a_label_below_the_threshold_meets_no_object():
    found = detections([[0, 0, 10, 10], [0, 0, 10, 10]], [0, 0])
    truth = annotations([[0, 0, 10, 10]], [0])
    judged = judge_labels([found], [truth], [torch.tensor([False, True])])
    assert judged.judged.tolist() == [False, True]
    assert judged.right.tolist() == [False, True]


@pytest.mark.parametrize("seed", range(5))
def test_numbers_equal_those_of_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)

    def boxes(count):
        corners = torch.rand(count, 2, generator=generator) * 10
        return torch.cat([corners, corners + 4 + torch.rand(count, 2, generator=generator) * 4], 1)

    n, m = 12, 6
    found = Detections(
        boxes(n),
        torch.randint(2, (n,), generator=generator),
        torch.rand(n, generator=generator).sort(descending=True).values,
    )
    truth = annotations(boxes(m).numpy(), torch.randint(2, (m,), generator=generator).numpy())
    taken, right = set(), []
    for i in range(n):
        best, where = 0.5, None
        for j in range(m):
            if j in taken or int(truth.labels[j]) != int(found.labels[i]):
                continue
            iou = float(box_iou(found.boxes[i : i + 1], torch.from_numpy(truth.boxes[j : j + 1])))
            if iou >= best:
                best, where = iou, j
        right.append(where is not None)
        if where is not None:
            taken.add(where)
    assert judge_labels([found], [truth], everything(found)).right.tolist() == right
    assert any(right)
