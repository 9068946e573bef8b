import html.parser
import re
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cvt_keras import runs
from cvt_keras.errors import MissingPackageError
from cvt_keras.report import figures, page

OLD_RUNS = Path(__file__).parent.parent / "golden" / "old_runs"
SPLIT = {
    **{"top1": 0.8125, "top5": None, "macro_f1": 0.7344, "balanced_accuracy": 0.7656, "loss": 0.5, "ece": 0.0625},
    "images": 1600,
}
REPORT = {
    "dataset": "folder",
    "data_note": "tested on <a tenth>",
    "variant": "cvt_cifar",
    "class_names": ["easy", "<script>hard</script>"],
    "recipe": {"epochs": 10, "peak_learning_rate": 0.0023},
    "epochs": 10,
    "train_images": 45_000,
    "parameters": 1_250_000,
    "macs": 54_900_000,
    "train_seconds": 600.0,
    "train_images_per_second": 222.0,
    "validation": {**SPLIT, "top1": 0.75},
    "test": SPLIT,
    "per_class": [
        {"name": "easy", "top1": 0.9, "precision": 0.8, "f1": 0.85, "images": 100},
        {"name": "<script>hard</script>", "top1": 0.2, "precision": None, "f1": 0.0, "images": 100},
    ],
    "device": "a CPU & its cores",
    "versions": {"keras": "3.15.1"},
}


class _Page(html.parser.HTMLParser):
    """The tags that are open, the links and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text, self.tags = [], [], "", set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_dir(tmp_path):
    runs.write_json(tmp_path / runs.REPORT, REPORT)
    runs.write_csv(tmp_path / runs.HISTORY, [{"epoch": 1, "val_accuracy": 0.5, "val_loss": 0.123456, "seconds": 61.23}])
    (tmp_path / runs.PLOTS).mkdir()
    Image.fromarray(np.zeros((4, 4, 3), "uint8")).save(tmp_path / runs.PLOTS / "curves.png")
    return tmp_path


def _written(run_dir):
    page.write(run_dir)
    read = _Page((run_dir / runs.PAGE).read_text())
    assert not read.open
    return read


def test_the_page_is_one_file_with_the_numbers_of_the_run(run_dir):
    read = _written(run_dir)
    assert [source.partition(",")[0] for source in read.sources] == ["data:image/png;base64"]
    for part in (
        *("cvt_cifar on folder", "a CPU & its cores", "81.2%", "75.0%", "6.2%", "1.25 M", "54.9 M", "10.0 min", "222", "1,600"),
        *("73.4%", "76.6%", "0.1235", "61.2", "0.0023", "3.15.1", "n/a"),
    ):
        assert part in read.text, part


def test_class_names_are_escaped(run_dir):
    read = _written(run_dir)
    assert "script" not in read.tags
    assert "<script>hard</script>" in read.text and "tested on <a tenth>" in read.text


@pytest.mark.parametrize("name", ["plain", "qat"])
def test_a_run_of_version_0_1_has_a_page(name, tmp_path):
    with tarfile.open(OLD_RUNS / f"{name}.tar.xz") as archive:
        for file in (runs.REPORT, runs.HISTORY):
            archive.extract(f"{name}/{file}", tmp_path, filter="data")
    report = runs.read_json(tmp_path / name / runs.REPORT)
    assert "macro_f1" not in report["test"]
    assert (tmp_path / name / runs.HISTORY).read_text().splitlines()[1].startswith("0,")
    text = _written(tmp_path / name).text
    assert "macro-F1" in text and f"{report['test']['top1']:.1%}" in text
    epochs = (tmp_path / name / runs.PAGE).read_text().partition("History, a row per epoch")[2].partition("</details>")[0]
    assert re.findall(r"<tr><td>(\d+)</td>", epochs) == [f"{epoch}" for epoch in range(1, report["epochs"] + 1)]
    assert ("int8 rounding" in text) == (name == "qat")


def test_the_hardest_class_comes_first(run_dir):
    text = _written(run_dir).text
    assert text.index("hard</script>") < text.index("easy")


def test_a_run_without_a_test_shows_validation(run_dir):
    runs.write_json(run_dir / runs.REPORT, {**REPORT, "test": None, "per_class": None, "data_note": ""})
    text = _written(run_dir).text
    assert "top-1, validation" in text and "test" not in text.replace("tested", "")


def _text_with(run_dir, **changes):
    """The text of the page of a report with some fields changed, with single spaces."""
    runs.write_json(run_dir / runs.REPORT, {**REPORT, **changes})
    return " ".join(_written(run_dir).text.split())


def test_warnings_come_before_the_numbers_and_unused_files_after_them(run_dir):
    text = _text_with(run_dir)
    assert "Warnings" not in text and "not used" not in text
    text = _text_with(run_dir, data_warnings=["<b> rules"], left_out={"not an image": 1200, "broken": 1})
    assert text.index("Warnings <b> rules") < text.index("top-1, test") < text.index("1,201 files were not used")
    assert "1,201 files were not used reasonfiles not an image1,200 broken1" in text
    text = _text_with(run_dir, left_out={"broken": 1})
    assert "Warnings" not in text and "1 file was not used" in text


def _rows(run_dir, **changes):
    """The cells of the table of classes, its heads first."""
    runs.write_json(run_dir / runs.REPORT, {**REPORT, **changes})
    page.write(run_dir)
    table = (run_dir / runs.PAGE).read_text().partition('class="wide classes"')[2].partition("</table>")[0]
    rows = re.findall("<tr>.*?</tr>", table)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]


def test_classes_show_their_training_images_and_weights(run_dir):
    heads, hard, easy = _rows(run_dir)
    assert heads == ["class", "top-1 (recall)", "95% interval", "precision", "F1", "test images"]
    assert hard[1:] == ["20.0%", "13.3% to 28.9%", "n/a", "0.0%", "100"]
    counts = {"train_images_per_class": [44_000, 1000], "class_weights": {"easy": 0.5114, "<script>hard</script>": 22.5}}
    heads, hard, easy = _rows(run_dir, **counts)
    assert heads[-2:] == ["training images", "weight in the loss"]
    assert (hard[-2:], easy[-2:]) == (["1,000", "22.5"], ["44,000", "0.511"])
    assert _rows(run_dir, **counts, test=None, per_class=None) == [
        ["class", "training images", "weight in the loss"],
        ["easy", "44,000", "0.511"],
        ["&lt;script&gt;hard&lt;/script&gt;", "1,000", "22.5"],
    ]


def test_a_class_without_test_images_says_so_and_comes_last(run_dir):
    empty = {"name": "easy", "top1": None, "precision": None, "f1": None, "images": 0}
    _, _, easy = _rows(run_dir, per_class=[empty, REPORT["per_class"][1]])
    assert easy == ["easy", "no test images", "n/a", "n/a", "n/a", "0"]


def test_top1_has_an_interval_also_in_a_report_of_an_older_version(run_dir):
    text = _text_with(run_dir)
    assert "top1_interval" not in REPORT["test"]
    assert "81.2%79.3% to 83.1%" in text.replace(" 79", "79") and "72.8% to 77.1%" in text


def test_a_note_counts_the_classes_with_few_test_images(run_dir):
    assert "rough estimate" not in _text_with(run_dir)
    easy, hard = REPORT["per_class"]
    empty = {**easy, "name": "empty", "top1": None, "images": 0}
    classes = {"class_names": ["easy", "hard", "empty"]}
    text = _text_with(run_dir, **classes, per_class=[{**easy, "images": 29}, {**hard, "images": 30}, empty])
    assert "Top-1 is a rough estimate for 1 class with fewer than 30 images" in text
    text = _text_with(run_dir, **classes, per_class=[{**easy, "images": 29}, {**hard, "images": 1}, empty])
    assert "for 2 classes with" in text


def test_the_page_names_early_stopping(run_dir):
    assert "stopped" not in _text_with(run_dir, epochs_trained=10)
    recipe = {**REPORT["recipe"], "early_stopping": 5}
    text = _text_with(run_dir, recipe=recipe, epochs=40, epochs_trained=12, kept_epoch=7)
    assert "12 of 40 epochs" in text and "Training stopped after 12 of 40 epochs: no improvement in 5 epochs." in text
    assert "The weights are those of epoch 7" in text
    assert "Training stopped after 9 of 10 epochs. The weights" in _text_with(run_dir, epochs_trained=9, kept_epoch=7)


def test_the_page_names_the_kept_epoch_of_an_older_run_only_if_it_is_certain(run_dir):
    scores = [(0.5, 0.9), (0.7, 0.8), (0.7, 0.6), (0.8, 0.7)]
    rows = [{"epoch": epoch, "val_accuracy": a, "val_loss": loss} for epoch, (a, loss) in enumerate(scores, start=1)]
    runs.write_csv(run_dir / runs.HISTORY, rows)
    assert "The weights are those of epoch 4" in _text_with(run_dir)
    runs.write_csv(run_dir / runs.HISTORY, rows[:3])  # version 0.1 kept the earliest of equals
    assert "The ring marks the epoch whose weights were kept." in _text_with(run_dir)
    runs.write_csv(run_dir / runs.HISTORY, rows)  # pruning keeps none of its first epochs
    recipe = {"compression": {"method": "qat"}}
    assert "The ring marks the epoch whose weights were kept." in _text_with(run_dir, recipe=recipe)
    assert "The weights are those of epoch 3" in _text_with(run_dir, recipe=recipe, kept_epoch=3)


def test_the_page_says_that_the_test_split_was_not_evaluated(run_dir):
    without = {"test": None, "per_class": None, "test_images": 1600}
    assert "The 1,600 test images were not evaluated." in _text_with(run_dir, **without)
    assert "not evaluated" not in _text_with(run_dir, test_images=1600)


def test_numbered_figures_have_a_legend(run_dir):
    assert "legend" not in _tags(run_dir)
    pixels, text = Image.new("RGB", (4, 4)), PngInfo()
    pixels.save(run_dir / runs.PLOTS / figures.MOST_WRONG)
    text.add_itxt(figures.CLASS_NAMES, "1: easy")
    pixels.save(run_dir / runs.PLOTS / figures.CONFUSION, pnginfo=text)
    names = "<li><bdi>easy</bdi></li>\n<li><bdi>&lt;script&gt;hard&lt;/script&gt;</bdi></li>"
    assert _tags(run_dir).count(names) == 1
    pixels.save(run_dir / runs.PLOTS / figures.MOST_WRONG, pnginfo=text)
    assert _tags(run_dir).count(names) == 2
    heads, hard, easy = _rows(run_dir)
    assert (heads[1], hard[1], easy[1]) == ("number", "2", "1")


def _tags(run_dir):
    """The page without its style sheet."""
    page.write(run_dir)
    return (run_dir / runs.PAGE).read_text().partition("</style>")[2]


def test_exports_say_whether_the_held_out_images_were_verified(run_dir):
    artifact = {
        **{"name": "int8", "bytes": 1_400_000, "top1": 0.8, "agreement": 0.98, "max_abs_diff": 0.03125, "milliseconds": 2.5},
        **{"images": 1000, "runtime": "LiteRT 2", "passed": True, "broken": []},
    }
    (run_dir / runs.EXPORT).mkdir()

    def text(**fields):
        runs.write_json(run_dir / runs.EXPORT / runs.REPORT, {"artifacts": [artifact], **fields})
        return _text_with(run_dir)

    assert "held-out" not in text().lower()
    assert "The held-out images are verified" in text(held_out="verified")
    page = text(held_out="held-out images not verified", held_out_note="2 images are <new>.")
    assert "Held-out images not verified. 2 images are <new>." in page


def test_exports_are_on_the_page_if_there_are_any(run_dir):
    assert "Exports" not in _written(run_dir).text
    artifact = {
        **{"name": "int8", "bytes": 1_400_000, "top1": 0.8, "agreement": 0.98, "max_abs_diff": 0.03125, "milliseconds": 2.5},
        **{"images": 1000, "runtime": "LiteRT 2", "passed": True, "broken": []},
    }
    (run_dir / runs.EXPORT).mkdir()
    runs.write_json(
        run_dir / runs.EXPORT / runs.REPORT,
        {"artifacts": [{**artifact, "opset": 15}, {**artifact, "name": "float16", "passed": False, "broken": ["top1_drop"]}]},
    )
    text = _written(run_dir).text
    for part in ("Exports", "int8", "1.40", "98.00%", "0.031", "2.5", "LiteRT 2, opset 15", "passed", "FAILED: top1_drop"):
        assert part in text, part


def test_a_compressed_run_says_how(run_dir):
    page.write(run_dir)
    assert "are zero" not in _Page((run_dir / runs.PAGE).read_text()).text
    pruned = {"method": "prune", "sparsity": 0.7, "pattern": "2:4", "layers": []}
    settings = {"method": "cluster", "clusters": 16, "keep_zeros": True, "layers": ["<b>"], "after": pruned}
    report = {**REPORT, "recipe": {**REPORT["recipe"], "compression": settings}, "compression": {"sparsity": 0.705}}
    runs.write_json(run_dir / runs.REPORT, report)
    page.write(run_dir)
    steps = 'Pruned (sparsity 0.7, pattern "2:4"), then clustered (clusters 16, keep zeros true, layers ["<b>"]).'
    zeros = "70.5% of the weights in the compressed kernels are zero."
    assert f"{steps} {zeros}" in _Page((run_dir / runs.PAGE).read_text()).text
    report["recipe"] = {**REPORT["recipe"], "compression": {"method": "qat", "keep_zeros": False}}
    runs.write_json(run_dir / runs.REPORT, report)
    page.write(run_dir)
    text = _Page((run_dir / runs.PAGE).read_text()).text
    assert "Trained with int8 rounding." in text and "are zero" not in text
    report["recipe"]["compression"]["after"] = pruned
    runs.write_json(run_dir / runs.REPORT, report)
    page.write(run_dir)
    assert "70.5% of the weights in all kernels are zero." in _Page((run_dir / runs.PAGE).read_text()).text


def test_without_jinja2_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackageError) as error:
        runpy.run_path(page.__file__)
    assert error.value.hint == "Install it: pip install Jinja2" and "pip" not in error.value.summary


def test_a_template_whose_variable_is_missing_writes_no_page(tmp_path):
    (tmp_path / "own.html").write_text('{% extends "base.html" %}{% block content %}{{ missing }}{% endblock %}')
    with pytest.raises(page.jinja2.UndefinedError, match="missing"):
        page.render(tmp_path / "own.html", tmp_path / "page.html", title="own")
    page.render(tmp_path / "own.html", tmp_path / "page.html", title="own", missing="<b>")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["own.html", "page.html"]
    assert "&lt;b&gt;" in (tmp_path / "page.html").read_text()


def test_the_page_says_on_what_the_run_was_trained(run_dir):
    assert "a CPU & its cores" in _written(run_dir).text
    runs.write_json(run_dir / runs.REPORT, {**REPORT, "backend": "jax", "devices": 4})
    assert "4 devices: a CPU & its cores, JAX" in _written(run_dir).text
