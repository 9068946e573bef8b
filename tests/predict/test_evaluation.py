"""Accuracy on folders of labelled images, without those that the run was trained on."""

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cvt_keras import load_run, runs
from cvt_keras.data import images
from cvt_keras.data.folder import pixel_digest
from cvt_keras.data.record import EARLIER, ImageRecord
from cvt_keras.data.record import Image as Recorded
from cvt_keras.errors import DataError
from cvt_keras.predict import evaluate
from cvt_keras.predict.evaluation import TRAINED_ON


def _write_record(run_dir, splits):
    """Writes images.csv with the images at some paths: `{path: split}`."""
    record = {}
    for path, split in splits.items():
        data = path.read_bytes()
        record[hashlib.sha256(data).hexdigest()] = Recorded(split, path.parent.name, pixel_digest(images.decode(data)))
    ImageRecord(record).write(run_dir / runs.IMAGES)


def test_the_numbers_are_those_of_the_answers(classifier, photos):
    result = evaluate(classifier, photos.folder)
    labels = ["apples"] * 3 + ["pears"] * 3
    answers = [answer.label for answer in classifier.predict(photos.pixels)]
    right = [answer == label for answer, label in zip(answers, labels)]
    assert result.scores["top1"] == np.mean(right) and result.scores["images"] == 6
    names = classifier.class_names
    for label, name in enumerate(names):
        own = [ok for ok, of in zip(right, labels) if of == name]
        assert result.per_class[label]["images"] == len(own)
        assert result.per_class[label]["top1"] == (np.mean(own) if own else None)
        for predicted, other in enumerate(names):
            assert result.confusion[label][predicted] == [*zip(labels, answers)].count((name, other))
    probabilities = {str(answer.path): answer.probability for answer in classifier.predict(photos.pixels)}
    assert {mistake["path"] for mistake in result.mistakes} == {str(path) for path, ok in zip(photos.pixels, right) if not ok}
    for mistake in result.mistakes:
        assert mistake["label"] == Path(mistake["path"]).relative_to(photos.folder).parts[0] != mistake["prediction"]
        assert mistake["probability"] == pytest.approx(probabilities[mistake["path"]], abs=1e-6)
    assert result.class_names == names and not result.left_out and not result.unreadable
    assert result.warnings == ("It is not known which images the network was trained on, so some of these may be among them.",)


def test_images_that_the_run_was_trained_on_are_left_out(run_dir, photos, read_once):
    paths = [*photos.pixels]
    _write_record(run_dir, dict(zip(paths, ("train", "test", EARLIER, "validation", "train"))))
    # The same pixels in another file.
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("comment", "edited")
    Image.fromarray(photos.pixels[paths[4]]).save(paths[4], pnginfo=metadata)
    for network in (run_dir, run_dir / runs.MODEL):
        result = evaluate(load_run(network), photos.folder)
        assert result.left_out == {TRAINED_ON: 3}
        assert [row["images"] for row in result.per_class] == [1, 2, 0]
        assert result.warnings == ("1 of these images is a validation image, on which the run chose its best epoch.",)


def test_files_that_are_not_evaluated_are_counted(classifier, photos):
    (photos.folder / "apples" / "bad.png").write_text("hello")
    (photos.folder / "pears" / "link.png").symlink_to("/nowhere.png")
    (photos.folder / "readme.txt").write_text("hello")
    (photos.folder / ".hidden").mkdir()
    result = evaluate(classifier, photos.folder)
    assert result.left_out == {"outside the class folders": 1, "can't be read": 2}
    assert [path.rpartition("/")[2] for path, _ in result.unreadable] == ["bad.png", "link.png"]
    assert result.scores["images"] == 6


def test_class_names_match_in_any_unicode_form(classifier, photos, monkeypatch):
    monkeypatch.setattr(classifier, "class_names", (unicodedata.normalize("NFC", "pêches"), "pears", "plums"))
    (photos.folder / "apples").rename(photos.folder / unicodedata.normalize("NFD", "pêches"))
    assert [row["images"] for row in evaluate(classifier, photos.folder).per_class] == [3, 3, 0]


def test_other_folders_are_refused(classifier, photos, tmp_path):
    with pytest.raises(DataError, match="are not classes of the network: photos") as error:
        evaluate(classifier, tmp_path)
    assert error.value.hint == f"Use {photos.folder}"
    with pytest.raises(DataError, match="`folder` must be a folder"):
        evaluate(classifier, next(iter(photos.pixels)))
    (tmp_path / "nothing" / "apples").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has no image to evaluate on. Received: .*nothing \(it is empty\)"):
        evaluate(classifier, tmp_path / "nothing")


def test_nothing_is_left_to_evaluate(run_dir, photos, read_once):
    _write_record(run_dir, dict.fromkeys(photos.pixels, "train"))
    with pytest.raises(DataError, match=f"{TRAINED_ON}: 6"):
        evaluate(load_run(run_dir), photos.folder)


def test_the_loss_of_an_exported_file_is_finite(classifier, photos, monkeypatch):
    monkeypatch.setattr(classifier, "model", None)
    monkeypatch.setattr(classifier._network, "gives_probabilities", True)
    rows = np.tile(np.float32([0, 1, 0]), (6, 1))
    monkeypatch.setattr(type(classifier._network), "__call__", lambda network, batch: rows)
    scores = evaluate(classifier, photos.folder).scores
    assert scores["top1"] == 0.5 and scores["loss"] == pytest.approx(-np.log(1e-7) / 2, rel=1e-4)


def test_the_page_shows_results_and_what_was_left_out(classifier, photos, tmp_path):
    (photos.folder / "apples" / "<bad>.png").write_text("hello")
    [mistake, *_] = evaluate(classifier, photos.folder, tmp_path / "pages" / "page.html").mistakes
    text = (tmp_path / "pages" / "page.html").read_text()
    for part in (
        "fruit.keras",
        "1 file was left out",
        "&lt;bad&gt;.png",
        "plums",
        "It is not known which images",
        "rough estimate for 2 classes",
        mistake["path"],
    ):
        assert part in text, part
    assert text.count("data:image/png;base64,") == 3
    assert "<script" not in text


def test_progress_wraps_all_answers(classifier, photos):
    seen = []

    def progress(answers, n):
        seen.append(n)
        for answer in answers:
            yield answer
            seen.append(answer[0].path)

    evaluate(classifier, photos.folder, progress=progress)
    assert seen == [6, *photos.pixels]
