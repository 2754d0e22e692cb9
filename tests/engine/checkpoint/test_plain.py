from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.engine.checkpoint.plain import plain


def through_a_file(value, folder):
    torch.save(value, folder / "value.pth")
    return torch.load(folder / "value.pth", weights_only=True)


def test_converted_state_loads_with_weights_only(tmp_path):
    state = {
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a")],
        "array": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2],
        "counts": defaultdict(list, a=[1]),
        "counter": Counter("aab"),
        "path": Path("a") / "b",
        "parameter": nn.Parameter(torch.ones(2)),
        "rest": (None, True, 1, 1.5, 2j, b"x", {1, 2}, torch.float16, torch.Size([3])),
        np.int64(7): "key",
    }
    with pytest.raises(Exception, match="weights_only"):
        through_a_file(state, tmp_path)
    loaded = through_a_file(plain(state), tmp_path)
    assert loaded["numpy"] == [0.5, 3, True, "a"]
    assert [type(x) for x in loaded["numpy"]] == [float, int, bool, str]
    assert loaded["array"].tolist() == [[0, 2], [3, 5]]
    assert type(loaded["counts"]) is dict
    assert loaded["counts"] == {"a": [1]}
    assert loaded["counter"] == Counter(a=2, b=1)
    assert loaded["path"] == str(Path("a/b"))
    assert type(loaded["parameter"]) is torch.Tensor
    assert loaded["rest"] == state["rest"]
    assert loaded[7] == "key"


def test_optimizer_and_module_states_keep_their_form(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state = through_a_file(plain([model.state_dict(), optimizer.state_dict()]), tmp_path)
    assert type(state[0]) is OrderedDict
    assert state[0]._metadata == model.state_dict()._metadata
    assert state[0]._metadata["1"] == {"version": 2}
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])


def test_tensors_are_shared_but_views_do_not_bring_their_whole_storage():
    whole = torch.arange(1000.0)
    assert plain(whole).data_ptr() == whole.data_ptr()
    part = plain({"part": whole[10:12]})["part"]
    assert part.tolist() == [10.0, 11.0]
    assert part.untyped_storage().nbytes() == 8


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [0, {"b": object()}]}, r"state\['a'\]\[1\]\['b'\] is a builtins.object"),
        ({"f": print}, r"state\['f'\] is a builtins.builtin_function_or_method"),
        ({"p": namedtuple("P", "x")(1)}, r"state\['p'\] is a .*P, which"),
        ({(1, object()): 2}, r"state: key \(1, .*\)\[1\] is a builtins.object"),
        ({"s": torch.eye(2).to_sparse()}, r"state\['s'\] is a Tensor with layout torch.sparse_coo"),
        ({"o": np.array([None])}, r"state\['o'\] is an array of object"),
    ],
)
def test_error_says_where_the_value_is(state, message):
    with pytest.raises(TypeError, match=message):
        plain(state)
