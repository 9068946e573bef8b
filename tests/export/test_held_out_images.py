"""An export never verifies on an image that the run was trained on."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from photos import encoded

from cvt_keras import cli
from cvt_keras.data.record import ImageRecord
from cvt_keras.errors import DataError
from cvt_keras.export import artifacts, export


def _photos():
    """Class -> colour -> PNG file: 40 images of one colour each for two classes, no two alike."""
    colours = np.random.default_rng(0).permutation(64**3)[:80].reshape(2, 40)
    files = {}
    for name, numbers in zip("ab", colours):
        rows = [(n % 64, n // 64 % 64, n // 4096) for n in map(int, numbers)]
        files[name] = {row: encoded(np.full((16, 16, 3), row, "uint8")) for row in rows}
    return files


PHOTOS = _photos()
DIGESTS = {colour: hashlib.sha256(data).hexdigest() for files in PHOTOS.values() for colour, data in files.items()}


def _write(folder, photos, ending=".png"):
    for name, files in photos.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(files.values()):
            (folder / name / f"{number}{ending}").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def trained_on_folder(tmp_path_factory):
    """A run of one epoch on a folder of images."""
    from cvt_keras.training import RECIPES, run

    folder = tmp_path_factory.mktemp("held_out")
    data_dir = _write(folder / "photos", PHOTOS)
    recipe = dataclasses.replace(RECIPES["smoke"], dataset="folder", data_dir=str(data_dir), image_size=16, epochs=1)
    run(dataclasses.replace(recipe, batch_size=16, train_limit=None, validation_limit=None, test_limit=None), folder / "run")
    return folder / "run"


@pytest.fixture
def run_dir(trained_on_folder, tmp_path):
    shutil.copytree(trained_on_folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def used(monkeypatch):
    """Records the digests of the images that calibrate and verify. Converts and runs nothing."""
    used = {}

    def digests(images):
        return {DIGESTS.get(tuple(map(int, image[0, 0]))) for image in images}

    def write(classifier, class_names, name, calibration, file):
        used["calibration"] = digests(calibration) if calibration is not None else None
        file.write_bytes(b"")

    def verify(name, file, relative, images, labels, expected, bounds, **options):
        used["test"] = digests(np.load(images))
        fields = {field.name: 0 for field in dataclasses.fields(artifacts.Artifact)}
        return artifacts.Artifact(**{**fields, "name": name, "path": relative, "passed": True, "broken": (), "runtime": "none"})

    monkeypatch.setattr(artifacts, "_write", write)
    monkeypatch.setattr(artifacts, "verify", verify)
    monkeypatch.setattr(artifacts, "summary", lambda artifact: "")
    monkeypatch.setattr(artifacts.page, "write", lambda run_dir: None)
    return used


def _recorded(run_dir, split):
    return {digest for digest, image in ImageRecord.read(run_dir / "images.csv").images.items() if image.split == split}


def _report(run_dir):
    return json.loads((run_dir / "export" / "report.json").read_text())


def test_moved_and_renamed_images_are_recognised(run_dir, used, tmp_path, capsys):
    test, train = _recorded(run_dir, "test"), _recorded(run_dir, "train")
    assert test and train and not test & train
    photos = {name: dict(reversed(files.items())) for name, files in PHOTOS.items()}
    missing = next(colour for colour in photos["a"] if DIGESTS[colour] in test)
    del photos["a"][missing]
    new = {(200, number, 0): encoded(np.full((16, 16, 3), (200, number, 0), "uint8")) for number in range(20)}
    photos["b"] |= new
    moved = _write(tmp_path / "moved", photos, "_renamed.jpg")
    export(run_dir, ["int8"], data_dir=str(moved))
    assert used["test"] == test - {DIGESTS[missing]}
    assert used["calibration"] and used["calibration"] <= train
    report = _report(run_dir)
    note = "Images differ from those of the run: 1 missing, 20 new. New ones are left out."
    assert (report["held_out"], report["held_out_note"]) == ("verified", note)
    assert f"WARNING: {note}\n" in capsys.readouterr().err


def test_an_unchanged_folder_gives_no_warning(run_dir, used, capsys):
    export(run_dir, ["float32"])
    assert used == {"test": _recorded(run_dir, "test"), "calibration": None}
    assert (_report(run_dir)["held_out"], _report(run_dir)["held_out_note"]) == ("verified", "")
    [warning] = capsys.readouterr().err.splitlines()
    assert "too few to measure a loss of accuracy" in warning


def test_a_run_without_images_csv_is_exported_with_a_warning(run_dir, used, capsys):
    (run_dir / "images.csv").unlink()
    assert cli.main(["export", str(run_dir), "--formats", "float32"]) == 0
    assert used["test"]
    assert _report(run_dir)["held_out"] == "held-out images not verified"
    assert "no images.csv" in _report(run_dir)["held_out_note"]
    assert "WARNING: held-out images not verified. " in capsys.readouterr().err


@pytest.mark.parametrize("split, formats", [("test", ["float32"]), ("train", ["int8"])])
def test_a_folder_without_the_runs_images_raises(split, formats, run_dir, used, tmp_path):
    missing = _recorded(run_dir, split)
    # Replace them by others, so that the folder can be split.
    photos = {
        name: {colour: data for colour, data in files.items() if DIGESTS[colour] not in missing}
        | {(201, place, n): encoded(np.full((16, 16, 3), (201, place, n), "uint8")) for n in range(40)}
        for place, (name, files) in enumerate(PHOTOS.items())
    }
    with pytest.raises(DataError) as raised:
        export(run_dir, formats, data_dir=str(_write(tmp_path / "others", photos)))
    assert raised.value.argument == "data_dir" and not used
    assert not (run_dir / "export").exists()


def test_a_folder_may_hold_the_test_images_and_broken_files_only(run_dir, used, tmp_path, capsys):
    test = _recorded(run_dir, "test")
    photos = {name: {row: data for row, data in files.items() if DIGESTS[row] in test} for name, files in PHOTOS.items()}
    folder = _write(tmp_path / "photos", photos)
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    export(run_dir, ["float32"], data_dir=str(folder))
    assert used["test"] == test
    report = _report(run_dir)
    assert report["held_out"] == "verified"
    assert report["held_out_note"].endswith(" missing. Files that can't be read are left out: 1.")
    assert "WARNING: Files that can't be read are left out: 1.\n" in capsys.readouterr().err


def test_a_photo_with_the_same_pixels_stays_in_its_split(run_dir, used, tmp_path):
    edited = {name: {row: data + b"edited" for row, data in files.items()} for name, files in PHOTOS.items()}
    export(run_dir, ["float32"], data_dir=str(_write(tmp_path / "photos", edited)))
    assert used["test"] == _recorded(run_dir, "test")
    assert _report(run_dir)["held_out_note"] == ""


def test_an_export_keeps_to_the_limits_of_the_run(run_dir, used):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    (run_dir / "recipe.json").write_text(json.dumps({**recipe, "train_limit": 8, "test_limit": 3}))
    export(run_dir, ["int8"])
    assert (len(used["calibration"]), len(used["test"])) == (8, 3)
    export(run_dir, ["int8"], verify_images=2)
    assert len(used["test"]) == 2
