import argparse
import json
import os
import pickle
import sys
import tarfile
import threading
import warnings
import zipfile
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from cvt_keras import CvT
from cvt_keras.conversion import state_dicts
from cvt_keras.errors import ArgumentError, CheckpointError

pytestmark = pytest.mark.files

ARRAYS = {"stage0.cls_token": np.arange(6, dtype="float32").reshape(2, 3), "norm.bias": np.ones(400, "float32")}


def _tensors(prefix="", times=1):
    return {f"{prefix}{key}": torch.from_numpy(array * times) for key, array in ARRAYS.items()}


class _Settings(dict):
    """A class that a script may leave in its checkpoint, like fvcore's CfgNode or Lightning's AttributeDict."""


@pytest.fixture
def folder(tmp_path):
    """A folder as transformers saves it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors.numpy.save_file(ARRAYS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "cvt"}))
    return folder


# === Wrapped state dicts ===


def _assert_read(state_dict, times=1):
    assert set(state_dict) == set(ARRAYS)
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(state_dict[key], array * times)


@pytest.mark.parametrize(
    "contents",
    [
        _tensors(),
        {"model": _tensors()},
        {"model": "cls_cvt", "state_dict": _tensors(), "epoch": torch.tensor(300)},  # as the authors' own, while training
        {"model": _tensors("module.")},
        {"checkpoint": {"network": _tensors("module._orig_mod.cvt.")}, "loss": {"weight": torch.ones(3)}},
        {"state_dict": _tensors("model."), "hyper_parameters": _Settings(lr=1), "callbacks": {"best": np.float64(0.8)}},
        {"model_state_dict": OrderedDict(_tensors()), "args": argparse.Namespace(lr=1, out=Path("runs")), "rng": np.arange(3)},
        {"state_dict_ema": {"n_averaged": torch.tensor(3), **_tensors("module.")}},  # of torch's AveragedModel
        {"model": _tensors(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "max": torch.ones(2)}, 1: torch.ones(2)}}},
        {key: torch.nn.Parameter(tensor) for key, tensor in _tensors().items()},
    ],
)
@pytest.mark.parametrize("archive", [True, False])
def test_a_wrapped_state_dict_is_found(contents, archive, tmp_path, recwarn):
    for name in ("weights.pth", "last.ckpt", "model_best.pth.tar", "weights"):
        torch.save(contents, tmp_path / name, _use_new_zipfile_serialization=archive)
        _assert_read(state_dicts.read(state_dicts.locate(tmp_path / name)))
    assert not recwarn.list


# === Several networks in a file ===


@pytest.mark.parametrize(
    "contents, name, average",
    [
        ({"model": _tensors(), "model_ema": _tensors(times=2)}, "model", "model_ema"),
        ({"state_dict_ema": _tensors(times=2), "state_dict": _tensors()}, "state_dict", "state_dict_ema"),
        ({"net": _tensors("module."), "ema": {"shadow": _tensors("module.", times=2)}}, "net", "ema.shadow"),
        ({"state_dict": _tensors("model.") | _tensors("ema_model.module.", times=2)}, "model", "ema_model.module"),
        (_tensors() | _tensors("averaged.", times=2), ".", "averaged"),
    ],
)
def test_either_the_weights_or_their_average_are_read(contents, name, average, tmp_path):
    torch.save(contents, tmp_path / "both.pth")
    with pytest.warns(
        UserWarning, match=r'which="ema" reads the average \(cvt-keras convert \S+ OUT.keras --which ema\)'
    ) as warned:
        _assert_read(state_dicts.read(tmp_path / "both.pth"))
    assert repr(average) in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _assert_read(state_dicts.read(tmp_path / "both.pth", "ema"), times=2)
        _assert_read(state_dicts.read(tmp_path / "both.pth", average), times=2)
        _assert_read(state_dicts.read(tmp_path / "both.pth", name))


def test_one_of_several_networks_must_be_named(tmp_path):
    torch.save({"student": _tensors(), "teacher": _tensors("module.", times=3)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError) as error:
        state_dicts.read(tmp_path / "two.pth")
    assert error.value.details == ("student: 2 arrays", "teacher: 2 arrays")
    assert error.value.hint.endswith("--which student")
    _assert_read(state_dicts.read(tmp_path / "two.pth", "student"))
    _assert_read(state_dicts.read(tmp_path / "two.pth", "teacher"), times=3)
    with pytest.raises(ArgumentError) as error:
        state_dicts.read(tmp_path / "two.pth", "ema")
    assert error.value.argument == "which" and "'student'" in error.value.summary


def test_other_arrays_are_ignored_only_if_the_network_is_named(tmp_path):
    extra = {"loss.weight": torch.ones(3), "loss.bias": torch.ones(3), "teacher.conv1.weight": torch.ones(3)}
    torch.save({"state_dict": _tensors("model.") | extra}, tmp_path / "last.ckpt")
    for which in (None, "state_dict"):
        with pytest.raises(CheckpointError) as error:
            state_dicts.read(tmp_path / "last.ckpt", which)
        assert error.value.details == ("unused: loss, 2 arrays", "unused: teacher, 1 arrays")
        assert error.value.hint.endswith("--which model")
    _assert_read(state_dicts.read(tmp_path / "last.ckpt", "model"))


def test_which_is_refused_for_a_file_with_one_network(tmp_path):
    torch.save(_tensors(), tmp_path / "one.pth")
    with pytest.raises(ArgumentError) as error:
        state_dicts.read(tmp_path / "one.pth", "ema")
    assert error.value.argument == "which"


# === Kinds of files ===


def test_the_format_is_recognised_by_the_bytes(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "named.pth")
    _assert_read(state_dicts.read(tmp_path / "named.pth"))


def _write_shards(folder, suffix):
    """Writes ARRAYS in two shards, as transformers does. Returns the index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weight_map = {key: f"{stem}-0000{i}-of-00002.{suffix}" for i, key in enumerate(ARRAYS, 1)}
    for key, name in weight_map.items():
        if suffix == "bin":
            torch.save({key: torch.from_numpy(ARRAYS[key])}, folder / name)
        else:
            safetensors.numpy.save_file({key: ARRAYS[key]}, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_by_their_index(suffix, folder):
    (folder / "model.safetensors").unlink()
    index = _write_shards(folder, suffix)
    assert state_dicts.locate(folder) == index
    _assert_read(state_dicts.read(index))
    shard = next(folder.glob("*-00002-of-00002*"))
    if suffix == "bin":
        torch.save({"norm.biaz": torch.ones(3)}, shard)
    else:
        safetensors.numpy.save_file({"norm.biaz": np.ones(3)}, shard)
    with pytest.raises(CheckpointError) as error:
        state_dicts.read(index)
    assert error.value.details == (f"missing in {shard.name}: norm.bias", f"unused in {shard.name}: norm.biaz")
    shard.write_text("hello")
    with pytest.raises(CheckpointError) as error:
        state_dicts.read(index)
    assert shard.name in error.value.summary and "damaged" in error.value.summary
    shard.unlink()
    with pytest.raises(CheckpointError) as error:
        state_dicts.read(index)
    assert error.value.details == (f"missing: {shard.name}",)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../a.bin"}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_refused(text, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError) as error:
        state_dicts.read(index)
    assert index.name in error.value.summary


def test_safetensors_are_read_without_pytorch(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    _assert_read(state_dicts.read(state_dicts.locate(folder)))


class Anything:
    pass


class _Run:
    """Runs a command when it is unpickled without care."""

    def __reduce__(self):
        return os.system, ("echo read without care >&2",)


def _write_tar(path):
    with tarfile.open(path, "w:") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name))


@pytest.mark.parametrize(
    "name, write, parts",
    [
        ("code.pth", lambda path: torch.save({"model": Anything()}, path), ["Anything", "refused", "state_dict()"]),
        (
            "program.pt",
            lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path),
            ["TorchScript", "refused", "state_dict()"],
        ),
        ("tar.pth", _write_tar, ["oldest form", "refused", "state_dict()"]),
        (
            "astray.pth",
            lambda path: torch.save({"model": _tensors(), "head.weight": torch.ones(3)}, path),
            ["unused: head.weight"],
        ),
        (
            "float8.safetensors",
            lambda path: safetensors.torch.save_file({"norm.bias": torch.ones(3).to(torch.float8_e4m3fn)}, path),
            ["norm.bias: its dtype must be", "F8_E4M3"],
        ),
        ("list.pth", lambda path: torch.save([torch.ones(3)], path), ["no state dict", "list"]),
        ("numbers.pth", lambda path: torch.save({1: torch.ones(3)}, path), ["no state dict"]),
        ("nothing.pth", lambda path: torch.save({}, path), ["no state dict"]),
        ("system.pth", lambda path: torch.save({"model": _tensors(), "x": _Run()}, path), ["posix.system", "refused"]),
        ("page.pth", lambda path: path.write_text("<!DOCTYPE html><html></html>"), ["damaged or not a checkpoint", "web page"]),
        ("plain.pth", lambda path: path.write_bytes(pickle.dumps({"a": 1})), ["plain pickle", "state_dict()"]),
        ("empty.pth", lambda path: path.write_bytes(b""), ["damaged"]),
        ("text.pth", lambda path: path.write_text("hello world\n" * 99), ["damaged"]),
        ("text.safetensors", lambda path: path.write_text("hello world\n" * 99), ["damaged", "download it"]),
        (
            "module.pth",
            lambda path: torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
            ["torch.nn.modules.linear.Linear", "refused", "state_dict()"],
        ),
        ("whole.pth", lambda path: torch.save(Anything(), path), ["Anything", "refused", "state_dict()"]),
        (
            "renamed.pth",
            lambda path: CvT("cvt_tiny", 5, (16, 16, 3)).save(f"{path}.keras") or Path(f"{path}.keras").rename(path),
            [".keras"],
        ),
        ("other.pth", lambda path: zipfile.ZipFile(path, "w").writestr("readme.txt", "hello"), ["not PyTorch's"]),
        ("lfs.bin", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
        ("lfs.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
        ("weights.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), ["HDF5", "load_weights"]),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(name, write, parts, tmp_path, capsys):
    write(tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        state_dicts.read(tmp_path / name)
    [line] = str(error.value).splitlines()
    for part in parts:
        assert part in line, line
    assert "weights_only" not in line  # PyTorch's own message advises to switch it off
    assert " ()" not in line
    assert not capsys.readouterr().err


def test_a_flipped_bit_in_an_archive_is_found(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(_tensors(), file)
    data = bytearray(file.read_bytes())
    data[data.index(ARRAYS["norm.bias"].tobytes()) + 8] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged, in the record \S+/data/\d+:"):
        state_dicts.read(file)


def test_a_missing_package_is_named_with_the_command_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"to read model\.safetensors.*pip install safetensors"):
        state_dicts.read(tmp_path / "model.safetensors")


# === Sources ===


@pytest.mark.parametrize(
    "source, part",
    [
        ("nowhere.pth", "Received: nowhere.pth, which does not exist"),
        ("weights/nowhere.pth", "Received: weights/nowhere.pth,"),  # not taken for a hub id
        ("nowhere/model.keras", "Received: nowhere/model.keras,"),
        ("/nowhere/at/all", "Received: /nowhere/at/all,"),
        ("", "source=''"),
        (None, "source=None"),
    ],
)
def test_a_missing_source_is_named(source, part):
    with pytest.raises(ArgumentError) as error:
        state_dicts.locate(source)
    assert error.value.argument == "source"
    assert part in error.value.summary


def test_safetensors_are_preferred_in_a_folder(folder):
    torch.save(_tensors(), folder / "pytorch_model.bin")
    assert state_dicts.locate(folder).name == "model.safetensors"
    (folder / "model.safetensors").unlink()
    assert state_dicts.locate(str(folder)).name == "pytorch_model.bin"


@pytest.mark.parametrize(
    "damage, parts",
    [
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["none of model.safetensors, pytorch_model.bin"]),
    ],
)
def test_a_folder_without_config_or_weights_is_refused(damage, parts, folder):
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        state_dicts.locate(folder)
    for part in parts:
        assert part in str(error.value)


# === The hub ===


class _Hub(BaseHTTPRequestHandler):
    """A fake hub with one repository, whose files are in `folder`."""

    folder = None
    asked = None

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self.wfile.write(self._answer())

    def _answer(self):
        type(self).asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if "/tree/" in self.path:
            files = [{"type": "file", "path": file.name, "size": 1, "oid": file.name} for file in self.folder.iterdir()]
            body = json.dumps(files).encode()
        elif self.path.startswith("/api/models/"):
            body = json.dumps({"id": "microsoft/tiny", "sha": "0" * 40, "siblings": [], "tags": []}).encode()
        elif self.path.startswith("/microsoft/tiny/resolve/") and (self.folder / name).exists():
            body = (self.folder / name).read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        self.send_response(200)
        for header, value in {"Content-Length": len(body), "ETag": f'"{name}"', "X-Repo-Commit": "0" * 40}.items():
            self.send_header(header, str(value))
        self.end_headers()
        return body

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which is offline."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def hub(folder, cache, monkeypatch):
    """A fake hub, online, with the files of `folder`."""
    _Hub.folder, _Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(huggingface_hub.constants.ENDPOINT, endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield _Hub
    server.shutdown()


def test_a_missing_preprocessor_config_is_downloaded_into_the_cache(hub, cache, monkeypatch):
    with pytest.warns(UserWarning, match=r"has no preprocessor_config\.json \(404"):
        file = state_dicts.locate("microsoft/tiny")
    (hub.folder / "preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match=r"microsoft/tiny has no preprocessor_config\.json .*default to the paper's"):
        state_dicts.locate("microsoft/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert state_dicts.locate("microsoft/tiny") == file
    assert file.with_name("preprocessor_config.json").exists()


@pytest.mark.parametrize("names", [("model.safetensors",), ("pytorch_model.bin",), ("model.safetensors", "pytorch_model.bin")])
def test_a_hub_id_is_downloaded_once(names, hub, cache, monkeypatch):
    contents = (hub.folder / "model.safetensors").read_bytes()
    (hub.folder / "model.safetensors").unlink()
    for name in (*names, "preprocessor_config.json", "README.md"):
        (hub.folder / name).write_bytes(contents)
    for source in ("microsoft/tiny", "microsoft/tiny/"):
        file = state_dicts.locate(source)
        assert (file.name, file.read_bytes()) == (names[0], contents)
        assert file.is_relative_to(cache)
        assert file.with_name("config.json").exists()
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "preprocessor_config.json", names[0]}
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert state_dicts.locate("microsoft/tiny") == file
    assert len(hub.asked) == asked


def test_missing_shards_are_downloaded(hub, cache):
    (hub.folder / "model.safetensors").unlink()
    _write_shards(hub.folder, "safetensors")
    (hub.folder / "preprocessor_config.json").write_text("{}")
    file = state_dicts.locate("microsoft/tiny")
    _assert_read(state_dicts.read(file))
    file.with_name("model-00002-of-00002.safetensors").unlink()
    assert state_dicts.locate("microsoft/tiny") == file
    _assert_read(state_dicts.read(file))


def test_an_interrupted_download_is_completed(hub, cache, monkeypatch):
    (hub.folder / "preprocessor_config.json").write_text("{}")
    file = state_dicts.locate("microsoft/tiny")
    file.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as error:
        state_dicts.locate("microsoft/tiny")
    assert "model.safetensors" in error.value.summary
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert state_dicts.locate("microsoft/tiny") == file


def test_an_unavailable_hub_id_is_refused(cache):
    with pytest.raises(CheckpointError, match=r"is no local file or folder, and can't be downloaded from the hub"):
        state_dicts.locate("microsoft/tiny")


def test_a_hub_id_needs_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"microsoft/tiny.*pip install huggingface_hub"):
        state_dicts.locate("microsoft/tiny")
