"""Reads PyTorch's state dicts from files, folders and the Hugging Face hub, without running code from them."""

import importlib
import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cvt_keras.conversion import torch_files
from cvt_keras.conversion.torch_files import StandIn, Tensor
from cvt_keras.errors import ArgumentError, CheckpointError, CheckpointFileError, MissingPackageError, first_line

# A source with such a suffix is a file, not a hub id, even if it does not exist. The bytes of a file show its format.
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".tar", ".json")
# transformers' names. Of the files of weights, the first that exists is read.
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
INDEX = ".index.json"
FILES = ("model.safetensors", "pytorch_model.bin", f"model.safetensors{INDEX}", f"pytorch_model.bin{INDEX}")


def locate(source, argument="source"):
    """Returns the path of a source's weights; downloads a hub id.

    Args:
        source: a file, a folder that transformers saved, or a hub id such as `"microsoft/cvt-13"`.
        argument: the name of the caller's argument, for the error.

    Raises:
        ArgumentError: if `source` does not exist.
        CheckpointError: if there is no checkpoint in it.
        MissingPackageError: for a hub id without huggingface_hub.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ArgumentError(
            f"`{argument}` must be a file, a folder or a hub id such as microsoft/cvt-13. Received: {argument}={source!r}",
            argument=argument,
        )
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _file_in(path)
    hub_id = str(source).rstrip("/")
    if path.suffix in (*SUFFIXES, ".keras") or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", hub_id):
        raise ArgumentError(
            f"`{argument}` must be a file, a folder or a hub id such as microsoft/cvt-13. "
            f"Received: {source}, which does not exist",
            argument=argument,
        )
    return _download(hub_id, argument)


def about(name, error):
    """Returns a `CheckpointError` with the name of the file or hub id that it is about."""
    separator = " " if isinstance(error, CheckpointFileError) else ": "
    return CheckpointError(f"{name}{separator}{error.summary}", hint=error.hint, details=error.details)


def _file_in(folder):
    """Returns the file of weights in a folder that transformers saved."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"the folder has no {CONFIG}, so transformers did not save it: give the file of weights, and `variant`"
        )
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"the folder has none of {', '.join(FILES)}")


def _download(hub_id, argument):
    """Returns the path of a hub id's weights in the hub's cache; downloads what the cache lacks."""
    hub = _import_package("huggingface_hub", f"`{argument}` {hub_id!r} is no local file or folder; to look for it on the hub")

    def snapshot(name, cached):
        # Shards are called model-00001-of-00002.safetensors.
        shards = [name.removesuffix(INDEX).replace(".", "-*.")] if name.endswith(INDEX) else []
        return Path(hub.snapshot_download(hub_id, allow_patterns=[CONFIG, PROCESSOR, name, *shards], local_files_only=cached))

    # Published weights do not change, so the cache is read first. It also works offline.
    for cached in (True, False):
        try:
            files = (snapshot(name, cached) / name for name in FILES)
            file = next((file for file in files if file.exists()), None) or _file_in(snapshot(FILES[0], cached))
            if cached and file.name.endswith(INDEX):
                _shards(file)  # raises if the cache lacks one
            break
        except Exception as error:  # raised by the hub, its HTTP library or the system
            if not cached:
                raise CheckpointFileError(
                    f"is no local file or folder, and can't be downloaded from the hub ({first_line(error)}). Give a file, "
                    "or download the repository on a machine with network access"
                ) from error
    if not file.with_name(PROCESSOR).exists():
        # Another program may have downloaded the other files without it. Not every repository has one.
        try:
            hub.hf_hub_download(hub_id, PROCESSOR, revision=file.parent.name)
        except Exception as error:
            warnings.warn(
                f"{hub_id} has no {PROCESSOR} ({first_line(error)}): image size, mean and std default to the paper's",
                stacklevel=2,
            )
    return file


def read(file, which=None):
    """Reads the state dict of a file, or of the shards that an index lists.

    It may be nested under a name, such as `state_dict`, and its keys may have a prefix, such as `module.`. Both are removed.

    Args:
        file: a path; its bytes say what it is, not its name.
        which: which weights to read if there are several: `"ema"` for the moving average, or their name or prefix in the file.
            `None` reads the weights that are not an average, and warns if there is an average too.

    Returns:
        A dict from keys to NumPy arrays.

    Raises:
        CheckpointError: for a file that is damaged or holds something else, or several networks.
        ArgumentError: for a `which` that the file does not hold.
        MissingPackageError: if the package that reads the file is not installed.
    """
    contents = _read_shards(file) if file.name.endswith(INDEX) else _read_file(file)
    choices = _choices(contents)
    if not choices:
        _require_tensors(contents)
    state_dict = _select(contents, choices, which, file)
    return {key: value.array() if isinstance(value, Tensor) else value for key, value in state_dict.items()}


def _read_file(file):
    """Reads a file in the format that its first bytes show."""
    with open(file, "rb") as opened:
        start = opened.read(9)
    if start[8:] == b"{" or file.suffix.lower() == ".safetensors":
        return _read_safetensors(file)
    if start.startswith(b"\x89HDF"):
        raise CheckpointFileError("is HDF5, perhaps weights saved by Keras: build the network and call its load_weights(file)")
    try:
        return torch_files.load(file)
    except CheckpointError as error:
        if zipfile.is_zipfile(file) and _is_keras(file):
            raise CheckpointFileError("is a Keras file: rename it to end in .keras") from error
        if error.hint is None and (better := advice(file, otherwise=None)):
            raise CheckpointFileError(f"is damaged or not a checkpoint: {better}") from error
        raise


def _is_keras(file):
    with zipfile.ZipFile(file) as archive:
        return "model.weights.h5" in archive.namelist()


def _shards(index):
    """Reads an index. Returns its map from keys to file names, and the file names, all of which exist."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("`weight_map` must name files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name} is not a valid index of shards: {first_line(error)}") from error
    if missing := [name for name in names if not index.with_name(name).exists()]:
        raise CheckpointError(
            f"{len(missing)} of the {len(names)} files that {index.name} lists are missing: download them again",
            details=[f"missing: {name}" for name in missing],
        )
    return weight_map, names


def _read_shards(index):
    """Reads the state dict of a folder that transformers saved in several files."""
    weight_map, names = _shards(index)
    state_dict, faults = {}, []
    for name in names:
        try:
            shard = _read_file(index.with_name(name))
        except CheckpointError as error:
            raise about(name, error) from error
        if not isinstance(shard, Mapping):
            raise CheckpointError(f"{name} holds no state dict: a dict from names to tensors. Received: {type(shard).__name__}")
        listed = {key for key, file_name in weight_map.items() if file_name == name}
        faults += [f"missing in {name}: {key}" for key in sorted(listed - set(shard))]
        faults += [f"unused in {name}: {key}" for key in sorted(set(shard) - listed, key=str)]
        state_dict |= shard
    if faults:
        raise CheckpointError(f"the shards do not hold what {index.name} says", details=faults)
    return state_dict


# === Choosing one of a file's networks ===

# Matches a key of a CvT, and captures the prefix before the network's own key.
_KEY_OF_A_CVT = re.compile(r"((?:[^.]+\.)*?)(?:stage\d{1,3}|cvt\.encoder\.stages)\.")
_AVERAGE = re.compile(r"(^|[^a-z])ema([^a-z]|$)|averag|shadow|(^|[^a-z])swa([^a-z]|$)")
_MAX_DEPTH = 4


class _Choice(NamedTuple):
    """One network in a file."""

    names: tuple[str, ...]  # the keys of the nested dicts that lead to its dict
    prefix: str  # of its keys in that dict
    holder: Mapping  # that dict, which may hold other keys too
    beside: tuple[str, ...]  # the prefixes of other networks in the same dict

    @property
    def name(self):
        """Its name for `which`: the prefix if the dict holds other keys too, else the name of the dict."""
        alone = self.names and not self.beside and not self.strays()
        return ("" if alone else self.prefix.rstrip(".")) or ".".join(self.names) or "."

    @property
    def is_average(self):
        return any(_AVERAGE.search(name.lower()) for name in (*self.names, self.prefix))

    def answers_to(self, which):
        return which in (self.name, ".".join(self.names), *self.names[-1:])

    def is_named_by(self, which):
        """Whether `which` asks for the keys with this prefix only."""
        return which == self.name or (which == "ema" and bool(_AVERAGE.search(self.prefix.lower())))

    def state_dict(self):
        """Returns the network's arrays under their keys without the prefix."""
        others = [prefix for prefix in self.beside if len(prefix) > len(self.prefix)]
        return {
            key.removeprefix(self.prefix): value
            for key, value in self.holder.items()
            if key.startswith(self.prefix) and not any(key.startswith(prefix) for prefix in others)
        }

    def strays(self):
        """Returns the keys without any network's prefix, such as a loss's weights. `n_averaged`, a counter, is ignored."""
        if not self.prefix:
            return []  # they are reported as unused when the weights are compared with the network
        covered = (self.prefix, *self.beside)
        return [key for key in self.holder if not key.startswith(covered) and key != "n_averaged"]


def _choices(contents):
    """Returns the networks in a file's contents, or else its first state dict."""
    networks, dicts = [], []

    def search(value, names):
        if not isinstance(value, Mapping) or len(names) > _MAX_DEPTH:
            return
        for key, item in value.items():
            if isinstance(key, str):
                search(item, (*names, key))
        arrays = _arrays(value)
        if not arrays or not all(isinstance(key, str) for key in value):
            return
        prefixes = {match[1] for match in map(_KEY_OF_A_CVT.match, arrays) if match}
        networks.extend(_Choice(names, prefix, value, tuple(sorted(prefixes - {prefix}))) for prefix in sorted(prefixes))
        if not prefixes:
            dicts.append(_Choice(names, "", value, ()))

    search(contents, ())
    return networks or dicts[:1]


def _arrays(mapping):
    """Returns the keys of arrays. Scalars are left out: an epoch may be a tensor too."""
    return [key for key, item in mapping.items() if getattr(item, "shape", ())]


def _select(contents, choices, which, file):
    """Returns the state dict that `which` names; with `None`, the only one that is not an average."""
    if which is None:
        chosen = [choice for choice in choices if not choice.is_average] or choices
    elif which == "ema":
        chosen = [choice for choice in choices if choice.is_average]
    else:
        chosen = [choice for choice in choices if choice.answers_to(which)]
    names = ", ".join(repr(choice.name) for choice in choices)
    if not chosen:
        known = f"be one of {names}" if names != repr(".") else "be left out, as the file holds one network without a name"
        raise ArgumentError(f"`which` must {known}. Received: which={which!r}", argument="which")
    if len(chosen) > 1:
        raise CheckpointFileError(
            "holds several networks, and `which` must name one",
            hint=f"Choose one: cvt-keras convert {file} OUT.keras --which {chosen[0].name}",
            details=[f"{choice.name}: {len(choice.state_dict())} arrays" for choice in chosen],
        )
    [choice] = chosen
    if which is None:
        _require_no_other_arrays(contents, choice)
        if averages := ", ".join(repr(other.name) for other in choices if other.is_average and other is not choice):
            warnings.warn(
                f"{file.name} holds weights and their moving average: reading {choice.name!r}, not {averages}. "
                f'which="ema" reads the average (cvt-keras convert {file} OUT.keras --which ema)',
                stacklevel=2,
            )
    if (strays := choice.strays()) and not choice.is_named_by(which):
        counts = Counter(key.partition(".")[0] for key in strays)
        raise CheckpointFileError(
            f"holds other arrays beside the network, whose keys begin with {choice.prefix}",
            hint=f"Read the network alone: cvt-keras convert {file} OUT.keras --which {choice.name}",
            details=[f"unused: {name}, {count} arrays" for name, count in sorted(counts.items())],
        )
    return choice.state_dict()


def _require_no_other_arrays(contents, choice):
    """Raises CheckpointError if a dict on the way to the chosen one holds arrays."""
    for name in choice.names:
        if (arrays := _arrays(contents)) and not choice.prefix:
            raise CheckpointError(f"unused: {', '.join(map(str, arrays))}, beside {name!r} and not in it")
        contents = contents[name]


def _require_tensors(contents):
    """Raises CheckpointError, which says what the file holds instead of a state dict."""
    values = [contents, *(contents.values() if isinstance(contents, Mapping) else ())]
    if objects := [value for value in values if isinstance(value, StandIn)]:
        raise CheckpointFileError(
            f"holds an object of {objects[0].wanted} instead of tensors, which only its own code can open: refused. "
            f"{torch_files.SAVE_TENSORS}"
        )
    raise CheckpointFileError(f"holds no state dict: a dict from names to tensors. Received: {type(contents).__name__}")


def _read_safetensors(file):
    safetensors = _import_package("safetensors", f"to read {file.name}")
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
        raise CheckpointFileError(f"is damaged or not a checkpoint ({first_line(error)}): {advice(file)}") from error


def advice(file, otherwise="download it again"):
    """Returns what to do about an unreadable file, judging by its first bytes."""
    with open(file, "rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run git lfs pull in the clone"
    if start.lstrip()[:1] == b"<":
        return "it is a web page: download the file itself"
    return otherwise


def _import_package(package, purpose):
    """Imports a package. Raises MissingPackageError, which says what it is for and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(f"{purpose}, {package} is needed ({error}): pip install {package}") from error
