import pytest

from cvt_keras import runs


def test_json_comes_back(tmp_path):
    runs.write_json(tmp_path / "report.json", {"top1": 0.5, "test": None})
    assert runs.read_json(tmp_path / "report.json") == {"top1": 0.5, "test": None}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(RuntimeError), runs.whole(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())

    path.write_text("before")
    with pytest.raises(RuntimeError), runs.whole(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_vacant_folder_is_absent_or_empty(tmp_path):
    runs.require_vacant(tmp_path / "absent")
    runs.require_vacant(tmp_path)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=str(taken)):
            runs.require_vacant(taken)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with runs.whole_folder(tmp_path / "folder") as aside:
        (aside / "one").write_text("1")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "one").read_text() == "1"
    with pytest.raises(RuntimeError), runs.whole_folder(tmp_path / "other") as aside:
        (aside / "one").write_text("1")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_table_has_a_column_for_each_key(tmp_path):
    runs.write_csv(tmp_path / "history.csv", [{"epoch": 0, "loss": 0.5}, {"epoch": 1, "loss": 0.25}])
    assert (tmp_path / "history.csv").read_text().split() == ["epoch,loss", "0,0.5", "1,0.25"]
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]
