"""The files that a command line names."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cvt_keras.data.image_files import listed
from cvt_keras.errors import ArgumentError, ImageError


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.png", "b/1.png", "a/3.png", "a/[x].png", ".hidden/4.png", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def _names(folder, *names):
    return [str(path.relative_to(folder)) for path, _ in listed([folder / name for name in names])]


def test_folders_and_files_are_listed_in_order(folder):
    assert _names(folder, "") == ["a/3.png", "a/[x].png", "b/1.png", "b/2.png"]
    assert _names(folder, "b", "a/3.png", "b/1.png") == ["b/1.png", "b/2.png", "a/3.png", "b/1.png"]


def test_a_pattern_lists_each_file_once_and_a_name_is_no_pattern(folder):
    assert _names(folder, "**/*.png") == ["a/3.png", "a/[x].png", "b/1.png", "b/2.png"]
    assert _names(folder, "b*") == ["b/1.png", "b/2.png"]
    assert _names(folder, "**") == ["a/3.png", "a/[x].png", "b/1.png", "b/2.png", "Thumbs.db"]
    assert _names(folder, "a/[x].png") == ["a/[x].png"]


def test_standard_input_has_a_path_per_line(folder, monkeypatch):
    lines = f"{folder / 'b'}\n\n{folder / 'missing.png'}\r\n".encode() + os.fsencode(folder) + b"/\xff.png\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    assert [path.name for path, _ in listed([Path("-")])] == ["1.png", "2.png", "missing.png", "\udcff.png"]


def test_a_path_that_the_system_refuses_is_an_error_of_its_own(monkeypatch):
    name = "x" * 300
    [(path, error)] = listed([Path(name)])
    assert str(path) == name and str(error) == "can't be read: File name too long"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(name.encode())))
    [(path, error)] = listed([Path("-")])
    assert isinstance(error, ImageError)


def test_a_link_without_a_target_and_a_link_back(folder):
    (folder / "a" / "back").symlink_to(folder)
    (folder / "c.png").symlink_to("/nowhere.png")
    (folder / "d").symlink_to("/nowhere")
    errors = {path.name: str(error) for path, error in listed([folder]) if isinstance(error, ImageError)}
    assert errors == {"c.png": "a dangling link", "d": "a dangling link"}
    assert _names(folder, "").count("b/1.png") == 1


@pytest.mark.parametrize("names", [[], ["missing.png"], ["*.jpg"], [".hidden/.empty"], ["-"]])
def test_paths_that_name_no_file_are_refused(names, folder, monkeypatch):
    (folder / ".hidden" / ".empty").mkdir()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\n")))
    monkeypatch.chdir(folder)
    with pytest.raises(ArgumentError, match=r"^`images` must be files or folders of images. Received: ") as error:
        list(listed([*map(Path, names)]))
    assert error.value.argument == "images"
