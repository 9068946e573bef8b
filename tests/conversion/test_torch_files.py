import io
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

from cvt_keras.conversion import torch_files
from cvt_keras.conversion.torch_files import StandIn, Tensor
from cvt_keras.errors import CheckpointError

pytestmark = pytest.mark.files

BOTH = pytest.mark.parametrize("archive", [True, False])


def _saved(contents, path, archive):
    torch.save(contents, path, _use_new_zipfile_serialization=archive)
    return torch_files.load(path)


@BOTH
def test_tensors_are_read_as_pytorch_reads_them(archive, tmp_path, monkeypatch):
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    tensors = {str(dtype): tensor.to(dtype) for dtype in (torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)}
    tensors |= {
        "transposed": tensor.permute(2, 0, 1),
        "part": tensor[1, :, 1:3],  # of the same storage
        "spread": torch.ones(1).expand(2, 3),
        "none": torch.zeros(0, 3),
        "number": torch.tensor(3),
        "parameter": torch.nn.Parameter(tensor),
    }
    contents = {**tensors, "half": tensor.bfloat16(), "plain": [1, "two", {"three": 3.0}]}
    torch.save(contents, tmp_path / "x.pth", _use_new_zipfile_serialization=archive)
    monkeypatch.setitem(sys.modules, "torch", None)
    loaded = torch_files.load(tmp_path / "x.pth")
    monkeypatch.undo()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(loaded[name].array(), expected.detach().numpy())
        assert str(loaded[name].dtype) == str(expected.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(loaded["half"].array(), tensor.bfloat16().float().numpy())
    assert loaded["plain"] == contents["plain"]


def test_a_compressed_archive_is_read(tmp_path):
    torch.save({"x": torch.arange(3.0)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as stored,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    np.testing.assert_array_equal(torch_files.load(tmp_path / "y.pth")["x"].array(), [0, 1, 2])


@BOTH
def test_tensors_without_a_numpy_dtype_keep_their_shape_and_name(archive, tmp_path):
    loaded = _saved({"complex": torch.ones(2, 3, dtype=torch.complex64), "x": torch.ones(2)}, tmp_path / "x.pth", True)
    assert (loaded["complex"].shape, loaded["complex"].dtype) == ((2, 3), "ComplexFloatStorage")
    assert loaded["complex"].array() is loaded["complex"]
    odd = {"sparse": torch.eye(2).to_sparse(), "conjugate": torch.ones(2, dtype=torch.complex64).conj()}
    if archive:
        odd["float8"] = torch.ones(2).to(torch.float8_e4m3fn)
        assert not any(
            hasattr(value, "array") and isinstance(value.dtype, np.dtype)
            for value in _saved(odd, tmp_path / "y.pth", True).values()
        )


RAN = []


def note(text):
    RAN.append(text)


class _Run:
    """Calls a function when it is unpickled without care."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@BOTH
@pytest.mark.parametrize(
    "call",
    [
        (note, "ran"),
        (print, "ran"),
        (torch.hub.load_state_dict_from_url, "http://127.0.0.1:1/x.pth"),
        (pickle.loads, b"x"),
        (torch.load, "x.pth"),
    ],
)
def test_no_function_that_a_file_names_is_called(call, archive, tmp_path, capsys):
    contents = _saved({"x": _Run(*call), "tensor": torch.ones(2)}, tmp_path / "x.pth", archive)
    assert isinstance(contents["x"], StandIn)
    assert isinstance(contents["tensor"], Tensor)
    assert not RAN and not capsys.readouterr().out


@BOTH
@pytest.mark.parametrize(
    "call", [(eval, "1"), (exec, "1"), (__import__("os").system, "true"), (__import__("subprocess").run, "true")]
)
def test_a_file_with_an_attack_is_refused(call, archive, tmp_path):
    with pytest.raises(CheckpointError, match="which would let it run code: refused"):
        _saved({"x": _Run(*call)}, tmp_path / "x.pth", archive)


def _archive_of(pickled, path, data=b""):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", data)
    return path


def _pickle_of_tensor(size, offset, shape, strides, state=None):
    """Returns the pickle of a float32 tensor as torch.save writes it, with any sizes."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, {}), state

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", size) if isinstance(value, Storage) else None

    pickled = io.BytesIO()
    Pickler(pickled, 2).dump({"x": Tensor()})
    return pickled.getvalue()


def test_no_byte_outside_a_storage_is_read(tmp_path):
    data = struct.pack("4f", 1, 2, 3, 4)
    sound = _archive_of(_pickle_of_tensor(4, 1, (3,), (1,)), tmp_path / "sound.pth", data)
    np.testing.assert_array_equal(torch_files.load(sound)["x"].array(), [2, 3, 4])
    for numbers in [(4, 2, (3,), (1,)), (4, 0, (2,), (4,)), (4, 0, (2, 3), (3, 1)), (4, -1, (2,), (1,)), (4, 0, (2,), (-1,))]:
        file = _archive_of(_pickle_of_tensor(*numbers), tmp_path / "wrong.pth", data)
        with pytest.raises(CheckpointError, match="damaged"):
            torch_files.load(file)["x"].array()
    with pytest.raises(CheckpointError, match="not described as PyTorch does"):  # a pickle that changes the tensor later
        torch_files.load(_archive_of(_pickle_of_tensor(4, 0, (4,), (1,), {"shape": (9,)}), tmp_path / "changed.pth", data))
    with pytest.raises(CheckpointError, match="16 bytes, not 20"):
        torch_files.load(_archive_of(_pickle_of_tensor(5, 0, (5,), (1,)), tmp_path / "short.pth", data))


@BOTH
def test_a_truncated_file_is_refused(archive, tmp_path):
    torch.save({"x": torch.ones(300), "y": torch.ones(3)}, tmp_path / "x.pth", _use_new_zipfile_serialization=archive)
    data = (tmp_path / "x.pth").read_bytes()
    for size in range(0, len(data), 61):
        (tmp_path / "cut.pth").write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            torch_files.load(tmp_path / "cut.pth")


def test_a_big_endian_file_is_refused(tmp_path):
    torch.save({"x": torch.ones(3)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as little, zipfile.ZipFile(tmp_path / "y.pth", "w") as big:
        for name in little.namelist():
            big.writestr(name, b"big" if name.endswith("byteorder") else little.read(name))
    with pytest.raises(CheckpointError, match="big-endian"):
        torch_files.load(tmp_path / "y.pth")
