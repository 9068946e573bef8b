import dataclasses

import pytest
from small_sources import small_source, written

from cvt_keras import runs
from cvt_keras.data import verified
from cvt_keras.data.record import ImageRecord
from cvt_keras.errors import DataError
from cvt_keras.training import held_out

SOURCE = small_source("1a 2b 3a", "4b 5a", "6a 7b")


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run on the images of `SOURCE`."""
    folder = tmp_path / "x"
    folder.mkdir()
    runs.write_json(folder / "recipe.json", {"dataset": "folder"})
    ImageRecord.of_source(SOURCE).write(folder / "images.csv")
    return folder


def test_only_a_folder_of_images_has_a_record(run_dir):
    split = dataclasses.replace(SOURCE.train, digests=None)
    source = dataclasses.replace(SOURCE, train=split, validation=split, test=split)
    assert held_out.settle(source, weights=str(run_dir / "model.keras")) == (source, None, [])


def test_a_new_run_records_its_images(tmp_path):
    source, record, warnings = held_out.settle(SOURCE)
    assert (written(source), warnings) == (written(SOURCE), [])
    assert record == ImageRecord.of_source(SOURCE)


@pytest.mark.parametrize("weights", ["x/model.keras", "x"])
def test_a_run_from_weights_does_not_test_on_images_that_they_were_trained_on(run_dir, weights):
    new = small_source("6a 8a 9b", "1'a 4b", "2b 7b")  # 3 and 5 are missing
    source, record, warnings = held_out.settle(new, weights=str(run_dir.parent / weights))
    assert written(source) == ["1'a 2b 8a 9b", "4b", "6a 7b"]
    assert warnings == [f"images differ from those of {run_dir}: 2 missing, 2 new."]
    assert record.images["3"].split == "earlier"  # the weights were trained on it
    assert "5" not in record.images


def test_a_resumed_run_keeps_its_own_images(run_dir):
    more = small_source("8a 1a 2b 3a", "4b 5a", "6a 7b")
    source, record, warnings = held_out.settle(more, run_dir)
    assert written(source) == written(SOURCE)
    assert record == ImageRecord.of_source(SOURCE)
    assert warnings == [f"images differ from those of {run_dir}: 1 new. New ones are left out."]
    assert held_out.settle(SOURCE, run_dir)[2] == []


def test_the_own_record_comes_before_that_of_the_weights(run_dir, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    ImageRecord.of_source(small_source("1a 2b 3a 4b", "5a", "6a 7b")).write(own / "images.csv")
    source, _, _ = held_out.settle(SOURCE, own, str(run_dir / "model.keras"))
    assert written(source) == ["1a 2b 3a 4b", "5a", "6a 7b"]
    (own / "images.csv").unlink()  # as if killed before it was written
    assert written(held_out.settle(SOURCE, own, str(run_dir / "model.keras"))[0]) == written(SOURCE)


def test_a_run_from_weights_trained_on_unknown_images_gets_no_record(run_dir, tmp_path):
    (run_dir / "images.csv").unlink()
    weights = str(run_dir / "model.keras")
    warning = f"held-out images not verified: {run_dir} has no images.csv, so this run gets none either"
    assert held_out.settle(SOURCE, weights=weights) == (SOURCE, None, [warning])
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    runs.write_json(tuned / "recipe.json", {"dataset": "folder", "weights": weights})
    assert held_out.settle(SOURCE, tuned, weights) == (SOURCE, None, [warning])  # resumed
    record = ImageRecord.read(tuned / "images.csv")
    assert verified.settle(SOURCE, record, "images.csv").held_out == verified.NOT_VERIFIED  # its export says so
    _, record, [warning] = held_out.settle(SOURCE, weights=str(tuned / "model.keras"))  # a third run
    assert record is None and warning.startswith(f"held-out images not verified: {tuned} has no")


def test_through_a_run_on_another_data_set_the_weights_before_it_count(run_dir, tmp_path):
    middle = tmp_path / "middle"
    middle.mkdir()
    runs.write_json(middle / "recipe.json", {"dataset": "cifar10", "weights": str(run_dir / "model.keras")})
    moved = small_source("6a 2b 3a", "4b 5a", "1a 7b")
    assert written(held_out.settle(moved, weights=str(middle / "model.keras"))[0]) == written(SOURCE)
    runs.write_json(middle / "recipe.json", {"dataset": "cifar10"})
    assert held_out.settle(moved, weights=str(middle / "model.keras")) == (moved, ImageRecord.of_source(moved), [])


def test_a_link_to_weights_leads_to_their_run(run_dir, tmp_path):
    (run_dir / "model.keras").touch()
    (tmp_path / "best.keras").symlink_to(run_dir / "model.keras")
    moved = small_source("6a 2b 3a", "4b 5a", "1a 7b")
    assert written(held_out.settle(moved, weights=str(tmp_path / "best.keras"))[0]) == written(SOURCE)


def test_weights_that_were_copied_away_from_their_run_are_not_verified(tmp_path):
    weights = str(tmp_path / "copy.keras")
    warning = f"held-out images not verified: the training images of {weights} are not recorded, so this run gets no images.csv"
    assert held_out.settle(SOURCE, weights=weights, class_names=("a", "b")) == (SOURCE, None, [warning])
    assert held_out.settle(SOURCE, tmp_path, weights) == (SOURCE, None, [warning])  # resumed, and the file is gone
    assert held_out.settle(SOURCE, weights=weights, class_names=("a", "c"))[1] is None  # trained on one class of it
    for place in ("someone/fruits", str(tmp_path / "folder"), str(tmp_path / "cvt.pth")):  # a run may have been saved so
        assert held_out.settle(SOURCE, weights=place, class_names=("a", "b"))[1] is None
        for others in (("tench", "goldfish"), (), None):
            assert held_out.settle(SOURCE, weights=place, class_names=others)[1:] == (ImageRecord.of_source(SOURCE), [])
    assert held_out.settle(SOURCE, weights=None)[1:] == (ImageRecord.of_source(SOURCE), [])


def test_missing_weights_before_a_run_on_another_data_set_are_not_verified(tmp_path):
    middle = tmp_path / "middle"
    middle.mkdir()
    runs.write_json(middle / "recipe.json", {"dataset": "cifar10", "weights": str(tmp_path / "gone" / "model.keras")})
    settled = held_out.settle(SOURCE, weights=str(middle / "model.keras"), class_names=("airplane", "automobile"))
    assert settled[1] is None and "not verified" in settled[2][0]


def test_a_split_without_images_is_refused(run_dir):
    with pytest.raises(DataError) as error:
        held_out.settle(small_source("1a 2b", "4b", "3a"), run_dir)
    assert error.value.argument == "data_dir"
    assert "split test" in error.value.summary
