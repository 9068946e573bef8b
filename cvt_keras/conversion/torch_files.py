"""Reads files of `torch.save` without PyTorch and without running code from them.

Such a file is a pickle and the bytes of its tensors. A pickle may name any class or function of Python to call. Here each
name becomes a stand-in that does nothing, so that objects of an optimizer or a script beside the weights do no harm. Only
dicts and tensors are real.
"""

import math
import pickle
import tarfile
import zipfile
from dataclasses import dataclass

import numpy as np

from cvt_keras.errors import CheckpointError, CheckpointFileError, first_line

SAVE_TENSORS = "Save the tensors alone: torch.save(model.state_dict(), file)"

# NumPy has no bfloat16, whose bits are the upper half of a float32's. No other dtype here is read as uint16.
_BFLOAT16 = np.dtype("uint16")
_DTYPES = {
    "FloatStorage": np.dtype("float32"),
    "DoubleStorage": np.dtype("float64"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
    "ShortStorage": np.dtype("int16"),
    "CharStorage": np.dtype("int8"),
    "ByteStorage": np.dtype("uint8"),
    "BoolStorage": np.dtype("bool"),
}
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of a file in the format before the archive
# Only attacks name these. They would not run here, but other programs would run them, so the file is refused.
_ATTACKS = {"os", "posix", "nt", "subprocess", "sys", "runpy", "importlib", "shutil", "socket", "webbrowser", "pty", "commands"}
_ATTACKS_OF_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "getattr", "setattr", "globals"}


class _Fixed:
    """Base of objects that a pickle must not change after their sizes are checked."""

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a tensor is not described as PyTorch does")


@dataclass
class Storage(_Fixed):
    """The memory of tensors: `data` holds its bytes once they are read."""

    dtype: np.dtype | str
    size: int
    data: np.ndarray | None = None


class StandIn:
    """Replaces every other name in a pickle: accepts any use and does nothing. `wanted` is the name."""

    wanted = ""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__):
        return StandIn()

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    extend = add = append


@dataclass(frozen=True)
class Tensor(_Fixed):
    """A tensor as the pickle describes it. Only `array` reads its bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @property
    def dtype(self):
        return self.storage.dtype

    def array(self):
        """Returns the values without a copy, but bfloat16 as float32. Returns the tensor itself if NumPy lacks the dtype.

        Raises:
            CheckpointError: if the tensor exceeds its storage.
        """
        if not isinstance(self.dtype, np.dtype):
            return self
        sizes = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise CheckpointFileError(f"is damaged: a tensor has shape {self.shape} and strides {self.strides}")
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides))
        if math.prod(self.shape) and last >= self.storage.size:
            raise CheckpointFileError(f"is damaged: a tensor of shape {self.shape} is larger than its storage")
        if self.storage.data is None:
            raise CheckpointFileError("is damaged: the bytes of a storage are missing")
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        values = self.storage.data.view(self.dtype)[self.offset :]
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        values = np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)
        if self.dtype == _BFLOAT16:
            return (values.astype("uint32") << 16).view("float32")
        return values


class _Unpickler(pickle.Unpickler):
    """Unpickles dicts, tensors and stand-ins; calls nothing that a pickle names."""

    def __init__(self, file, storages):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._storages = storages
        self._names = {
            ("collections", "OrderedDict"): type("OrderedDict", (dict,), {}),  # it may hold attributes
            ("torch._utils", "_rebuild_tensor"): _rebuild,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): _unwrap,
            ("torch._utils", "_rebuild_parameter_with_state"): _unwrap,
            ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        }

    def find_class(self, module, name):
        top = module.partition(".")[0]
        if top in _ATTACKS or (top in ("builtins", "__builtin__") and name in _ATTACKS_OF_BUILTINS):
            raise CheckpointFileError(f"names {module}.{name}, which would let it run code: refused. {SAVE_TENSORS}")
        if (module, name) not in self._names:
            self._names[module, name] = type(name, (StandIn,), {"wanted": f"{module}.{name}"})
        return self._names[module, name]

    def persistent_load(self, pid):
        if pid[0] == "module":  # a whole model was saved: its class, with its source
            return pid[1]
        kind, storage_type, key, _, size, *view = pid
        name = storage_type.wanted.rpartition(".")[2]
        if kind != "storage" or not isinstance(size, int):
            raise pickle.UnpicklingError("a storage is not described as PyTorch does")
        storage = self._storages.setdefault(key, Storage(_DTYPES.get(name, name), size))
        if view and view[0] is not None:
            raise CheckpointFileError(f"shares storages as PyTorch did before version 0.4: {SAVE_TENSORS}")
        return storage


class _Call:
    """One of the few functions that a pickle may call. It has no attributes, so that no pickle can change it."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise AttributeError(name)


@_Call
def _rebuild(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    if not isinstance(storage, Storage) or metadata:  # a negative or conjugate view, for example
        return StandIn()
    return Tensor(storage, offset, tuple(shape), tuple(strides))


@_Call
def _unwrap(value, *_):
    return value


@_Call
def _rebuild_from_type(function, _, args, __):
    return function(*args) if function in (_rebuild, _unwrap) else StandIn()


def load(file):
    """Reads a file of `torch.save`: dicts, lists and numbers as they are, tensors as `Tensor`, all else as `StandIn`.

    Args:
        file: a path.

    Raises:
        CheckpointError: for a file that is damaged or not PyTorch's.
    """
    try:
        if zipfile.is_zipfile(file):
            return _load_archive(file)
        if tarfile.is_tarfile(file):
            raise CheckpointFileError(f"is in PyTorch's oldest format, which can run code: refused. {SAVE_TENSORS}")
        return _load_legacy(file)
    except (CheckpointError, MemoryError, PermissionError):
        raise
    except Exception as error:  # its type depends on where the file is damaged
        raise CheckpointFileError(f"is damaged or not a PyTorch checkpoint ({first_line(error)})") from error


def _load_archive(file):
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():  # compares the checksums of all records
            raise CheckpointFileError(f"is damaged, in the record {damaged}: download it again")
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "constants.pkl" in records:
            raise CheckpointFileError(f"is a TorchScript program, which would run: refused. {SAVE_TENSORS}")
        if "data.pkl" not in records:
            raise CheckpointFileError("is an archive, but not PyTorch's: it has no data.pkl")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise CheckpointFileError(f"was written on a big-endian machine. {SAVE_TENSORS} on another")
        storages = {}
        with archive.open(records["data.pkl"]) as pickled:
            contents = _Unpickler(pickled, storages).load()
        # Memory-mapped, so that the arrays do not take memory twice.
        mapped = np.memmap(file, mode="r")
        for key, storage in storages.items():
            if isinstance(storage.dtype, np.dtype):
                info = records[f"data/{key}"]
                if info.compress_type != zipfile.ZIP_STORED:
                    data = np.frombuffer(archive.read(info), np.uint8)
                else:
                    header = mapped[info.header_offset : info.header_offset + 30].tobytes()
                    start = info.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
                    data = mapped[start : start + info.file_size]
                _fill(storage, data)
    return contents


def _load_legacy(file):
    """Reads the format before the archive: five pickles, then the length and the bytes of each storage."""
    with open(file, "rb") as opened:
        storages = {}
        if _Unpickler(opened, {}).load() != _MAGIC_NUMBER:
            raise CheckpointFileError(f"is a plain pickle, which could run code: refused. {SAVE_TENSORS}")
        _Unpickler(opened, {}).load()  # the version of the format
        system = _Unpickler(opened, {}).load()
        if not system.get("little_endian", True):
            raise CheckpointFileError(f"was written on a big-endian machine. {SAVE_TENSORS} on another")
        contents = _Unpickler(opened, storages).load()
        for key in _Unpickler(opened, {}).load():
            storage = storages[key]
            size = int.from_bytes(opened.read(8), "little")
            if size != storage.size or not isinstance(storage.dtype, np.dtype):
                raise CheckpointFileError(f"is damaged, or holds tensors of {storage.dtype}")
            _fill(storage, np.frombuffer(opened.read(size * storage.dtype.itemsize), np.uint8))
    return contents


def _fill(storage, data):
    size = storage.size * storage.dtype.itemsize
    if len(data) < size:
        raise CheckpointFileError(f"is damaged: a storage has {len(data)} bytes, not {size}: download it again")
    storage.data = data[:size]
