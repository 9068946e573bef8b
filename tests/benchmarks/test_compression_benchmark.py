import gzip
import shutil

import numpy as np
import pytest
from PIL import Image

from benchmarks import compression
from cvt_keras import build_classifier, runs
from cvt_keras.export import tflite
from cvt_keras.report import figures


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """Two exported runs. One file of each failed its check."""
    classifier = build_classifier("cvt_tiny", 2, (32, 32, 3))
    run_dirs = []
    for name, top1 in (("ten", 0.84), ("pruned", 0.835)):
        run_dir = tmp_path_factory.mktemp("runs") / name
        (run_dir / "export" / "tflite").mkdir(parents=True)
        runs.write_json(run_dir / "recipe.json", {"compression": {"method": "prune"}} if name == "pruned" else {})
        rows = []
        for kind in ("float32", "dynamic_int8"):
            path = f"export/tflite/{kind}.tflite"
            (run_dir / path).write_bytes(tflite.convert(classifier, ["a", "b"], kind))
            rows.append({"name": kind, "path": path, "top1": top1, "images": 100, "passed": True})
        rows.append({"name": "int8", "path": "export/tflite/int8.tflite", "top1": 0.1, "images": 100, "passed": False})
        rows.append({"name": "saved_model", "path": "export/saved_model/1", "top1": top1, "images": 100, "passed": True})
        runs.write_json(run_dir / "export" / "report.json", {"artifacts": rows, "dataset": "cifar10"})
        run_dirs.append(run_dir)
    return run_dirs


def test_the_files_that_passed_are_measured(run_dirs):
    rows = compression.files(run_dirs)
    assert [(row["run"], row["file"], row["top1"]) for row in rows] == [
        ("ten", "float32", 0.84),
        ("ten", "dynamic_int8", 0.84),
        ("pruned", "float32", 0.835),
        ("pruned", "dynamic_int8", 0.835),
    ]
    for row in rows:
        assert row["bytes"] == row["path"].stat().st_size > row["gzip"] == len(gzip.compress(row["path"].read_bytes(), 9))


def test_a_row_for_each_file_and_a_plot(run_dirs, tmp_path, capsys):
    compression.main([*map(str, run_dirs), "--times", "2", "--turns", "2", "--plot", str(tmp_path / "trade.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("skipped")]
    assert "ai-edge-litert 2." in lines[0] and "tensorflow-model-optimization 0.8.1" in lines[0]
    assert "the median of 2 turns, each the median of 2 runs" in lines[1]
    assert lines[2] == "top-1 on 100 images of cifar10, by LiteRT."
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    assert rows[0][:4] == ["ten", "`float32`", "84.00%", "+0.00"]
    assert rows[3][:4] == ["pruned", "`dynamic_int8`", "83.50%", "-0.50"]
    assert rows[0][6] == "100.0%" and float(rows[1][6].rstrip("%")) < 100
    assert all(float(row[7].split(" ± ")[0]) > 0 for row in rows)
    assert (tmp_path / "trade.png").exists()


def test_a_folder_without_a_run_is_refused(run_dirs, tmp_path):
    with pytest.raises(SystemExit, match=r"compression: `run_dir` must be a run folder"):
        compression.main([str(run_dirs[0]), str(tmp_path)])


def test_skipped_files_are_printed(run_dirs, capsys):
    compression.files(run_dirs)
    assert "skipped, as it failed the export's check: pruned int8, 10.00% top-1" in capsys.readouterr().out


def test_the_first_run_must_not_be_compressed_and_have_a_float32_file(run_dirs, tmp_path):
    with pytest.raises(SystemExit, match=r"the first run must not be compressed.*pruned"):
        compression.main([str(run_dirs[1])])
    shutil.copytree(run_dirs[0], tmp_path / "ten")
    path = tmp_path / "ten" / "export" / "report.json"
    report = runs.read_json(path)
    del report["artifacts"][0]
    runs.write_json(path, report)
    with pytest.raises(SystemExit, match=r"ten has no float32\.tflite to compare with\. Export it first: cvt-keras export"):
        compression.main([str(tmp_path / "ten")])


def test_a_run_that_is_not_exported_is_refused(tmp_path):
    runs.write_json(tmp_path / "recipe.json", {})
    with pytest.raises(SystemExit, match=r"is not exported\. Export it first: cvt-keras export"):
        compression.main([str(tmp_path)])


def test_times_are_medians_over_all_turns(run_dirs, monkeypatch):
    rows = compression.files(run_dirs)[:1]
    clock = iter(np.cumsum([0, 0.001, 0, 0.002, 0, 0.006]).tolist())
    monkeypatch.setattr(compression, "WARM_UP", 0)
    monkeypatch.setattr(compression.time, "perf_counter", lambda: next(clock))
    compression.time_files(rows, times=1, turns=3)
    assert rows[0]["milliseconds"] == pytest.approx(2)
    assert rows[0]["deviation"] == pytest.approx(np.std([1, 2, 6]))


@pytest.mark.parametrize("change", [{"dataset": "digits"}, {"images": 50}])
def test_runs_that_were_checked_on_other_images_are_not_compared(run_dirs, tmp_path, change):
    shutil.copytree(run_dirs[1], tmp_path / "other")
    path = tmp_path / "other" / "export" / "report.json"
    report = runs.read_json(path)
    report["dataset"] = change.get("dataset", "cifar10")
    for row in report["artifacts"]:
        row |= {"images": change.get("images", 100)}
    runs.write_json(path, report)
    with pytest.raises(SystemExit, match=r"was checked on .*Export both with the same --verify-images"):
        compression.main([str(run_dirs[0]), str(tmp_path / "other")])


FILES = [
    {"run": "ten", "file": "float32", "top1": 0.84, "gzip": 4_000_000},
    {"run": "ten", "file": "int8", "top1": 0.84, "gzip": 1_000_000},
    {"run": "pruned", "file": "int8", "top1": 0.83, "gzip": 500_000},
    {"run": "clustered", "file": "int8", "top1": 0.82, "gzip": 600_000},
]


def test_the_pareto_front():
    assert compression.pareto(FILES) == FILES[1:3]
    assert compression.pareto([FILES[0], dict(FILES[0])]) == [FILES[0]] * 2


def test_the_plot_shows_each_file_and_the_front():
    figure = compression.trade(FILES)
    [axes] = figure.axes
    front, *points = axes.lines
    assert (list(front.get_xdata()), list(front.get_ydata())) == ([0.5, 1.0], [0.83, 0.84])
    assert [(point.get_xdata()[0], point.get_ydata()[0]) for point in points] == [
        (file["gzip"] / 1e6, file["top1"]) for file in FILES
    ]
    assert len({point.get_color() for point in points}) == len({file["run"] for file in FILES})
    assert [text.get_text() for text in axes.get_legend().get_texts()][1:] == ["float32", "int8"]
    [runs] = figure.legends
    assert [text.get_text() for text in runs.get_texts()] == list(dict.fromkeys(file["run"] for file in FILES))
    assert not axes.texts


def test_a_file_far_below_the_best_is_drawn_on_the_edge():
    [axes] = compression.trade([*FILES, {"run": "lost", "file": "int8", "top1": 0.2, "gzip": 100_000}]).axes
    assert axes.get_ylim()[0] == pytest.approx(0.84 - compression.MOST_POINTS)
    assert [text.get_text() for text in axes.texts] == ["20.0%"]


def test_the_plot_is_saved(tmp_path):
    figures.save(compression.trade(FILES), tmp_path / "trade.png")
    assert np.asarray(Image.open(tmp_path / "trade.png")).std() > 1
    assert [path.name for path in tmp_path.iterdir()] == ["trade.png"]
