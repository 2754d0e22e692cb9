import math
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.data.batches import Part
from ssod_imwa.detection.coco_ap import coco_metrics
from ssod_imwa.detection.data.geometry import flip_matrix, map_boxes, scale_matrix
from ssod_imwa.detection.data.records import (
    Annotations,
    DetectionDataset,
    Detections,
    ImageRecord,
    View,
)
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.evaluation import evaluate_detections, predict, to_stored_image
from ssod_imwa.detection.voc_ap import voc_metrics
from ssod_imwa.errors import DataError

NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def record(image_id, boxes, labels, *, width=64, height=48):
    n = len(boxes)
    annotations = Annotations(
        np.asarray(boxes, dtype=np.float32).reshape(n, 4),
        np.asarray(labels, dtype=np.int64),
        np.zeros(n, dtype=bool),
        np.zeros(n, dtype=bool),
    )
    return ImageRecord(f"{image_id}.png", image_id, width, height, annotations)


def dataset():
    records = (
        record("b", [[0, 0, 20, 20], [30, 5, 50, 40]], [0, 1]),
        record("a", [], []),
        record(7, [[10, 10, 40, 30]], [1]),
    )
    return DetectionDataset("three", records, ("cat", "dog"))


def as_detections(item, scores=None):
    labels = torch.from_numpy(item.annotations.labels)
    scores = torch.full((len(labels),), 0.9) if scores is None else torch.tensor(scores)
    return Detections(torch.from_numpy(item.annotations.boxes), labels, scores)


class Reader(Detector):
    """Finds the boxes that the test wrote into the image, one a row: x1 y1 x2 y2 label."""

    def __init__(self):
        super().__init__(num_classes=2)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def parts(self, images):
        raise NotImplementedError

    def detect(self, images):
        assert not torch.is_grad_enabled()
        found = []
        for image in images:
            rows = image[0, :, :5].float()
            rows = rows[rows[:, 3] > 0]
            boxes, labels = rows[:, :4] + self.weight, rows[:, 4].long()
            found.append(Detections(boxes, labels, torch.full((len(rows),), 0.9)))
        return found


def as_view(item, matrix, *, height, width):
    boxes = map_boxes(
        torch.from_numpy(item.annotations.boxes), matrix, height=height, width=width
    ).round()
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for i, (box, label) in enumerate(zip(boxes, item.annotations.labels, strict=True)):
        image[0, i, :5] = torch.tensor([*box.tolist(), label])
    return View(image, matrix, None)


def doubled_and_flipped(*batches):
    """Parts of the data set with the records at these positions."""
    matrix, records = flip_matrix(128) @ scale_matrix(2, 2), dataset().records
    return [
        Part(
            {"image": [as_view(records[i], matrix, height=96, width=128) for i in positions]},
            None,
            torch.tensor(positions),
        )
        for positions in batches
    ]


def test_perfect_predictions_score_100_whatever_the_order_of_the_mapping():
    data = dataset()
    predictions = {item.image_id: as_detections(item) for item in reversed(data.records)}
    metrics = evaluate_detections(data, predictions, voc=True)
    for name in ("AP", "AP50", "AP-cat", "AP-dog", "VOC/AP50", "VOC/AP50-11pt", "VOC/AP"):
        assert metrics[name] == pytest.approx(100), name


def test_figures_are_those_of_the_two_protocols():
    data = dataset()
    truths = [item.annotations for item in data.records]
    found = [as_detections(item, [0.5] * len(item.annotations)) for item in data.records]
    found[2].boxes += 4
    predictions = {item.image_id: x for item, x in zip(data.records, found, strict=True)}
    coco = coco_metrics(truths, found, classes=data.classes)
    both = coco | voc_metrics(truths, found, num_classes=2)
    np.testing.assert_equal(evaluate_detections(data, predictions), coco)  # NaN equals NaN here
    np.testing.assert_equal(evaluate_detections(data, predictions, voc=True), both)
    assert 0 < both["VOC/AP50"] <= 100


def test_nothing_found_is_zero_and_said(caplog):
    data = dataset()
    metrics = evaluate_detections(data, {x.image_id: NOTHING for x in data.records}, voc=True)
    assert metrics["AP"] == metrics["AP50"] == metrics["VOC/AP50"] == metrics["VOC/AP"] == 0
    assert math.isnan(metrics["APl"])  # there is no large box
    (message,) = caplog.messages
    assert message.startswith("nothing was found in any of the 3 images of three: ")


def test_predictions_of_other_images_are_refused():
    data = dataset()
    predictions = {item.image_id: NOTHING for item in data.records}
    del predictions["a"]
    with pytest.raises(ValueError, match=r"1 of 3 missing, 0 unknown, such as 'a'"):
        evaluate_detections(data, predictions)
    with pytest.raises(ValueError, match=r"0 of 3 missing, 1 unknown, such as 'x'"):
        evaluate_detections(data, {**predictions, "a": NOTHING, "x": NOTHING})


def test_images_without_labels_are_a_users_error():
    with pytest.raises(DataError, match="image 'b' has no labels"):
        evaluate_detections(dataset().subset([0], labeled=False), {"b": NOTHING})


def test_boxes_come_back_in_pixels_of_the_stored_image():
    data = dataset()
    found = predict(Reader(), data, doubled_and_flipped([0, 1], [2]))
    assert list(found) == ["b", "a", 7]
    for item in data.records:
        np.testing.assert_allclose(found[item.image_id].boxes, item.annotations.boxes)
        np.testing.assert_array_equal(found[item.image_id].labels, item.annotations.labels)
    assert evaluate_detections(data, found)["AP"] == pytest.approx(100)


def test_boxes_are_clipped_to_the_stored_image():
    item = record(1, [], [])
    view = as_view(item, scale_matrix(2, 2), height=96, width=128)
    found = Detections(
        torch.tensor([[-10.0, 4.0, 140.0, 200.0]]), torch.tensor([1]), torch.ones(1).half()
    )
    back = to_stored_image(found, view, item)
    assert back.boxes.tolist() == [[0, 2, 64, 48]]
    assert back.scores.dtype == torch.float32


def test_an_evaluation_can_be_left_between_batches():
    calls = []

    def poll(done, total):
        calls.append((done, total))
        if len(calls) == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        predict(Reader(), dataset(), doubled_and_flipped([0], [1], [2]), poll=poll)
    assert calls == [(1, 3), (2, 3)]


def _rank(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = doubled_and_flipped([0], [1], [2])[rank::2]
    polls = []

    def poll(done, total):
        count = torch.ones(())
        dist.all_reduce(count)  # hangs unless both ranks come here equally often
        polls.append(float(count))

    found = predict(Reader(), dataset(), batches, Ranks.of_run().run, poll=poll)
    queue.put((rank, polls, {key: value.boxes.tolist() for key, value in found.items()}))
    dist.destroy_process_group()


def test_two_ranks_with_different_numbers_of_batches_both_get_all_predictions(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(i, tmp_path, queue)) for i in range(2)]
    for process in ranks:
        process.start()
    outcomes = sorted(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    expected = {item.image_id: item.annotations.boxes.tolist() for item in dataset().records}
    assert [polls for _, polls, _ in outcomes] == [[2.0, 2.0], [2.0, 2.0]]
    assert [found for _, _, found in outcomes] == [expected, expected]
