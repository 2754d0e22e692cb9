import pytest
import torch
from torch import nn

from ssod_imwa.engine import comm


def models(seed=0):
    torch.manual_seed(seed)
    return {
        "student": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        "teacher": nn.Linear(3, 4),
    }


def test_one_process_needs_no_process_group():
    assert (comm.rank(), comm.world_size(), comm.is_main()) == (0, 1, True)
    assert comm.all_true(torch.tensor(True)) is True
    assert comm.all_true(False) is False
    assert (comm.any_true(True), comm.any_true(torch.tensor(False))) == (True, False)
    assert comm.all_gather({"a": 1}) == [{"a": 1}]
    comm.barrier()
    comm.average_buffers_(models())
    comm.assert_equal_on_all_ranks(3, "three")


def test_equal_models_have_equal_checksums():
    assert comm.checksum(models()) == comm.checksum(models())
    assert 0 <= comm.checksum(models()) < 2**64
    assert comm.checksum({}) == comm.checksum({})


@pytest.mark.parametrize("name", ["student.0.weight", "student.1.running_var", "teacher.bias"])
def test_one_flipped_bit_changes_the_checksum(name):
    changed = models()
    before = comm.checksum(changed)
    model, _, key = name.partition(".")
    changed[model].state_dict()[key].view(torch.int32).view(-1)[-1] ^= 1
    assert comm.checksum(changed) != before


def test_swapped_elements_layers_and_names_change_the_checksum():
    one = nn.Linear(3, 4)
    two = nn.Linear(3, 4)
    before = comm.checksum({"a": one, "b": two})
    assert comm.checksum({"a": two, "b": one}) != before
    assert comm.checksum({"b": one, "a": two}) != before
    single = comm.checksum({"a": one})
    with torch.no_grad():
        one.weight.copy_(one.weight.flip(0))
    assert comm.checksum({"a": one}) != single


def test_signs_of_zero_and_kinds_of_nan_are_different_bits():
    def of(value):
        model = nn.Module()
        model.register_buffer("x", torch.tensor([value]))
        return comm.checksum({"m": model})

    assert of(0.0) != of(-0.0)
    assert of(float("nan")) == of(float("nan"))
