"""Parts of tensors and parts of lists of things are moved, cut and packed alike."""

import pickle
from dataclasses import dataclass

import pytest
import torch

from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.data.transfer import pack, unpack


@dataclass
class Picture:
    """Of a size of its own, so that several make a list."""

    pixels: torch.Tensor

    def to(self, device):
        return Picture(self.pixels.to(device))


def pictures(first, count):
    return [Picture(torch.full((3, 2 + i, 4), first + i)) for i in range(count)]


def batch():
    images = torch.arange(12).view(6, 2)
    labeled = Part({"image": images, "key": 10 * images}, torch.arange(6), 100 + torch.arange(6))
    views = {"weak": pictures(0, 4), "strong": pictures(50, 4)}
    return Batch(labeled=labeled, unlabeled=Part(views, None, torch.arange(4)))


def flat(batch):
    """Everything in a batch as nested lists, which `==` compares."""

    def listed(view):
        return (
            view.tolist() if isinstance(view, torch.Tensor) else [x.pixels.tolist() for x in view]
        )

    return {
        name: (
            {view: listed(values) for view, values in part.views.items()},
            None if part.targets is None else part.targets.tolist(),
            part.indices.tolist(),
        )
        for name, part in batch.items()
    }


def test_length_is_the_number_of_images():
    assert {name: len(part) for name, part in batch().items()} == {"labeled": 6, "unlabeled": 4}


def test_micro_batches_take_every_nth_image_of_all_views():
    one, two = batch().split(2)
    assert one["labeled"].views["image"].tolist() == [[0, 1], [4, 5], [8, 9]]
    assert two["labeled"].views["key"].tolist() == [[20, 30], [60, 70], [100, 110]]
    assert two["labeled"].targets.tolist() == [1, 3, 5]
    assert one["labeled"].indices.tolist() == [100, 102, 104]
    assert [x.pixels[0, 0, 0].item() for x in two["unlabeled"].views["strong"]] == [51, 53]
    assert [x.pixels.shape[1] for x in two["unlabeled"].views["weak"]] == [3, 5]
    assert two["unlabeled"].targets is None
    assert two["unlabeled"].indices.tolist() == [1, 3]


def test_one_micro_batch_is_the_batch():
    (whole,) = batch().split(1)
    assert flat(whole) == flat(batch())


def test_unequal_micro_batches_are_refused():
    with pytest.raises(ValueError, match="4 images cannot be split into 3 equal parts"):
        batch().split(3)


def test_all_of_a_batch_moves_to_a_device():
    moved = batch().to("meta")
    tensors = [x.pixels for view in moved["unlabeled"].views.values() for x in view]
    tensors += [*moved["labeled"].views.values(), moved["labeled"].targets]
    tensors += [part.indices for part in moved.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved["unlabeled"].targets is None


def test_a_batch_crosses_to_another_process_as_one_buffer():
    packed = pack(batch())
    after = unpack(pickle.loads(pickle.dumps(packed)))
    assert type(after) is Batch
    assert flat(after) == flat(batch())
    storage = {x.pixels.untyped_storage().data_ptr() for x in after["unlabeled"].views["weak"]}
    assert storage == {after["labeled"].indices.untyped_storage().data_ptr()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_batch_is_the_same_batch():
    pinned = unpack(pack(batch()).pin_memory())
    assert pinned["labeled"].views["image"].is_pinned()
    assert flat(pinned.to("cuda").to("cpu")) == flat(batch())
