"""PyTorch's state dicts, from files, folders and the Hugging Face hub, without running what is in them."""

import importlib
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

from cvt_keras.errors import ArgumentError, CheckpointError, MissingPackageError, first_line

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
# As transformers calls them. Of the weights' the first is preferred.
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
_SAVE_TENSORS = "Save the tensors alone: torch.save(model.state_dict(), file)"


def locate(source):
    """The file that holds a source's weights, downloaded if that is a hub id.

    Args:
        source: a file, a folder that transformers saved, or a hub id such as `"microsoft/cvt-13"`.

    Raises:
        ValueError: for a `source` that there is not.
        CheckpointError: if there is no checkpoint in it.
        ImportError: for a hub id without huggingface_hub.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ArgumentError(
            f"`source` must be a file, a folder or a hub id such as microsoft/cvt-13. Received: source={source!r}",
            argument="source",
        )
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _file_in(path)
    hub_id = str(source).rstrip("/")
    if path.suffix in (*SUFFIXES, ".keras") or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", hub_id):
        raise ArgumentError(
            "`source` must be a file, a folder or a hub id such as microsoft/cvt-13. "
            f"Received: source={str(source)!r}, which does not exist",
            argument="source",
        )
    return _download(hub_id)


def _file_in(folder):
    """The file of weights in a folder that transformers saved."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"the folder has no {CONFIG}, so is none of transformers: give the file of weights, and `variant`"
        )
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    if sharded := sorted(folder.glob("*.index.json")):
        way_out = "Save it whole: model.save_pretrained(folder, max_shard_size='50GB')"
        raise CheckpointError(f"the weights are cut into several files, says {sharded[0].name}. {way_out}")
    raise CheckpointError(f"the folder has neither {' nor '.join(FILES)}")


def _download(hub_id):
    """The file of weights of a hub id: in the hub's cache, or where that lacks it downloaded into it."""
    hub = import_or_tell("huggingface_hub", f"`source` {hub_id!r} is no file or folder; to look for it on the hub")

    def snapshot(name, cached):
        patterns = [CONFIG, PROCESSOR, name]
        return Path(hub.snapshot_download(hub_id, allow_patterns=patterns, local_files_only=cached))

    # Published weights do not change: what the cache holds is good, also without a network.
    for cached in (True, False):
        try:
            folder = snapshot(FILES[0], cached)
            file = _file_in(folder if (folder / FILES[0]).exists() else snapshot(FILES[1], cached))
            break
        except Exception as error:  # of the hub's, of its HTTP library's, or the system's
            if not cached:
                raise CheckpointError(
                    f"it is no file or folder here, and can't be had from the hub ({first_line(error)}). Give a file, "
                    "or download the repository where there is a network"
                ) from error
    if not file.with_name(PROCESSOR).exists():
        # Another program may have fetched the rest without it; not every repository has one.
        try:
            hub.hf_hub_download(hub_id, PROCESSOR, revision=file.parent.name)
        except Exception as error:
            warnings.warn(
                f"{hub_id} has no {PROCESSOR} ({first_line(error)}): image size, mean and std are taken to be the paper's",
                stacklevel=2,
            )
    return file


def read(file):
    """The state dict in a file: as it is, under `model` or `state_dict`, with `module.` in front of its keys or without.

    Args:
        file: a path that ends in one of `SUFFIXES`.

    Returns:
        A dict from names to NumPy arrays or tensors of PyTorch.

    Raises:
        CheckpointError: for a file that is damaged or holds something else.
        ImportError: if the package that reads it is missing, with what to install.
    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise CheckpointError(f"a checkpoint ends in {', '.join((*SUFFIXES, '.keras'))}, or is a folder of transformers")
    contents = (_read_safetensors if suffix == ".safetensors" else _read_torch)(file)
    for name in ("model", "state_dict"):
        if isinstance(contents, Mapping) and isinstance(contents.get(name), Mapping):
            if astray := [
                key for key, value in contents.items() if getattr(value, "shape", ())
            ]:  # an epoch may be a tensor too
                raise CheckpointError(f"unused: {', '.join(map(str, astray))}, beside {name!r} and not in it")
            contents = contents[name]
            break
    if not isinstance(contents, Mapping) or not contents or not all(isinstance(key, str) for key in contents):
        raise CheckpointError(f"it holds no state dict: a dict from names to tensors. Received: {type(contents).__name__}")
    distributed = all(key.startswith("module.") for key in contents)  # by PyTorch's DistributedDataParallel
    return {key.removeprefix("module.") if distributed else key: value for key, value in contents.items()}


def _read_torch(file):
    torch = import_or_tell("torch", f"to read {file.name}", "; a .safetensors file needs none")
    try:
        archive = zipfile.is_zipfile(file)
        if archive:
            with zipfile.ZipFile(file) as records:
                if damaged := records.testzip():  # PyTorch does not look at the checksums
                    raise CheckpointError(f"its record {damaged} is damaged: download it again")
                if any(name.endswith("/constants.pkl") for name in records.namelist()):
                    raise CheckpointError(f"it is a program, by TorchScript, which would run: refused. {_SAVE_TENSORS}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors say all that there is to say
            # Mapped, the arrays of an archive do not fill the memory a second time.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except (CheckpointError, MemoryError, PermissionError):
        raise
    except Exception as error:  # which one depends on where the file is damaged
        if wanted := re.search(r"[Uu]nsupported (?:global: |)(?:GLOBAL|class|function) (\S+)", str(error)):
            raise CheckpointError(
                f"it holds more than tensors, and to load {wanted[1]} would let it run code: refused. {_SAVE_TENSORS}"
            ) from error
        if "legacy .tar format" in str(error):
            raise CheckpointError(f"it is in PyTorch's oldest form, which would run code: refused. {_SAVE_TENSORS}") from error
        # Of PyTorch's long advice, which is to read it unsafely, the reason is what counts.
        reason = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
        reason = reason[1].rstrip(".: ") if reason else first_line(error)
        reason = "" if "weights_only" in reason or "Unsupported operand" in reason else f" ({reason})"
        raise CheckpointError(f"it is damaged or no checkpoint of PyTorch{reason}: {advice(file)}") from error


def _read_safetensors(file):
    safetensors = import_or_tell("safetensors", f"to read {file.name}")
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            arrays = {}
            for key in tensors.keys():  # noqa: SIM118 (no dict)
                if (dtype := tensors.get_slice(key).get_dtype()).startswith("F8"):
                    raise CheckpointError(f"{key}: its dtype must be float16, bfloat16, float32 or float64. Received: {dtype}")
                arrays[key] = tensors.get_tensor(key)
            return arrays
    except (CheckpointError, MemoryError, PermissionError):
        raise
    except Exception as error:
        raise CheckpointError(f"it is damaged or no checkpoint ({first_line(error)}): {advice(file)}") from error


def advice(file, otherwise="download it again"):
    """What to do about a file that can't be read, by what it begins with."""
    with open(file, "rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is git-lfs' pointer to the file: run git lfs pull where it was cloned"
    if start[:1] == b"\x80" and b"\3" <= start[1:2] <= b"\5":
        return f"as a plain pickle it could run code. {_SAVE_TENSORS}"
    if start.lstrip()[:1] == b"<":
        return "it is a web page: download the file behind it"
    if file.suffix != ".safetensors" and start[8:9] == b"{":
        return "it looks like safetensors: call it .safetensors"
    return otherwise


def import_or_tell(package, purpose, otherwise=""):
    """The package, or an ImportError that says what it is for and how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(f"{purpose}, {package} is needed ({error}): pip install {package}{otherwise}") from error
