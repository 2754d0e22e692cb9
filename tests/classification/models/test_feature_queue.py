import io
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.models.feature_queue import FeatureQueue

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def queue(size=7, dim=3, seed=0, device="cpu"):
    return FeatureQueue(size, dim, generator=np.random.default_rng(seed), device=device)


def test_queue_begins_with_random_directions():
    big = queue(2000, 16)
    assert torch.allclose(big.features.norm(dim=1), torch.ones(2000), atol=1e-6)
    # The mean of n uniform directions has the standard deviation sqrt(1 / (16 n)) in each entry.
    assert big.features.mean(0).abs().max() < 5 / (16 * 2000) ** 0.5
    assert big.labels.eq(-1).all()
    assert big.filled == 0
    assert queue().features.equal(queue().features)
    assert not queue().features.equal(queue(seed=1).features)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(3, 3, 3), (7, 7), (1,) * 9, (5, 0, 6, 7, 2)])
def test_queue_holds_the_last_rows_in_a_ring(lengths, device):
    mine = queue(device=device)
    start = mine.features.clone()
    generator = torch.Generator().manual_seed(0)
    last, written = deque(maxlen=7), 0
    for length in lengths:
        features = torch.randn(length, 3, generator=generator, device="cpu").to(device)
        labels = torch.randint(5, (length,), generator=generator).to(device)
        mine.write_(features.requires_grad_(), labels)
        for row, label in zip(features.tolist(), labels.tolist(), strict=True):
            last.append((written % 7, row, label))
            written += 1
        for at, row, label in last:
            assert mine.features[at].tolist() == row
            assert int(mine.labels[at]) == label
        assert mine.filled == len(last)
        assert mine.features[mine.filled :].equal(start[mine.filled :])
        assert mine.labels[mine.filled :].eq(-1).all()
        assert mine.position == written % 7
    assert not mine.features.requires_grad


def test_half_precision_rows_are_widened_and_labels_may_be_missing():
    mine = queue()
    rows = F.normalize(torch.randn(2, 3), dim=1).bfloat16()
    mine.write_(rows, torch.tensor([1, 2]))
    mine.write_(rows)
    assert mine.features.dtype == torch.float32
    assert mine.features[2:4].equal(rows.float())
    assert mine.labels.tolist() == [1, 2, -1, -1, -1, -1, -1]


def test_state_survives_a_file_and_the_ring_goes_on():
    torch.manual_seed(0)
    batches = [(torch.randn(3, 3), torch.randint(5, (3,))) for _ in range(5)]
    whole, before, after = queue(), queue(), queue(seed=1)
    for batch in batches:
        whole.write_(*batch)
    for batch in batches[:3]:
        before.write_(*batch)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[3:]:
        after.write_(*batch)
    assert after.state_dict().keys() == {"features", "labels", "position", "filled"}
    for name, x in whole.state_dict().items():
        assert after.state_dict()[name].equal(x), name


def test_wrong_shapes_are_refused():
    mine = queue()
    with pytest.raises(ValueError, match=r"a batch of 8 is not allowed .*at most size = 7"):
        mine.write_(torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"features of shape \(2, 4\) .*must be \(B, 3\)"):
        mine.write_(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"labels of shape \(1,\)"):
        mine.write_(torch.zeros(2, 3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"a queue of \(7, 3\) does not fit one of \(6, 3\)"):
        queue(size=6).load_state_dict(mine.state_dict())
    with pytest.raises(ValueError, match="size = 0 is not allowed"):
        queue(size=0)
