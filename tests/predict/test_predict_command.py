"""The command `cvt-keras predict`."""

import csv
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cvt_keras import cli, terminal
from cvt_keras.predict import __main__ as command
from cvt_keras.predict import evaluation
from cvt_keras.report import figures


@pytest.fixture(autouse=True)
def loaded_once(classifier, monkeypatch):
    """Loads the classifier once for all tests, and starts no process to filter TensorFlow's greetings."""
    monkeypatch.setattr(command, "load_run", lambda run: classifier)
    monkeypatch.setattr(command.environment, "start", lambda *backends: None)


@pytest.fixture
def main(keras_file, capsys):
    """Runs the command. Returns its exit code, and the lines of stdout and stderr."""

    def run(*arguments):
        code = cli.main(["predict", str(keras_file), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_a_folder_is_answered_in_an_aligned_table(main, photos, classifier):
    code, lines, errors = main(photos.folder, "--top", "2")
    assert code == 0 and not errors
    expected = classifier.predict(photos.pixels, top=2)
    assert [line.split() for line in lines] == [
        [
            str(answer.path),
            *(field for label, value in answer.top for field in (label, f"{value:.1%}")),
            *(["unsure"] if answer.unsure else []),
        ]
        for answer in expected
    ]
    assert {answer.unsure for answer in expected} == {False, True}
    # So the columns are aligned, as the last has a fixed width.
    assert len({len(line.removesuffix("  unsure")) for line in lines}) == 1


def test_one_class_is_printed_by_default(main, photos, classifier):
    [path, *_] = photos.pixels
    [answer] = classifier.predict(path)
    _, [line], _ = main(path)
    assert line.removesuffix("  unsure").split() == [str(path), answer.label, f"{answer.probability:.1%}"]


def test_json_has_an_object_per_line(main, photos, classifier):
    _, lines, _ = main("--json", photos.folder, "--top", "2")
    for line, answer in zip(lines, classifier.predict(photos.pixels, top=2), strict=True):
        assert json.loads(line) == {
            "path": str(answer.path),
            "label": answer.label,
            "probability": round(answer.probability, 6),
            "unsure": answer.unsure,
            "top": [{"label": label, "probability": round(value, 6)} for label, value in answer.top],
        }


def test_csv_has_a_header_and_a_column_per_class(main, photos, classifier):
    _, lines, _ = main(photos.folder, "--csv", "--top", "9")
    rows = [*csv.DictReader(lines)]
    assert [*rows[0]] == ["path", "unsure", "label", "probability", "label_2", "probability_2", "label_3", "probability_3"]
    for row, answer in zip(rows, classifier.predict(photos.pixels, top=3), strict=True):
        assert (row["path"], row["label"], row["label_3"]) == (str(answer.path), answer.label, answer.top[2][0])
        assert row["unsure"] == ("yes" if answer.unsure else "no")
        assert float(row["probability_3"]) == pytest.approx(answer.top[2][1], rel=1e-5)


def test_bad_files_are_named_and_the_others_answered(main, photos):
    (photos.folder / "apples" / "bad\nname.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (photos.folder / "pears" / "notes.txt").write_text("hello")
    (photos.folder / "link.png").symlink_to("/nowhere.png")
    code, lines, errors = main(photos.folder, "--json")
    assert code == 1
    assert [json.loads(line)["path"] for line in lines] == [str(path) for path in sorted(photos.pixels)]
    assert [line.rsplit("/", 1)[1].partition(": ")[::2] for line in errors] == [
        (r"bad\nname.png", "the image is broken: its header can't be read"),
        ("link.png", "a dangling link"),
        ("notes.txt", "not a JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF"),
    ]
    assert all(line.startswith(f"cvt-keras predict: {photos.folder}/") for line in errors)


def test_paths_come_from_standard_input_and_globs(main, photos, monkeypatch):
    paths = [*photos.pixels]
    listed = b"\n".join(map(os.fsencode, [paths[2], "missing.png", paths[0]])) + b"\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(listed)))
    code, lines, errors = main("-", f"{photos.folder}/**/[34].png", "--json")
    assert code == 1
    assert [json.loads(line)["path"] for line in lines] == [str(paths[i]) for i in (2, 0, 3, 4)]
    assert errors == ["cvt-keras predict: missing.png: can't be read: No such file or directory"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "`images` must be files or folders of images. Received: none"),
        (["nowhere.png"], "Received: nowhere.png, which does not exist"),
        (["*.nothing"], "Received: *.nothing, which matches no file"),
        (["a.png", "--top", "0"], "`top` must be at least 1. Received: top=0 (--top)"),
        (["a.png", "--json", "--csv"], "`csv` can't be combined with `json`"),
        (["a.png", "--evaluate", "b"], "`evaluate` takes no images beside its folder. Received: a.png"),
        (["a.png", "--page", "b.html"], "`page` needs `evaluate`. Received: page=b.html"),
        (["--evaluate", "b", "--top", "2"], "`top` can't be combined with `evaluate`. Received: top=2"),
        (["--evaluate", "nowhere"], "`evaluate` must be a folder. Received: evaluate=nowhere"),
        (["a.png", "--explain", "out.jpg"], "`explain` must be a .png file. Received: explain=out.jpg"),
        (["--evaluate", ".", "--page", "."], "`page` must be a file. Received: ., which is a folder"),
    ],
)
def test_wrong_arguments_end_with_2(arguments, message, main):
    code, lines, [error] = main(*arguments)
    assert code == 2 and not lines and message in error


def test_an_empty_folder_and_a_missing_run(main, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, _, [error] = main(tmp_path / "empty")
    assert code == 2 and error.endswith(f"Received: {tmp_path / 'empty'}, an empty folder")
    assert cli.main(["predict", str(tmp_path / "nowhere"), str(tmp_path)]) == 2
    assert "nowhere, which does not exist" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_for_many_images_whose_lines_go_to_a_file(main, photos, monkeypatch, tmp_path):
    for n, to_file, shown in ((1, True, True), (1, False, False), (9, True, False)):
        monkeypatch.setattr(command, "_MIN_IMAGES_FOR_PROGRESS", n)
        monkeypatch.setattr(terminal, "is_file", lambda stream, to_file=to_file: to_file)
        monkeypatch.setattr(sys, "stderr", screen := _Terminal())
        assert main(photos.folder)[0] == 0
        assert ("0/6" in screen.getvalue()) is shown
    monkeypatch.setattr(command, "_MIN_IMAGES_FOR_PROGRESS", 1)
    monkeypatch.setattr(sys, "stderr", piped := io.StringIO())
    main(photos.folder)
    assert not piped.getvalue()


def test_a_reader_that_closes_early_ends_the_command(main, photos, monkeypatch):
    def closed(*arguments):
        raise BrokenPipeError

    discarded = []
    monkeypatch.setattr(command, "_classify", closed)
    monkeypatch.setattr(terminal, "discard_output", lambda: discarded.append(True))
    assert main(photos.folder) == (1, [], []) and discarded


@pytest.fixture
def pages(monkeypatch):
    """The paths of the pages to write. Draws nothing."""
    pages = []
    monkeypatch.setattr(evaluation, "_write_page", lambda page, *results: pages.append(page))
    return pages


def test_evaluation_prints_accuracy_and_writes_a_page(main, photos, tmp_path, pages, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, lines, errors = main("--evaluate", photos.folder)
    assert code == 0 and pages == [Path("evaluation/photos-fruit.html")]
    assert lines[-1] == "the page is evaluation/photos-fruit.html"
    assert re.fullmatch(r"[\d.]+% top-1 \(95% interval: [\d.]+% to [\d.]+%\) on 6 images", lines[-2])
    assert lines[2] == "no images of plums"
    assert len(errors) == 1 and errors[0].startswith("cvt-keras predict: It is not known which images")

    (photos.folder / "pears" / "bad.png").write_text("hello")
    code, [line], errors = main("--evaluate", photos.folder, "--json", "--page", tmp_path / "page.html")
    result = json.loads(line)
    assert code == 1 and errors[0].endswith("bad.png: not a JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF")
    assert result["page"] == str(tmp_path / "page.html") and pages[-1] == tmp_path / "page.html"
    assert result["scores"]["images"] == 6 and result["left_out"] == {"can't be read": 1}
    _, rows, errors = main("--evaluate", photos.folder, "--csv")
    assert errors[-1].endswith("on 6 images")
    assert len(pages) == 2  # none for --csv
    apples, pears, plums = csv.DictReader(rows)
    assert [row["name"] for row in (apples, pears, plums)] == ["apples", "pears", "plums"]
    assert float(apples["top1_low"]) < float(apples["top1_high"]) and plums["top1_high"] == ""


def test_the_page_of_a_run_lies_in_its_folder(main, photos, run_dir, classifier, pages, monkeypatch):
    monkeypatch.setattr(classifier, "run_dir", run_dir)
    names = {
        "": "photos",
        "model.keras": "photos",
        "export/tflite/int8.tflite": "photos-int8",
        "export/saved_model/1": "photos-1",
    }
    for file, name in names.items():
        monkeypatch.setattr(classifier, "path", run_dir / file)
        _, lines, _ = main("--evaluate", photos.folder)
        assert lines[-1] == f"the page is {run_dir}/evaluation/{name}.html"
        assert pages[-1] == run_dir / "evaluation" / f"{name}.html"
    monkeypatch.chdir(run_dir.parent)
    for attribute in ("path", "run_dir"):
        monkeypatch.setattr(classifier, attribute, Path(run_dir.name))
    main("--evaluate", photos.folder)
    assert pages[-1] == Path(run_dir.name) / "evaluation" / "photos.html"


def test_a_folder_that_can_not_be_evaluated(main, photos, capsys):
    shutil.move(photos.folder / "pears", photos.folder / "bananas")
    code, _, [error] = main("--evaluate", photos.folder)
    assert code == 1 and "folders that are not classes of the network: bananas. Its classes are apples, pears, plums" in error


def test_explain_draws_the_most_probable_classes(main, photos, tmp_path, monkeypatch):
    drawn = []
    explanation = figures.explanation
    monkeypatch.setattr(figures, "explanation", lambda *arguments: drawn.append(arguments) or explanation(*arguments))
    [path, *_] = photos.pixels
    out = tmp_path / "new" / "out.png"
    code, [line], errors = main(path, "--explain", out)
    assert code == 0 and len(line.removesuffix("  unsure").split()) == 3
    assert errors[-1] == f"the picture is {out}"
    assert Image.open(out).size[0] > 100
    [(image, maps, classes, probabilities, _)] = drawn
    assert image.shape == (16, 24, 3) and len(maps) == len(classes) == 3
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)
    main(path, "--explain", out, "--top", "2")
    assert len(drawn[1][2]) == 2


def test_explain_needs_a_network_without_rounding_and_a_path_for_its_picture(main, photos, tmp_path, monkeypatch):
    [path, *_] = photos.pixels
    (tmp_path / "folder.png").mkdir()
    code, lines, [error] = main(path, "--explain", tmp_path / "folder.png")
    assert code == 2 and not lines and "`explain` must be a file" in error
    monkeypatch.setattr("cvt_keras.quantized.model.quantized_cvt_of", lambda model: model)
    code, lines, [error] = main(path, "--explain", tmp_path / "out.png")
    assert code == 2 and not lines and "needs a network without int8 rounding" in error


def test_explain_needs_one_image_and_a_keras_model(photos, tmp_path, capsys):
    (tmp_path / "a.tflite").touch()
    [path, *_] = photos.pixels
    for words, message in (
        (["a.keras", str(photos.folder), "--explain", "x.png"], "`explain` needs one image. Received: 6 images"),
        (["a.tflite", str(path), "--explain", "x.png"], "`explain` needs a Keras model"),
        (["a.keras", "--evaluate", ".", "--explain", "x.png"], "`explain` can't be combined with `evaluate`"),
    ):
        (tmp_path / words[0]).touch()
        assert cli.main(["predict", str(tmp_path / words[0]), *words[1:]]) == 2
        assert message in capsys.readouterr().err
