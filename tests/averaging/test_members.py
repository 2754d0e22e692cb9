import io

import pytest
import torch

from ssod_imwa.averaging.members import MemberStore
from ssod_imwa.averaging.weights import average


def live(value):
    return {"w": torch.full((3,), float(value)), "bn.num_batches_tracked": torch.tensor(value)}


@pytest.mark.parametrize("kind", ["dict", "stream"])
@pytest.mark.parametrize("device", ["same", "cpu"])
def test_store_keeps_copies(kind, device):
    store = MemberStore(kind, device=device)
    weights = live(1)
    store.remember_start(weights)
    weights["w"].fill_(5.0)
    store.add(0, weights)
    weights["w"].fill_(8.0)
    mean, weight = store.average((1, weights))
    assert mean["w"].tolist() == [6.5] * 3
    assert weight == [1, 1]
    store.reseed_(weights)
    assert weights["w"].tolist() == [1.0] * 3
    assert mean["w"].tolist() == [6.5] * 3


@pytest.mark.parametrize("kind", ["dict", "stream"])
def test_average_leaves_the_store_as_it_was(kind):
    store = MemberStore(kind)
    store.add(0, live(1))
    first, _ = store.average((1, live(2)))
    second, _ = store.average((1, live(2)))
    assert torch.equal(first["w"], second["w"])
    assert store.average(None)[0]["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize("kind", ["dict", "stream"])
@pytest.mark.parametrize("device", ["same", "cpu"])
@pytest.mark.parametrize("coefficients", [None, [0.25, 0.25, 0.5]])
def test_store_continues_from_its_state(kind, device, coefficients):
    def build():
        return MemberStore(kind, device=device, coefficients=coefficients)

    store = build()
    store.remember_start(live(7))
    store.add(0, live(1))
    store.add(1, live(2))
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    again = build()
    again.load_state_dict(torch.load(file, weights_only=True), live=live(0))
    assert again.members == [0, 1]
    assert again.start["w"].tolist() == [7.0] * 3
    expected = average([live(1), live(2), live(4)], coefficients=coefficients)
    for loaded in (store, again):
        mean, _ = loaded.average((2, live(4)))
        assert torch.equal(mean["w"], expected["w"])
        assert mean["bn.num_batches_tracked"] == 4


def test_reseeding_without_start_weights_is_an_error():
    with pytest.raises(RuntimeError, match="start weights are not there"):
        MemberStore().reseed_(live(1))


@pytest.mark.parametrize("kind", ["dict", "stream"])
def test_members_without_weight_alone_have_no_mean(kind):
    store = MemberStore(kind, coefficients=[0.0, 1.0])
    store.add(0, live(1))
    with pytest.raises(FloatingPointError, match="none is positive"):
        store.average(None)
