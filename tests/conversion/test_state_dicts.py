import json
import os
import pickle
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from cvt_keras.conversion import state_dicts
from cvt_keras.errors import ArgumentError, CheckpointError

pytestmark = pytest.mark.files

ARRAYS = {"norm.weight": np.arange(6, dtype="float32").reshape(2, 3), "norm.bias": np.ones(400, "float32")}


def _tensors(prefix=""):
    return {f"{prefix}{key}": torch.from_numpy(array) for key, array in ARRAYS.items()}


@pytest.fixture
def folder(tmp_path):
    """As transformers writes it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors.numpy.save_file(ARRAYS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "cvt"}))
    return folder


# === What a file holds ===


@pytest.mark.parametrize(
    "contents",
    [
        _tensors(),
        {"model": _tensors()},
        {"model": "cls_cvt", "state_dict": _tensors(), "epoch": torch.tensor(300)},  # as the authors' own, while training
        {"model": _tensors("module.")},
    ],
)
@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", ["weights.pth", "weights.PT"])
def test_a_state_dict_is_found_however_wrapped(contents, archive, name, tmp_path):
    torch.save(contents, tmp_path / name, _use_new_zipfile_serialization=archive)
    found = state_dicts.read(state_dicts.locate(tmp_path / name))
    assert set(found) == set(ARRAYS)
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(found[key].numpy(), array)


def test_safetensors_are_read_without_pytorch(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = state_dicts.read(state_dicts.locate(folder))
    assert set(found) == set(ARRAYS)
    np.testing.assert_array_equal(found["norm.weight"], ARRAYS["norm.weight"])


class Anything:
    pass


class _Run:
    """Runs a command where it is read without care."""

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
        ("page.pth", lambda path: path.write_text("<!DOCTYPE html><html></html>"), ["damaged or no checkpoint", "web page"]),
        ("plain.pth", lambda path: path.write_bytes(pickle.dumps({"a": 1})), ["plain pickle", "state_dict()"]),
        ("empty.pth", lambda path: path.write_bytes(b""), ["damaged"]),
        ("text.pth", lambda path: path.write_text("hello world\n" * 99), ["damaged"]),
        ("text.safetensors", lambda path: path.write_text("hello world\n" * 99), ["damaged", "download it"]),
        ("named.pth", lambda path: safetensors.numpy.save_file(ARRAYS, path), ["looks like safetensors"]),
        ("lfs.bin", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
        ("lfs.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
        ("weights.h5", lambda path: path.write_text("hello"), [".pth, .pt, .bin, .safetensors, .keras"]),
    ],
)
def test_what_is_no_checkpoint_is_told_in_a_line(name, write, parts, tmp_path, capsys):
    write(tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        state_dicts.read(tmp_path / name)
    [line] = str(error.value).splitlines()
    for part in parts:
        assert part in line, line
    assert "weights_only" not in line  # PyTorch's advice: to switch it off
    assert " ()" not in line
    assert not capsys.readouterr().err


def test_a_flipped_bit_in_an_archive_is_found(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(_tensors(), file)
    data = bytearray(file.read_bytes())
    data[data.index(ARRAYS["norm.bias"].tobytes()) + 8] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"its record \S+/data/\d+ is damaged"):
        state_dicts.read(file)


@pytest.mark.parametrize(
    "package, name", [("torch", "weights.pth"), ("torch", "pytorch_model.bin"), ("safetensors", "model.safetensors")]
)
def test_a_missing_package_is_told_with_what_to_install(package, name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"not looked at")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"to read {name}.*pip install {package}"):
        state_dicts.read(tmp_path / name)


# === Where it is ===


@pytest.mark.parametrize(
    "source, part",
    [
        ("nowhere.pth", "'nowhere.pth'"),
        ("weights/nowhere.pth", "'weights/nowhere.pth'"),  # not taken for a hub id
        ("nowhere/model.keras", "'nowhere/model.keras'"),
        ("/nowhere/at/all", "'/nowhere/at/all'"),
        ("", "source=''"),
        (None, "source=None"),
    ],
)
def test_a_source_that_there_is_not_is_told(source, part):
    with pytest.raises(ArgumentError) as error:
        state_dicts.locate(source)
    assert error.value.argument == "source"
    assert part in error.value.summary


def test_of_a_folder_safetensors_are_preferred(folder):
    torch.save(_tensors(), folder / "pytorch_model.bin")
    assert state_dicts.locate(folder).name == "model.safetensors"
    (folder / "model.safetensors").unlink()
    assert state_dicts.locate(str(folder)).name == "pytorch_model.bin"


@pytest.mark.parametrize(
    "damage, parts",
    [
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["neither model.safetensors nor pytorch_model.bin"]),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
            ["several files", "max_shard_size"],
        ),
    ],
)
def test_a_folder_without_weights_is_told_in_a_line(damage, parts, folder):
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        state_dicts.locate(folder)
    for part in parts:
        assert part in str(error.value)


# === The hub ===


class _Hub(BaseHTTPRequestHandler):
    """A double of the hub: one repository, whose files lie in `folder`."""

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
    """The hub's, empty; no network may be used."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def hub(folder, cache, monkeypatch):
    """Its double, online, with the files of `folder`."""
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


def test_a_cache_without_the_processors_config_gets_it(hub, cache, monkeypatch):
    with pytest.warns(UserWarning, match=r"has no preprocessor_config\.json \(404"):
        file = state_dicts.locate("microsoft/tiny")
    (hub.folder / "preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match=r"microsoft/tiny has no preprocessor_config\.json .*taken to be the paper's"):
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


def test_a_download_that_was_broken_off_is_completed(hub, cache, monkeypatch):
    (hub.folder / "preprocessor_config.json").write_text("{}")
    file = state_dicts.locate("microsoft/tiny")
    file.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as error:
        state_dicts.locate("microsoft/tiny")
    assert "model.safetensors" in error.value.summary
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert state_dicts.locate("microsoft/tiny") == file


def test_a_hub_id_that_can_not_be_had_is_told(cache):
    with pytest.raises(CheckpointError, match=r"it is no file or folder here, and can't be had from the hub"):
        state_dicts.locate("microsoft/tiny")


def test_without_the_hubs_package_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"microsoft/tiny.*pip install huggingface_hub"):
        state_dicts.locate("microsoft/tiny")
