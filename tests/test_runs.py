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
