import math

import pytest
import torch

from ssod_imwa.detection.box_jitter import box_deviation, jitter_boxes


def random_boxes(n, seed=0, size=200.0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, 2, generator=generator) * size
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


@pytest.mark.parametrize("scale", [0.06, 0.5])
def test_noise_is_gaussian_with_the_published_width(scale):
    boxes = torch.tensor([[10.0, 20.0, 60.0, 30.0], [5.0, 5.0, 5.2, 105.0]])
    torch.manual_seed(0)
    copies = jitter_boxes(boxes, copies=20000, scale=scale)
    assert copies.shape == (20000, 2, 4)
    # Edges below a pixel count as one.
    expected = scale * torch.tensor([[50.0, 10, 50, 10], [1, 100, 1, 100]])
    torch.testing.assert_close(copies.std(0), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(copies.mean(0), boxes, rtol=0, atol=0.05 * scale * 100)
    moved = (copies - boxes) / expected
    correlation = torch.corrcoef(moved[:, 0].T) - torch.eye(4)
    assert correlation.abs().max() < 0.03
    inside = (moved.abs() < 1).float().mean()
    assert inside.item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


def test_noise_follows_the_global_generator():
    boxes = random_boxes(3)
    torch.manual_seed(5)
    first = jitter_boxes(boxes, copies=2, scale=0.06)
    torch.manual_seed(5)
    assert torch.equal(first, jitter_boxes(boxes, copies=2, scale=0.06))


def deviation_by_loops(copies):
    """In Python's floats: sample standard deviations over the mean box's edges."""
    result = []
    for n in range(len(copies[0])):
        means = [sum(copy[n][k] for copy in copies) / len(copies) for k in range(4)]
        edges = [max(means[2] - means[0], 1.0), max(means[3] - means[1], 1.0)]
        total = 0.0
        for k in range(4):
            squares = sum((copy[n][k] - means[k]) ** 2 for copy in copies)
            total += math.sqrt(squares / (len(copies) - 1)) / edges[k % 2]
        result.append(total / 4)
    return result


@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("boxes", [0, 1, 7])
def test_deviation_is_the_plain_loops(count, boxes):
    torch.manual_seed(0)
    copies = jitter_boxes(random_boxes(boxes), copies=count, scale=0.1)
    if boxes:
        copies[:, 0, 2:] = copies[:, 0, :2] + 0.3  # thinner than a pixel
    expected = deviation_by_loops(copies.double().tolist())
    assert box_deviation(copies).tolist() == pytest.approx(expected, rel=1e-4)


def test_equal_boxes_have_no_deviation_and_larger_images_the_same():
    torch.manual_seed(0)
    boxes = random_boxes(5) + torch.tensor([0.0, 0.0, 20.0, 20.0])
    assert box_deviation(boxes.expand(10, 5, 4)).tolist() == pytest.approx([0] * 5, abs=1e-6)
    copies = jitter_boxes(boxes, copies=10, scale=0.06)
    torch.testing.assert_close(box_deviation(3 * copies), box_deviation(copies))
