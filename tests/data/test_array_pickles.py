import pickle

import numpy as np
import pytest

from ssod_imwa.data.array_pickles import read_array_pickle


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_arrays_and_plain_types_are_read(tmp_path):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = {"data": array, "labels": [1, 2], "x": ("a", None)}
    for protocol in range(5):
        (tmp_path / "file").write_bytes(pickle.dumps(content, protocol=protocol))
        read = read_array_pickle(tmp_path / "file")
        assert read["data"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert (read["labels"], read["x"]) == ([1, 2], ("a", None))


def test_nothing_that_a_pickle_says_is_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "file").write_bytes(pickle.dumps({"data": Evil(marker)}))
    with pytest.raises(ValueError, match=r"it asks for .*open, but only NumPy arrays"):
        read_array_pickle(tmp_path / "file")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2])[:-3]])
def test_what_is_no_pickle_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"\S"):
        read_array_pickle(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        read_array_pickle(tmp_path / "other")
