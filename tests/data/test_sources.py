import ast
import dataclasses
import http.server
import json
import os
import shutil
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from cvt_keras.data import sources
from cvt_keras.errors import DataError

CREATE_CONNECTION = socket.create_connection
TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


@pytest.fixture(autouse=True)
def reached(monkeypatch):
    """No network; the list of the addresses that were tried."""
    addresses = []

    def refuse(address, timeout, *more):
        assert timeout <= 5
        addresses.append(address)
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return addresses


def error_of(*arguments, **keywords):
    """What `load` says, which is one line, within seconds."""
    started = time.monotonic()
    with pytest.raises(DataError) as error:
        sources.load(*arguments, **keywords)
    assert time.monotonic() - started < 20
    message = str(error.value)
    assert "\n" not in message
    assert "{{" not in message
    assert "[Op:" not in message
    return message


def sizes(source):
    return [len(split) for split in (source.train, source.validation, source.test)]


def noise(n, shape=(32, 32, 3)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), "uint8")


def labelled(images, num_classes=10, **features):
    return [{"image": image, "label": i % num_classes, **features} for i, image in enumerate(images)]


def rows(*splits):
    return np.concatenate([split.images.reshape(len(split), -1) for split in splits])


def same_rows(a, b):
    """Whether the same rows lie in both, in any order, and each once."""
    kept = np.unique(a, axis=0)
    return len(kept) == len(a) and np.array_equal(kept, np.unique(b, axis=0))


def resized(image, size):
    return np.round(tf.image.resize(image, (size, size), antialias=True).numpy()).astype("uint8")


# === Names ===


@pytest.mark.parametrize(
    "name", ["auto", "cifar10", "cifar100", "folder", "digits", "tfds:imagenette/160px-v2", "tfds:mnist:3.0.1"]
)
def test_a_name_passes(name):
    sources.check_name(name)


@pytest.mark.parametrize("name", ["cifar1O", "tfds:", "mnist", "", None])
def test_an_unknown_name_is_quoted_beside_the_choices(name):
    for call in (sources.check_name, sources.load):
        with pytest.raises(ValueError, match=r"`dataset` must be one of .*cifar100.*tfds:NAME.*dataset=") as error:
            call(name)
        assert repr(name) in str(error.value)


def test_the_module_itself_needs_numpy_alone():
    top = ast.parse(Path(sources.__file__).read_text()).body
    imported = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in top if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in imported} <= {"numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("dataset", "module", "packages"),
    [
        ("cifar10", "tensorflow_datasets", "tensorflow-datasets importlib_resources"),
        ("tfds:mnist", "tensorflow_datasets", "tensorflow-datasets importlib_resources"),
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("digits", "tensorflow", "tensorflow"),
    ],
)
def test_a_missing_package_is_named(dataset, module, packages, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # what Python does with it: every import fails
    assert f"pip install {packages}" in error_of(dataset)


# === CIFAR ===


def test_splits_are_disjoint_and_fixed(cifar10_dir):
    source = sources.cifar10(cifar10_dir)
    again = sources.load("cifar10", str(cifar10_dir))
    assert sizes(source) == [256, 5_000, 256]
    assert source.train.images.dtype == np.uint8
    assert source.train.images.shape == (256, 32, 32, 3)
    for ours, theirs in zip((source.train, source.validation), (again.train, again.validation)):
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert len(np.unique(rows(source.train, source.validation), axis=0)) == 5_256
    assert (source.name, source.note, source.fallback, source.mirror) == ("cifar10", "", "", True)
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    assert (source.mean, source.std) == (sources.CIFAR10_MEAN, sources.CIFAR10_STD)


def test_limit_takes_the_first(cifar10_dir):
    split = sources.cifar10(cifar10_dir).test
    np.testing.assert_array_equal(split.limit(7).images, split.images[:7])
    assert len(split.limit(7)) == 7
    assert len(split.limit(None)) == 256


@pytest.fixture
def cifar100_dir(write_tfds, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "VALIDATION_IMAGES", 20)
    names = [f"class {i}" for i in range(100)]
    train, test = (labelled(images, 100, id="", coarse_label=3) for images in np.split(noise(160), [120]))
    write_tfds(tmp_path, "cifar100", {"train": train, "test": test}, names)
    return tmp_path


def test_cifar100_is_its_pixels_and_fine_labels_in_their_order(cifar100_dir):
    source = sources.load("cifar100", cifar100_dir)
    assert source.name == "cifar100"
    np.testing.assert_array_equal(
        np.concatenate([source.train.images, source.validation.images, source.test.images]), noise(160)
    )
    np.testing.assert_array_equal(source.validation.labels, np.arange(100, 120) % 100)
    assert source.class_names == tuple(f"class {i}" for i in range(100))
    pixels = source.train.images / 255
    np.testing.assert_allclose(source.mean, pixels.mean(axis=(0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(source.std, pixels.std(axis=(0, 1, 2)), atol=6e-5)
    assert source.mean == tuple(round(number, 4) for number in source.mean)


def test_without_the_file_of_names_classes_are_numbers(cifar100_dir):
    [names] = cifar100_dir.rglob("label.labels.txt")
    names.unlink()
    assert sources.load("cifar100", cifar100_dir).class_names == tuple(map(str, range(100)))


def test_another_size_is_stretched_to(cifar100_dir):
    source = sources.load("cifar100", cifar100_dir, image_size=20)
    assert source.test.images.shape == (40, 20, 20, 3)
    np.testing.assert_array_equal(source.test.images[0], resized(noise(160)[120], 20))


def test_small_images_stay_small(cifar100_dir):
    """At 224 pixels CIFAR would take 7.5 GB; the pipeline stretches batches."""
    source = sources.load("cifar100", cifar100_dir, image_size=224)
    np.testing.assert_array_equal(source.test.images, noise(160)[120:])


def test_a_jpeg_copy_is_noted(cifar100_dir, write_tfds, monkeypatch):
    assert sources.load("cifar100", cifar100_dir).note == ""
    shutil.rmtree(cifar100_dir / "cifar100")
    monkeypatch.setattr(
        "tensorflow_datasets.features.Image.encode_example", lambda self, image: tf.io.encode_jpeg(image).numpy()
    )
    examples = labelled(noise(30), 100, id="", coarse_label=0)
    write_tfds(cifar100_dir, "cifar100", {"train": examples, "test": examples})
    for name in ("cifar100", "tfds:cifar100"):
        assert "JPEG" in sources.load(name, cifar100_dir).note


def test_a_folder_that_is_none_is_named(tmp_path):
    for dataset in ("cifar10", "auto", "tfds:mnist", "folder"):
        message = error_of(dataset, tmp_path / "nowhere")
        assert message.startswith(f"`data_dir` is no folder: {tmp_path / 'nowhere'}")


def test_without_data_or_network_it_says_so_within_seconds(tmp_path, monkeypatch, reached):
    monkeypatch.setattr(sources, "CIFAR10_HOST", "host.invalid")
    for dataset in ("cifar10", "cifar100"):
        message = error_of(dataset, tmp_path)
        for part in (f"not in {tmp_path}", "no connection to host.invalid (no network)", "--data-dir"):
            assert part in message
    assert reached == [("host.invalid", 443)] * 2


def test_too_few_images_to_hold_out(cifar100_dir, monkeypatch):
    monkeypatch.setattr(sources, "VALIDATION_IMAGES", 120)
    assert "CIFAR-100 has too few training images to hold 120 out: 120" in error_of("cifar100", cifar100_dir)


# === A broken copy ===


def cut(records):
    records.write_bytes(records.read_bytes()[:10_000])


def flip(records):
    data = bytearray(records.read_bytes())
    data[5_000] ^= 1
    records.write_bytes(data)


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        (cut, "truncated record"),
        (flip, "corrupted record"),
        (Path.unlink, "No such file"),
        (lambda records: records.write_bytes(b""), "contained only 0 elements"),
    ],
    ids=["cut", "flip", "unlink", "empty"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_records_are_named(cifar100_dir, sabotage, reason, split):
    [records] = cifar100_dir.rglob(f"cifar100-{split}.tfrecord*")
    sabotage(records)
    message = error_of("cifar100", cifar100_dir)
    assert message.startswith(f"CIFAR-100 in {cifar100_dir} can't be read: ")
    assert reason in message
    assert f"Remove {records.parent}" in message


@pytest.mark.parametrize("text", ["", '{"name": "cifar', "{}", "[]"])
def test_a_broken_description_is_named(cifar100_dir, text, reached):
    [info] = cifar100_dir.rglob("dataset_info.json")
    info.write_text(text)
    message = error_of("cifar100", cifar100_dir)
    assert f"{info} is broken (" in message
    assert f"Remove {info.parent}" in message
    assert not reached


def test_a_missing_description_is_named(cifar100_dir, reached):
    [info] = cifar100_dir.rglob("dataset_info.json")
    info.unlink()
    message = error_of("cifar100", cifar100_dir)
    assert f"{info.parent} has no dataset_info.json. Remove it" in message
    assert not reached


def test_an_image_that_is_none_is_an_error(write_tfds, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.features.Image.encode_example", lambda self, image: b"no image")
    folder = write_tfds(tmp_path, "mnist", {"train": labelled(noise(20, (28, 28, 1)))})
    message = error_of("tfds:mnist", tmp_path)
    assert "Unknown image file format" in message
    assert str(folder) in message


# === auto ===


def test_auto_is_cifar10_where_it_is(cifar10_dir):
    source = sources.load("auto", cifar10_dir)
    assert (source.name, source.fallback) == ("cifar10", "")


@pytest.mark.parametrize("installed", [True, False])
def test_auto_falls_back_to_digits_and_says_why(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    source = sources.load("auto", tmp_path)
    assert source.name == "digits"
    assert "CIFAR-10" in source.fallback
    assert "\n" not in source.fallback
    for part in ("no connection to", "--data-dir") if installed else ("pip install tensorflow-datasets",):
        assert part in source.fallback


@pytest.mark.parametrize("pattern", ["*train.tfrecord*", "dataset_info.json"])
def test_auto_does_not_pass_over_a_broken_copy(cifar10_dir, tmp_path, pattern):
    shutil.copytree(cifar10_dir, tmp_path, dirs_exist_ok=True)
    [broken] = tmp_path.rglob(pattern)
    broken.unlink()
    assert str(tmp_path / "cifar10") in error_of("auto", tmp_path)


def test_auto_with_neither_names_both(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = error_of("auto", tmp_path)
    assert "CIFAR-10 is not in" in message
    assert "pip install scikit-learn" in message


# === Other sets of TFDS ===


def test_tfds_holds_a_fixed_fair_sample_out(write_tfds, tmp_path):
    # Sorted by class, as some sets are: the end of it would be one class.
    images = noise(200, (28, 28, 1))
    train = [{"image": image, "label": i // 20} for i, image in enumerate(images)]
    write_tfds(tmp_path, "mnist", {"train": train, "test": labelled(noise(30, (28, 28, 1)))})
    source, again = (sources.load("tfds:mnist", tmp_path, image_size=28) for _ in range(2))
    assert sizes(source) == [180, 20, 30]
    np.testing.assert_array_equal(source.validation.images, again.validation.images)
    assert len(set(source.validation.labels)) > 5
    assert len(set(source.train.limit(20).labels)) > 5
    # Grey becomes three channels, and each image keeps its label.
    colour = np.repeat(images, 3, axis=-1)
    assert same_rows(rows(source.train, source.validation), colour.reshape(200, -1))
    for image, label in zip(source.validation.images, source.validation.labels):
        [place] = np.flatnonzero((colour == image).all(axis=(1, 2, 3)))
        assert place // 20 == label
    assert (source.name, source.note) == ("tfds:mnist", "")
    assert source.class_names == tuple("0123456789")


def test_tfds_holds_out_no_more_than_cifar_does(write_tfds, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "VALIDATION_IMAGES", 3)
    write_tfds(tmp_path, "mnist", {"train": labelled(noise(100, (28, 28, 1))), "test": labelled(noise(5, (28, 28, 1)))})
    assert sizes(sources.load("tfds:mnist", tmp_path)) == [97, 3, 5]


def test_tfds_takes_a_config_and_images_of_any_size(write_tfds, tmp_path):
    # Of one colour each: the set keeps JPEGs.
    photos = [np.full((20 + i, 40, 3), (8 * i, 100, 200), "uint8") for i in range(30)]
    name = "imagenette/160px-v2"
    write_tfds(tmp_path, name, {"train": labelled(photos), "validation": labelled(photos[:8])})
    source = sources.load(f"tfds:{name}", tmp_path, image_size=24)
    assert (source.name, sizes(source), source.mirror) == (f"tfds:{name}", [27, 3, 8], True)
    assert source.train.images.shape == (27, 24, 24, 3)
    colours = source.test.images[np.argsort(source.test.labels)]
    np.testing.assert_allclose(colours, [resized(photo, 24) for photo in photos[:8]], atol=3)
    assert "validation split" in source.note
    assert sources.load(f"tfds:{name}:1.0.0", tmp_path).test.images.shape == (8, 32, 32, 3)


def test_tfds_without_a_test_split_holds_it_out(write_tfds, tmp_path):
    write_tfds(tmp_path, "tf_flowers", {"train": labelled(noise(50), 5)})
    source = sources.load("tfds:tf_flowers", tmp_path)
    assert sizes(source) == [40, 5, 5]
    assert same_rows(rows(source.train, source.validation, source.test), noise(50).reshape(50, -1))
    assert "held out" in source.note


@pytest.mark.parametrize("name", ["mnist", "kmnist", "fashion_mnist"])
def test_a_mirrored_character_is_another_one(write_tfds, tmp_path, name):
    write_tfds(tmp_path, name, {"train": labelled(noise(20, (28, 28, 1)))})
    assert sources.load(f"tfds:{name}", tmp_path).mirror == (name == "fashion_mnist")


def test_the_names_of_characters_are_tfds_own():
    import tensorflow_datasets as tfds

    assert set(tfds.list_builders(with_community_datasets=False)) >= sources.CHARACTERS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", "tensorflow-datasets knows no nosuch"),
        ("imdb_reviews", "imdb_reviews has no images with a class each, but text, label"),
        ("coco", "coco has no images with a class each"),
        ("imagenette/nosuch", "BuilderConfig nosuch not found with version 1.0.0. See https://"),
        ("mnist:9.9.9", "mnist cannot be loaded at version 9.9.9"),
        ("no name", "Parsing builder name string no name failed"),
    ],
)
def test_what_is_no_image_classification_is_named(tmp_path, name, message, reached):
    assert message in error_of(f"tfds:{name}", tmp_path)
    assert not reached


def test_a_set_without_a_training_split_is_named(write_tfds, tmp_path):
    write_tfds(tmp_path, "mnist", {"test": labelled(noise(5, (28, 28, 1)))})
    assert "mnist has no split to train on: it has test" in error_of("tfds:mnist", tmp_path)


def test_labels_that_are_kept_back_are_an_error(write_tfds, tmp_path):
    kept_back = [{"image": image, "label": -1} for image in noise(5, (28, 28, 1))]
    write_tfds(tmp_path, "mnist", {"train": labelled(noise(20, (28, 28, 1))), "test": kept_back})
    assert "labels of its split test" in error_of("tfds:mnist", tmp_path)


def test_hosts_are_tried_before_tfds_does(tmp_path, reached):
    message = error_of("tfds:svhn_cropped", tmp_path)
    assert reached == [("ufldl.stanford.edu", 80)]
    for part in (f"not in {tmp_path}", "no connection to ufldl.stanford.edu", "folder that holds svhn_cropped/"):
        assert part in message


@pytest.mark.parametrize(
    ("proxies", "tried"),
    [
        ({"no": "localhost"}, ("www.cs.toronto.edu", 443)),  # names no proxy
        ({"http": "http://proxy.invalid"}, ("www.cs.toronto.edu", 443)),  # nor is that for https
        ({"https": "http://proxy.invalid:3128"}, ("proxy.invalid", 3128)),
        ({"https": "proxy.invalid:3128"}, ("proxy.invalid", 3128)),
        ({"all": "https://user:word@proxy.invalid"}, ("proxy.invalid", 443)),
        ({"all": "socks5h://proxy.invalid:1080"}, ("proxy.invalid", 1080)),
    ],
)
def test_a_proxy_is_tried_in_the_hosts_place(tmp_path, monkeypatch, reached, proxies, tried):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: proxies)
    message = error_of("cifar10", tmp_path)
    assert reached == [tried]
    assert "no connection to www.cs.toronto.edu" in message and "(no network)" in message
    assert ("through the proxy proxy.invalid" in message) == (tried[0] == "proxy.invalid")
    assert "word" not in message


def test_a_host_may_be_excepted_from_the_proxy(tmp_path, monkeypatch, reached):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy.invalid:3128"})
    monkeypatch.setattr(urllib.request, "proxy_bypass", lambda host: host == "www.cs.toronto.edu")
    error_of("cifar10", tmp_path)
    assert reached == [("www.cs.toronto.edu", 443)]


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that answers with the status `answer`, or with no HTTP if that is `None`; it keeps what it was `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            server.asked.append((self.path, self.headers["Proxy-Authorization"]))
            if server.answer is not None:
                self.send_response(server.answer)
                self.end_headers()
            else:
                self.wfile.write(b"no proxy\r\n\r\n")

        def log_message(self, *arguments):
            pass

    # The autouse fixture has cut the network off.
    monkeypatch.setattr(socket, "create_connection", CREATE_CONNECTION)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.answer = [], 200
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://user:p%40ss@127.0.0.1:{server.server_port}"
        monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": url})
        monkeypatch.setattr(urllib.request, "proxy_bypass", lambda host: False)
        yield server
        server.shutdown()


@pytest.mark.parametrize(("answer", "reason"), [(403, "403"), (407, "407"), (503, "503"), (None, "no proxy")])
def test_a_proxy_that_refuses_the_host_is_named(tmp_path, proxy, answer, reason):
    proxy.answer = answer
    message = error_of("cifar10", tmp_path)
    assert f"no connection to www.cs.toronto.edu through the proxy 127.0.0.1:{proxy.server_port} (" in message
    assert reason in message
    assert proxy.asked == [("www.cs.toronto.edu:443", "Basic dXNlcjpwQHNz")]  # user:p@ss
    assert sources.load("auto", tmp_path).name == "digits"


def test_a_proxy_that_lets_through_is_one(proxy):
    sources._probe({("www.cs.toronto.edu", 443)})
    assert len(proxy.asked) == 1


def test_a_name_that_is_looked_up_for_ever_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: threading.Event().wait())
    started = time.monotonic()
    assert "no answer within 0.2 seconds" in error_of("cifar10", tmp_path)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("way", ["host", "proxy", "manual"])
def test_tfds_downloads_where_the_way_is_open(tmp_path, monkeypatch, way):
    import tensorflow_datasets as tfds

    def download(self):
        raise RuntimeError("the disk is full\nand more")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download)
    refuse = socket.create_connection
    if way == "host":
        # One of two is enough: the other may be that of another config.
        monkeypatch.setattr(sources, "_hosts", lambda builder: {("up", 443), ("down", 443)})
        monkeypatch.setattr(
            socket, "create_connection", lambda at, timeout: socket.socket() if at[0] == "up" else refuse(at, timeout)
        )
    elif way == "proxy":
        monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "https://up:3128"})
        monkeypatch.setattr(
            socket, "create_connection", lambda at, timeout: socket.socket() if at == ("up", 3128) else refuse(at, timeout)
        )
    name = "imagenet2012" if way == "manual" else "mnist"
    assert "the download failed: the disk is full. Name" in error_of(f"tfds:{name}", tmp_path)


# === A folder of images ===


def write_image(path, image=None, shape=(12, 16, 3)):
    """Writes a file by its suffix; noise of its own for each name."""
    if image is None:
        image = np.random.default_rng(list(str(path).encode())).integers(0, 256, shape, "uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = tf.io.encode_png if path.suffix.lower() == ".png" else tf.io.encode_jpeg
    path.write_bytes(encode(image).numpy())
    return image


@pytest.fixture
def photos(tmp_path):
    """Cats and dogs, 20 and 30."""
    for name, n in {"cat": 20, "dog": 30}.items():
        for i in range(n):
            write_image(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_a_folder_is_held_out_by_class(photos):
    source, again = sources.load("folder", photos), sources.load("folder", str(photos))
    assert (source.name, source.class_names, source.mirror) == ("folder", ("cat", "dog"), True)
    assert [np.bincount(split.labels).tolist() for split in (source.train, source.validation, source.test)] == [
        [16, 24],
        [2, 3],
        [2, 3],
    ]
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(source, split).images, getattr(again, split).images)
    files = sorted(photos.rglob("*.png"))
    expected = {resized(tf.io.decode_png(path.read_bytes()), 32).tobytes(): path.parent.name for path in files}
    found = {
        image.tobytes(): source.class_names[label]
        for split in (source.train, source.validation, source.test)
        for image, label in zip(split.images, split.labels)
    }
    assert found == expected
    assert len(set(source.train.limit(8).labels)) == 2
    assert "held out" in source.note


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("validation", ["validation", "valid", "val", None])
def test_a_folder_may_bring_its_splits(photos, tmp_path, validation, nested):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train" if nested else root)
    for split, n in {"test": 3, validation: 2}.items():
        for name in ("cat", "dog") if split else ():
            for i in range(n):
                write_image(root / split / name / f"{i}.png")
    (root / ".cache").mkdir()
    source = sources.load("folder", root)
    assert sizes(source) == ([50, 4, 6] if validation else [45, 5, 6])
    assert source.note == ""
    assert len(np.unique(rows(source.train, source.validation, source.test), axis=0)) == sum(sizes(source))


def test_a_class_may_be_called_as_a_split(photos):
    for i in range(10):
        for name in ("train", "test"):
            write_image(photos / name / f"{i}.png")
    assert sources.load("folder", photos).class_names == ("cat", "dog", "test", "train")


@pytest.mark.parametrize("name", ["Test", "extra"])
def test_what_lies_beside_train_and_is_no_split_is_not_passed_over(photos, tmp_path, name):
    shutil.copytree(photos, tmp_path / "split" / "train")
    shutil.copytree(photos, tmp_path / "split" / name)
    assert f"others that are no split: {name}. Move them" in error_of("folder", tmp_path / "split")


def test_a_split_has_one_folder(photos, tmp_path):
    for name in ("train", "validation", "val"):
        shutil.copytree(photos, tmp_path / "split" / name)
    assert "one folder for validation. Found: validation, val" in error_of("folder", tmp_path / "split")


@pytest.mark.parametrize("suffix", [".bmp", ".WEBP", ".tiff", ".jxl", ".tga"])
def test_an_image_that_would_be_passed_over_is_named(photos, suffix):
    (photos / "cat" / f"1{suffix}").touch()
    message = error_of("folder", photos)
    assert message == f"{photos}/cat/1{suffix} is none of .jpg .jpeg .jpe .jfif .png .gif. Convert it to .png, or remove it"


def test_a_fingerprint_tells_images_apart(photos):
    source = sources.load("folder", photos)
    fingerprint = source.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint == sources.load("folder", photos).fingerprint()
    assert fingerprint["number of train images"] == 40
    for split in ("train", "validation", "test"):
        images, labels = getattr(source, split).images.copy(), getattr(source, split).labels.copy()
        images[-1, -1, -1, -1] ^= 1
        labels[-1] ^= 1
        for other in (
            sources.Split(images, getattr(source, split).labels),
            sources.Split(getattr(source, split).images, labels),
        ):
            changed = dataclasses.replace(source, **{split: other}).fingerprint()
            assert {name for name in fingerprint if changed[name] != fingerprint[name]} == {f"checksum of {split} images"}
    assert dataclasses.replace(source, note="JPEG copy").fingerprint() != fingerprint
    assert dataclasses.replace(source, class_names=("dog", "cat")).fingerprint() != fingerprint


def test_a_folder_takes_each_format_and_passes_over_what_is_hidden(photos):
    flat = np.full((32, 32, 3), (200, 100, 50), "uint8")
    for path in (*(photos / "cat").iterdir(), *(photos / "dog").iterdir()):
        path.unlink()
    for folder in ("cat", "dog"):
        for i, suffix in enumerate((".jpg", ".JPEG", ".jpe", ".jfif", ".png", ".PNG")):
            write_image(photos / folder / f"{i}{suffix}", flat)
        tf.keras.utils.save_img(photos / folder / "5.gif", flat, scale=False)
        write_image(photos / folder / "6.png", flat[..., :1])
        write_image(photos / folder / "7.png", np.concatenate([flat, flat[..., :1] // 2], axis=-1))
        (photos / folder / ".hidden.png").write_bytes(b"no image")
        (photos / folder / "notes.txt").write_text("no image")
    (photos / ".cache").mkdir()
    (photos / "README.md").write_text("no class")
    source = sources.load("folder", photos)
    assert sum(sizes(source)) == 18
    images = np.concatenate([source.train.images, source.validation.images, source.test.images])
    grey = images[..., 2] == 200
    assert grey.all(axis=(1, 2)).sum() == 2
    np.testing.assert_allclose(images[~grey.any(axis=(1, 2))], np.broadcast_to(flat, (16, 32, 32, 3)), atol=5)


def test_images_of_one_colour_do_not_divide_by_zero(photos):
    for path in photos.rglob("*.png"):
        write_image(path, np.full((8, 8, 3), (0, 51, 255), "uint8"))
    source = sources.load("folder", photos)
    assert source.mean == (0, 0.2, 1)
    assert source.std == (1 / 255,) * 3


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty"), (b"no image at all", "Unknown image file format"), (None, "Invalid PNG data")]
)
def test_a_file_that_is_no_image_is_named(photos, data, reason):
    broken = photos / "dog" / "7.png"
    broken.write_bytes(broken.read_bytes()[:200] if data is None else data)
    message = error_of("folder", photos)
    assert message.startswith(f"{broken} can't be decoded: ")
    assert reason in message


def test_a_folder_is_needed():
    assert "`folder` needs `data_dir`" in error_of("folder")


def test_an_empty_class_folder_is_named(photos):
    (photos / "eel").mkdir()
    (photos / "eel" / "1.txt").write_bytes(b"")
    assert f"{photos / 'eel'} holds no files of .jpg .jpeg .jpe .jfif .png .gif" in error_of("folder", photos)


def test_a_folder_within_a_class_is_not_passed_over(photos):
    (photos / "dog" / "puppies").mkdir()
    assert f"{photos}/dog/puppies is a folder within a class" in error_of("folder", photos)


def test_a_class_too_small_to_hold_out_is_named(photos):
    for i in range(2):
        write_image(photos / "eel" / f"{i}.png")
    assert f"{photos / 'eel'} has too few images to hold out one each for test and validation: 2" in error_of("folder", photos)
    write_image(photos / "eel" / "2.png")
    source = sources.load("folder", photos)
    assert [np.sum(split.labels == 2) for split in (source.train, source.validation, source.test)] == [1, 1, 1]


@pytest.mark.parametrize("remove", ["cat", "cat dog"])
def test_fewer_than_two_classes_are_an_error(photos, remove):
    for name in remove.split():
        shutil.rmtree(photos / name)
    message = error_of("folder", photos)
    assert f"{photos} needs a folder for each of two classes or more" in message
    assert ("Found: none" in message) == (remove == "cat dog")


def test_splits_without_classes_are_no_classes(photos):
    (photos / "cat").rename(photos / "train")
    (photos / "dog").rename(photos / "test")
    assert "Found: test, train" in error_of("folder", photos)


@pytest.mark.parametrize("split", ["test", "val"])
@pytest.mark.parametrize("names", ["cat", "cat dog eel", ""])
def test_splits_of_other_classes_are_an_error(photos, tmp_path, split, names):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    (root / split).mkdir()
    for name in names.split():
        write_image(root / split / name / "1.png")
    message = error_of("folder", root)
    odd = {"cat": "dog", "cat dog eel": "eel", "": "cat, dog"}[names]
    assert message == f"{root / split} and {root / 'train'} must hold the same class folders. Only one has: {odd}"


def test_a_folder_that_may_not_be_read_is_named(photos, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"Permission denied: '{photos}" in error_of("folder", photos)


def test_images_too_big_for_the_memory_are_an_error(photos):
    assert "folder does not fit into memory" in error_of("folder", photos, image_size=10**7)
    assert "digits does not fit into memory: OOM" in error_of("digits", image_size=10**6)


OUT_OF_MEMORY = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
DENIED = tf.errors.PermissionDeniedError(None, None, "/records; Permission denied")


@pytest.mark.parametrize(
    "dataset, step, error, told",
    [
        ("folder", "_decode", OUT_OF_MEMORY, "folder does not fit into memory: OOM"),
        ("cifar100", "_encoded", OUT_OF_MEMORY, "cifar100 does not fit into memory: OOM"),
        ("cifar100", "_encoded", DENIED, "/records; Permission denied"),
    ],
)
def test_sound_data_is_not_blamed(photos, cifar100_dir, monkeypatch, dataset, step, error, told):
    def fail(*args):
        raise error

    monkeypatch.setattr(sources, step, fail)
    message = error_of(dataset, {"folder": photos, "cifar100": cifar100_dir}[dataset])
    assert told in message
    assert "emove" not in message


def test_a_file_that_may_not_be_read_is_named(photos, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = error_of("folder", photos)
    assert f"Permission denied: '{photos}" in message
    assert "emove" not in message


# === Digits ===


def test_digits():
    source = sources.load("digits")
    assert (source.name, source.mirror, source.fallback) == ("digits", False, "")
    assert sizes(source) == [1_297, 200, 300]
    assert source.train.images.shape == (1_297, 32, 32, 3)
    assert (source.train.images.dtype, source.train.labels.dtype) == (np.uint8, np.int64)
    assert source.class_names == tuple("0123456789")
    for split in (source.train, source.validation, source.test):
        counts = np.bincount(split.labels)
        assert counts.max() - counts.min() < 0.1 * len(split)
    assert "8x8" in source.note
    again = sources.digits()
    for field in dataclasses.fields(sources.Split):
        np.testing.assert_array_equal(getattr(again.test, field.name), getattr(source.test, field.name))


def test_digits_in_their_own_size_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = sources.load("digits", image_size=8)
    found = rows(source.train, source.validation, source.test)
    expected = np.round(load_digits().images * 255 / 16).astype("uint8")
    expected = np.repeat(expected[..., None], 3, axis=-1).reshape(1_797, -1)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


# === The real one ===


@pytest.mark.skipif(
    not (TFDS_DATA_DIR / "cifar10").is_dir(), reason="set TFDS_DATA_DIR to a folder in which TFDS prepared CIFAR-10"
)
def test_real_cifar10():
    source = sources.cifar10()
    assert sizes(source) == [45_000, 5_000, 10_000]
    assert np.bincount(source.test.labels).tolist() == [1_000] * 10
    assert np.bincount(source.validation.labels).min() > 400
    pixels = source.train.images.reshape(-1, 3) / np.float32(255)
    # A JPEG copy's are a little off.
    np.testing.assert_allclose(pixels.mean(axis=0, dtype="float64"), source.mean, atol=0.01)
    np.testing.assert_allclose(pixels.std(axis=0, dtype="float64"), source.std, atol=0.01)
