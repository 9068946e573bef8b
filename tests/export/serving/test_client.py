import contextlib
import dataclasses
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from addresses import unused_address
from photos import REENCODED, exif, odd_photos, photos, png, with_chunk, with_header

from cvt_keras import calibration_of, cli, preprocessing_of
from cvt_keras.data import image_files
from cvt_keras.data.images import decode, stretch
from cvt_keras.errors import ArgumentError, ImageError, MissingPackageError, ServingError
from cvt_keras.export.serving import client as module
from cvt_keras.export.serving.client import ADDRESSES, ERASE, Answer, Client, _line
from cvt_keras.export.serving.files import for_server

COMMAND = [sys.executable, "-m", "cvt_keras.export.serving.client"]
STATUS = grpc.StatusCode
UNAVAILABLE = (STATUS.UNAVAILABLE, "The batch scheduling queue to which this task was submitted is full")
# A PNG with valid chunks and pixels that can't be unpacked: the client decodes it only after the server has refused it.
BAD = png(8, 0).replace(b"IDATx", b"IDATy")

both = pytest.mark.parametrize("protocol", ADDRESSES)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", 0.01)


@pytest.fixture
def images(test_images):
    return [tf.io.encode_png(image).numpy() for image in test_images[0][:70]]


@pytest.fixture
def folder(images, tmp_path):
    """A folder of seven images, one of them in a subfolder."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for number, image in enumerate(images[:6]):
        (folder / f"{number}.png").write_bytes(image)
    (folder / "deeper" / "6.PNG").write_bytes(images[6])
    return folder


def _client(server, protocol, **arguments):
    return Client(_address(server, protocol), protocol, **arguments)


def _address(server, protocol):
    return {"grpc": server.grpc_address, "rest": server.rest_address}[protocol]


def _main(server, protocol, *flags):
    return cli.main(["classify", *map(str, flags), "--protocol", protocol, "--address", _address(server, protocol)])


@pytest.fixture
def peer():
    """A function that starts a server of canned answers, (status, body) by method, and returns its address.

    The last answer repeats.
    """
    servers = []

    def start(host="127.0.0.1", **answers):
        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                remaining = answers[self.command]
                status, body = remaining.pop(0) if len(remaining) > 1 else remaining[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        kind = type("Peer", (HTTPServer,), {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
        servers.append(kind((host, 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"[{host}]:{servers[-1].server_port}" if ":" in host else f"{host}:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# === Answers ===


@both
def test_answers_match_keras(protocol, server, images, test_images, classifier):
    calibration = calibration_of(classifier)
    expected = calibration.probabilities(classifier.predict(test_images[0][:70].astype("float32"), verbose=0))
    names = preprocessing_of(classifier).class_names
    with _client(server, protocol) as client:
        answers = client.classify(images)
        assert client.classify([]) == []
    np.testing.assert_allclose([answer.probabilities for answer in answers], expected, atol=1e-5)
    assert [answer.name for answer in answers] == [names[row.argmax()] for row in expected]
    unsure = [answer.unsure for answer in answers]
    assert unsure == calibration.unsure(expected).tolist() and 0 < sum(unsure) < len(unsure)


@both
def test_an_older_export_has_no_unsure_answers(protocol, server, images, monkeypatch):
    old = {"probabilities": np.full((1, 2), 0.5, "float32"), "classes": np.array([b"one"], object)}
    monkeypatch.setattr(server, "_run", lambda *_: old)
    with _client(server, protocol) as client:
        assert client.classify(images[:1])[0] == Answer("one", [0.5, 0.5], unsure=False)


def test_an_unsure_answer_ends_its_line():
    answer = Answer("b", [0.25, 0.75], unsure=True)
    assert _line("x.png", answer, 1, ["a", "b"]) == "x.png\tb\t0.7500\tunsure"
    assert _line("x.png", dataclasses.replace(answer, unsure=False), 1, ["a", "b"]) == "x.png\tb\t0.7500"


def test_grpc_reads_both_encodings_of_a_tensor(server, images):
    with _client(server, "grpc") as client:
        by_float_val = client.classify(images[:3])
        server.tensor_content = True
        by_tensor_content = client.classify(images[:3])
    for one, other in zip(by_float_val, by_tensor_content, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-7)
        assert one.unsure == other.unsure


@both
def test_a_request_may_be_larger_than_grpcs_4_mb(protocol, server):
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype="uint8")
    image = tf.io.encode_png(noise).numpy()
    assert len(image) > 5_000_000
    with _client(server, protocol) as client:
        assert isinstance(client.classify([image])[0], module.Answer)


def test_an_answer_may_be_larger_than_grpcs_4_mb(server, images, monkeypatch):
    many = {"probabilities": np.zeros((1, 1_100_000), "float32"), "classes": np.array([b"one"], object)}
    monkeypatch.setattr(server, "_run", lambda *_: many)
    with _client(server, "grpc") as client:
        assert len(client.classify(images[:1])[0].probabilities) == 1_100_000


@both
def test_lines_are_written_in_order_and_batches(protocol, folder, server, exported, capsys):
    labels = exported / "export" / "labels.txt"
    flags = [folder, folder / "0.png", "--batch", 3, "--top", 3]
    assert _main(server, protocol, *flags, "--labels", labels) == 0
    assert [(asked.protocol, asked.images) for asked in server.asked] == [(protocol, 3), (protocol, 3), (protocol, 2)]
    out, err = capsys.readouterr()
    rows = [line.removesuffix("\tunsure").split("\t") for line in out.splitlines()]
    files = [folder / f"{number}.png" for number in range(6)] + [folder / "deeper" / "6.PNG", folder / "0.png"]
    assert sorted(row[0] for row in rows[:-1]) == sorted(map(str, files[:-1])) and rows[-1][0] == str(files[-1])
    assert rows[-1][1:] == next(row[1:] for row in rows if row[0] == str(files[-1]))
    names = labels.read_text().splitlines()
    for row in rows:
        chances = [float(chance) for chance in row[2::2]]
        assert len(chances) == 3 and chances == sorted(chances, reverse=True)
        assert set(row[1::2]) <= set(names)
    assert not err
    # Without labels.txt the server names only the first class.
    assert _main(server, protocol, *flags) == 0
    out, err = capsys.readouterr()
    assert err == "cvt-keras classify: without --labels (the export's labels.txt), classes after the first are numbers\n"
    for row, bare in zip(rows, out.splitlines()):
        bare = bare.removesuffix("\tunsure").split("\t")
        assert bare[1] == row[1] and [names[int(index)] for index in bare[3::2]] == row[3::2]
    assert _main(server, protocol, folder / "0.png") == 0
    out, err = capsys.readouterr()
    assert len(out.removesuffix("\tunsure\n").split("\t")) == 3 and not err


def test_images_may_stand_on_both_sides_of_a_flag(folder, server, capsys):
    files = [str(folder / f"{number}.png") for number in (2, 0, 1)]
    assert _main(server, "rest", files[0], "--batch", 2, *files[1:]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == files
    with pytest.raises(SystemExit) as ended:
        _main(server, "rest", files[0], "--batc", 2, files[1])
    assert ended.value.code == 2 and "--batc" in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal_only_and_erased_before_lines(folder, server, tmp_path):
    (folder / "bad.png").write_bytes(BAD)
    flags = [folder, "--protocol", "rest", "--address", server.rest_address, "--batch", "3", "--retries", "0"]
    command = [*COMMAND, *map(str, flags)]

    def terminal_output(**streams):
        """Runs the command, and returns what it writes to the streams that are `None`, which become a terminal."""
        reading, terminal = pty.openpty()
        more = {name: terminal if stream is None else stream for name, stream in streams.items()}
        done = subprocess.run(command, **more)
        os.close(terminal)
        assert done.returncode == 1
        parts = []
        with contextlib.suppress(OSError):  # at the end Linux raises
            while part := os.read(reading, 100_000):
                parts.append(part)
        os.close(reading)
        return b"".join(parts).decode()

    with open(tmp_path / "lines.txt", "w+") as lines:
        first, *rest = terminal_output(stdout=lines, stderr=None).split(ERASE)
        assert not first and not rest[-1]
        refused = [part for part in rest if "classify: " in part]
        assert len(refused) == 1 and refused[0].startswith("cvt-keras classify: ") and "\r\n" in refused[0]
        progress = [part.rpartition("\n")[2] for part in rest]
        assert [part for part in progress if part] == ["3 of 8 images", "6 of 8 images", "8 of 8 images"]
        assert len((tmp_path / "lines.txt").read_text().splitlines()) == 7
    for streams in ({"stdout": subprocess.DEVNULL, "stderr": None}, {"stdout": None, "stderr": subprocess.STDOUT}):
        assert " of 8 images" not in terminal_output(**streams)


def test_a_batch_is_limited_in_bytes(folder, server, monkeypatch):
    sizes = [file.stat().st_size for file in folder.rglob("*.[pP]*")]
    monkeypatch.setattr(module, "BATCH_BYTES", max(sizes) + 1)
    assert _main(server, "grpc", folder) == 0
    assert [asked.images for asked in server.asked] == [2, 2, 2, 1]  # a batch ends with the file that exceeds the limit


@both
def test_the_version_is_sent(protocol, folder, server, capsys):
    assert _main(server, protocol, folder / "0.png", "--version", 2) == 0
    assert _main(server, protocol, folder / "0.png") == 0
    assert [asked.version for asked in server.asked] == [2, 3]
    with _client(server, protocol) as client:
        assert client.versions() == [2, 3]  # 1 is known, but not loaded


def test_rest_connects_to_an_ipv6_address(peer):
    try:
        address = peer("::1", GET=[(200, b'{"model_version_status": [{"version": "7", "state": "AVAILABLE"}]}')])
    except OSError:
        pytest.skip("to run this test: an IPv6 loopback interface")
    with Client(address, "rest", retries=0) as client:
        assert client.versions() == [7]


@both
def test_proxies_are_not_used(protocol, server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://{unused_address()}")
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with _client(server, protocol, retries=0) as client:
        assert client.versions() == [2, 3]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_unusual_file_names_stay_in_their_column_and_line(encoding, images, server, tmp_path):
    for name in (b"a\tb\nc.png", "caf\u00e9.png".encode(), b"\xff.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(images[0])
    (tmp_path / "bad\nname.png").write_bytes(BAD)
    flags = [str(tmp_path), "--protocol", "rest", "--address", server.rest_address, "--batch", "1", "--retries", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, *flags], env=environment, capture_output=True)
    assert done.returncode == 1
    assert rf"cvt-keras classify: {tmp_path}/bad\nname.png: the image is broken: " in done.stderr.decode(encoding)
    rows = [line.removesuffix("\tunsure").split("\t") for line in done.stdout.decode(encoding).splitlines()]
    assert {len(row) for row in rows} == {3}
    accented = "caf\u00e9.png" if encoding == "utf-8" else r"caf\xe9.png"
    assert {row[0] for row in rows} == {f"{tmp_path}/{name}" for name in (r"a\tb\nc.png", accented, r"\udcff.png")}


def test_the_class_imports_neither_numpy_nor_keras():
    code = (
        "import sys\n"
        "for name in ('keras', 'numpy', 'tensorflow'):\n"
        "    sys.modules[name] = None  # makes every import fail\n"
        "from cvt_keras.export.serving.client import Client\n"
        "Client(protocol='rest').close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_imports_neither_keras_nor_tensorflow(folder, server):
    code = (
        "import sys\n"
        "from cvt_keras.export.serving import client\n"
        "assert 'tensorflow' not in sys.modules  # nor the substitute\n"
        "from cvt_keras import cli\n"
        "assert cli.main(['classify', *sys.argv[1:]]) == 0\n"
        "loaded = {'keras', 'numpy', 'tensorflow.python', 'tensorflow_serving'} & set(sys.modules)\n"
        "assert loaded == ({'tensorflow_serving'} if 'grpc' in sys.argv else set()), loaded\n"
    )
    for protocol in ADDRESSES:
        flags = [str(folder), "--protocol", protocol, "--address", _address(server, protocol)]
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 7


# === Bad images ===


@both
def test_bad_images_are_named_and_the_good_ones_answered(protocol, folder, server, capsys):
    (folder / "bad.png").write_bytes(BAD)
    (folder / "text.png").write_text("hello")
    assert _main(server, protocol, folder, "--retries", 1) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 7
    bad, text = err.strip().splitlines()
    assert bad.startswith(f"cvt-keras classify: {folder / 'bad.png'}: the image is broken: ")
    assert text == f"cvt-keras classify: {folder / 'text.png'}: not a JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF"
    # All but the text in one request, then each alone.
    assert [asked.images for asked in server.asked] == [8, *[1] * 8]


@both
def test_the_exports_message_is_shown_without_tensorflows_marks(protocol, server, images):
    marks = "{{function_node __inference}} assertion failed: [an image may have at most 9 pixels; its header says] [4] [x] [3]"
    server.faults.extend([(STATUS.INVALID_ARGUMENT, f"{marks} [[{{{{node map/while/Assert}}}}]]")] * 3)
    with _client(server, protocol, retries=0) as client:
        [refused] = client.classify(images[:1])
    assert str(refused) == "refused by the server: an image may have at most 9 pixels; its header says 4 x 3"
    assert len(server.asked) == 3  # in a batch, unchanged, and decoded here
    large = with_header(png(8, 0), 9000, 8000)
    with _client(server, protocol) as client:
        [refused] = client.classify([large])
    assert "at most 67,108,864 pixels" in str(refused) and len(server.asked) == 5


@both
def test_another_clients_bad_image_costs_only_requests(protocol, server, images):
    """Simulates the answers of a server that merges requests when another client's image is bad."""
    with _client(server, protocol, retries=2) as client:
        expected = [client.classify([image])[0] for image in images[:2]]  # each alone, as after a refusal
        server.faults.extend([(STATUS.INVALID_ARGUMENT, "Invalid PNG data, size 60")] * 3)
        assert client.classify(images[:2]) == expected
        server.faults.extend([(STATUS.INVALID_ARGUMENT, "Invalid PNG data, size 60")] * 4)
        refused, answer = client.classify(images[:2])
    assert isinstance(refused, ImageError) and answer == expected[1]


@pytest.mark.parametrize(
    "images, received", [([], "none"), ("x", "str"), (b"\x89PNG", "int"), ([b"\x89PNG", Path("a.png")], "PosixPath")]
)
def test_arguments_other_than_bytes_are_not_sent(images, received, server):
    with _client(server, "rest") as client:
        for ask in (client.predict, *([client.classify] if images else [])):
            with pytest.raises(ArgumentError) as raised:
                ask(images)
            assert raised.value.argument == "images" and raised.value.summary.endswith(received)
    assert not server.asked


def test_unreadable_images_are_not_sent(server):
    cut_off = photos()["png"][:3000]
    with _client(server, "grpc") as client:
        errors = client.classify([b"", b"hello", b"GIF89a" + bytes(40), cut_off])
        assert all(isinstance(error, ImageError) for error in errors)
        assert [str(error) for error in errors[:2]] == [
            "the file is empty",
            "not a readable JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF",
        ]
        with pytest.raises(ImageError):
            client.predict([cut_off])
    assert not server.asked


# === Images that the server does not read as training does ===


@both
def test_photos_of_every_kind_match_training(protocol, server, classifier):
    kinds = photos()
    pixels = np.stack([stretch(decode(data), (24, 40)) for data in kinds.values()])
    expected = calibration_of(classifier).probabilities(classifier(pixels.astype("float32"), training=False))
    with _client(server, protocol) as client:
        answers = client.classify(kinds.values())
    largest = {kind: np.abs(answer.probabilities - row).max() for kind, answer, row in zip(kinds, answers, expected)}
    # The pixels are equal; the network computes in another order.
    assert max(largest.values()) < 1e-5, f"largest differences of a probability: {largest}"


@pytest.mark.parametrize("protocol, retries", [("grpc", 0), ("rest", 1)])
def test_images_that_the_server_refuses_are_decoded_by_the_client(protocol, retries, server, classifier, images):
    kinds = odd_photos()
    assert [kind for kind, data in kinds.items() if for_server(data) is not data] == []
    pixels = np.stack([stretch(decode(data), (24, 40)) for data in (*kinds.values(), images[0])])
    expected = calibration_of(classifier).probabilities(classifier(pixels.astype("float32"), training=False))
    with _client(server, protocol, retries=retries) as client:
        answers = client.classify([*kinds.values(), images[0]])
        # All in one request, then each alone, and each that is refused once more.
        assert [asked.images for asked in server.asked] == [len(kinds) + 1, *[1, 1] * len(kinds), 1]
        several = client.predict([*kinds.values(), images[0]])
    for results in (answers, several):
        np.testing.assert_allclose([answer.probabilities for answer in results], expected, atol=1e-5)


def test_only_files_that_the_server_does_not_read_are_decoded():
    kinds = photos()
    sent_as_they_are = {kind for kind, data in kinds.items() if for_server(data) == data}
    assert sent_as_they_are == set(kinds) - set(REENCODED)
    for kind in REENCODED:
        np.testing.assert_array_equal(decode(for_server(kinds[kind])), decode(kinds[kind]), err_msg=kind)
    photo = kinds["jpeg of orientation 6"]
    segment = photo[photo.index(b"\xff\xe1") :][: 2 + len(exif(6)) + 2]
    twice = photo.replace(segment, segment * 2)
    assert len(twice) > len(photo) and for_server(twice) != twice
    np.testing.assert_array_equal(decode(for_server(twice)), decode(twice))
    # Phones append data or a second image, and some writers add filler bytes.
    photo, other = kinds["progressive jpeg"], kinds["jpeg"]
    for data in (photo + bytes(20), photo + other, photo.replace(b"\xff\xda", b"\xff\xff\xda", 1)):
        assert for_server(data) == data


def test_a_folder_is_searched_by_content_and_not_by_name(folder, server, tmp_path, capsys):
    kinds = photos()
    for name, data in {
        "a.webp": kinds["webp"],
        "b.gif": kinds["gif"],
        "no ending": kinds["jpeg"],
        "c.txt": kinds["bmp"],
    }.items():
        (folder / name).write_bytes(data)
    for name in (".DS_Store", "Thumbs.db", "@eaDir/x.png", "__MACOSX/x.png", "$RECYCLE.BIN/x.png", ".hidden/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hello")
    (folder / "deeper" / "again").symlink_to(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "linked.png").write_bytes(kinds["png"])
    (folder / "link").symlink_to(outside)
    assert _main(server, "rest", folder) == 0
    out, err = capsys.readouterr()
    names = {Path(line.split("\t")[0]).name for line in out.splitlines()}
    assert not err and len(out.splitlines()) == 12
    assert {"a.webp", "b.gif", "no ending", "c.txt", "linked.png"} < names

    (folder / "dangling.jpg").symlink_to("/nowhere.jpg")
    (folder / "notes.txt").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "broken.gif").write_bytes(kinds["gif"][:100])
    os.mkfifo(folder / "pipe")
    assert _main(server, "rest", folder) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 12
    reasons = dict(line.removeprefix(f"cvt-keras classify: {folder}/").split(": ", 1) for line in err.splitlines())
    assert reasons.pop("broken.gif")
    assert reasons == {
        "dangling.jpg": "a dangling link",
        "notes.txt": "not a JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF",
        "empty.png": "the file is empty",
        "pipe": "not a file",
    }


def test_a_folder_or_file_without_permission_is_named(folder, server, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    def read(file, own=image_files.read):
        with monkeypatch.context() as patch:
            if file.name == "0.png":
                patch.setattr("builtins.open", lambda path, _: refuse(path))
            return own(file)

    monkeypatch.setattr(Path, "iterdir", lambda path, own=Path.iterdir: refuse(path) if path.name == "deeper" else own(path))
    monkeypatch.setattr(image_files, "read", read)
    assert _main(server, "rest", folder) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    refused = [folder / "0.png", folder / "deeper"]
    assert err.splitlines() == [f"cvt-keras classify: {path}: can't be read: Permission denied" for path in refused]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux' /proc")
def test_a_file_that_cant_be_read_is_named(folder, server, capsys):
    assert _main(server, "grpc", "/proc/self/mem", folder / "0.png") == 1
    out, err = capsys.readouterr()
    assert "/proc/self/mem: can't be read: " in err and len(out.splitlines()) == 1


# === Failures ===


@both
def test_temporary_failures_are_retried(protocol, server, images):
    with _client(server, protocol, retries=2) as client:
        alone = client.classify(images[:1])
        for fault in (UNAVAILABLE, (STATUS.RESOURCE_EXHAUSTED, "Run() timeout exceeded"), (STATUS.DEADLINE_EXCEEDED, "late")):
            server.faults.extend([fault] * 2)
            server.asked.clear()
            assert client.classify(images[:1]) == alone
            assert len(server.asked) == 3


def test_a_bad_gateway_is_retried(peer):
    up = (200, b'{"model_version_status": []}')
    with Client(peer(GET=[(502, b"Bad Gateway"), up]), "rest", retries=1) as client:
        assert client.versions() == []


def test_grpc_reconnects_soon_after_a_server_starts():
    address = unused_address()
    with Client(address, "grpc", retries=0) as client:
        started = time.monotonic()
        while time.monotonic() < started + 3:  # by then gRPC's own pause between connections would be 2.5 s
            with pytest.raises(ServingError) as raised:
                client.versions()
            assert module.start_command() in raised.value.hint
            time.sleep(0.1)
        server = grpc.server(futures.ThreadPoolExecutor(1))
        server.add_insecure_port(address)
        server.start()
        started = time.monotonic()
        message = "not available"
        while "not available" in message:
            with pytest.raises(ServingError) as raised:
                client.versions()
            message = str(raised.value)
            time.sleep(0.05)
        server.stop(None)
    assert "UNIMPLEMENTED" in message and time.monotonic() < started + 1.5


@both
def test_retries_end(protocol, folder, server, capsys):
    server.faults.extend([UNAVAILABLE] * 3)
    assert _main(server, protocol, folder, "--retries", 1) == 1
    assert len(server.asked) == 2
    [line] = capsys.readouterr().err.splitlines()
    reason = "is not available after 2 tries: The batch scheduling queue"
    assert line.startswith(f"cvt-keras classify: the server at {_address(server, protocol)} {reason}")


def test_pauses_grow_to_a_limit(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    monkeypatch.setattr(module, "BACKOFF", 1.0)
    with Client(unused_address(), "rest", retries=6) as client, pytest.raises(ServingError):
        client.versions()
    assert pauses == [1.5, 3.0, 6.0, 12.0, 15.0, 15.0]


@both
def test_other_failures_are_not_retried(protocol, server, images):
    server.faults.append((STATUS.INTERNAL, "broken"))
    with _client(server, protocol) as client, pytest.raises(ServingError) as raised:
        client.classify(images[:1])
    assert raised.value.hint is None and raised.value.summary.endswith("broken")
    assert len(server.asked) == 1


@both
def test_a_late_server_times_out(protocol, folder, server, capsys):
    server.delay = 1.0
    started = time.monotonic()
    assert _main(server, protocol, folder / "0.png", "--timeout", 0.2, "--retries", 1) == 1
    assert time.monotonic() - started < 1.0
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "did not answer within 0.2 s, 2 tries" in line and "--timeout" in line
    time.sleep(1.2)  # until the double is done with them


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"], ids=["nothing", "head"])
def test_a_server_that_drips_times_out(start):
    """The server sends `start` at once, and then a byte each 0.05 s."""

    def drip(listening):
        connection, _ = listening.accept()
        with connection:
            try:
                connection.sendall(start)
                for _ in range(100):
                    connection.sendall(b"H")
                    time.sleep(0.05)
            except OSError:
                pass  # the client has gone

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        started = time.monotonic()
        client = Client(f"127.0.0.1:{listening.getsockname()[1]}", "rest", timeout=0.3, retries=0)
        with client, pytest.raises(ServingError) as raised:
            client.versions()
    assert raised.value.argument == "timeout" and "0.3 s, 1 try" in raised.value.summary
    assert time.monotonic() - started < 1.5


def test_a_connection_that_closes_amid_an_answer_is_not_available():
    def end(listening):
        for _ in range(2):
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=end, args=(listening,), daemon=True).start()
        client = Client(f"127.0.0.1:{listening.getsockname()[1]}", "rest", retries=1)
        with client, pytest.raises(ServingError) as raised:
            client.versions()
    assert module.start_command() in raised.value.hint and "2 tries" in raised.value.summary


def test_a_server_that_does_not_read_times_out():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = Client(f"127.0.0.1:{listening.getsockname()[1]}", "rest", timeout=0.3, retries=0)
        with client, pytest.raises(ServingError) as raised:
            client.predict([with_chunk(png(8, 0), b"teXt", bytes(30_000_000))])
    assert raised.value.argument == "timeout" and "0.3 s" in raised.value.summary


def test_the_deadline_is_sent(server, images):
    with _client(server, "grpc", timeout=7.0) as client:
        client.classify(images[:1])
    assert 5 < server.asked[0].seconds < 7.1  # the clocks of the two sides differ a little


@both
def test_a_missing_server(protocol, folder, capsys):
    address = unused_address()
    assert cli.main(["classify", str(folder), "--protocol", protocol, "--address", address, "--retries", "1"]) == 1
    out, err = capsys.readouterr()
    [line] = err.strip().splitlines()
    assert f"the server at {address} is not available after 2 tries: " in line and "docker compose -f" in line and not out


@both
def test_a_missing_model(protocol, folder, server, capsys):
    assert _main(server, protocol, folder, "--model", "dog/cat") == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "does not have the model dog/cat. " in line and "--model" in line


@both
def test_a_missing_version(protocol, folder, server, capsys):
    assert _main(server, protocol, folder, "--version", 1) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "does not have version 1 of cvt, only 2, 3. " in line and "--version" in line


@both
@pytest.mark.parametrize("version", [None, 2])
def test_a_model_without_a_loaded_version(protocol, version, images, server):
    server.states = {1: "END", 2: "LOADING", 3: "LOADING"}
    with _client(server, protocol, version=version) as client:
        assert client.versions() == []
        with pytest.raises(ServingError) as raised:
            client.classify(images[:1])
        assert raised.value.argument is None and "has not loaded any version of cvt" in raised.value.summary


@pytest.mark.parametrize(
    "status, message",
    [
        ([(200, b"<html>hello</html>")], "failed with an answer that is not TF Serving's: the REST port is 8501"),
        ([(200, b"\xff\xfe\xff")], "failed with an answer that is not TF Serving's"),
        ([(200, b"{}")], "failed with an answer that is not TF Serving's"),
        ([(200, b'{"model_version_status": [{}]}')], "failed with an answer that is not TF Serving's"),
        ([(503, b"busy")], "is not available after 2 tries: busy"),
        ([(503, b"busy"), (200, b'{"model_version_status": []}')], "has not loaded any version of cvt"),
        ([(500, b'{"error": "broken"}')], "failed with HTTP 500: broken"),
        ([(404, b'{"error": "Could not find"}')], "does not have the model cvt. "),
    ],
)
def test_a_404_is_a_missing_model_only_if_the_server_confirms_it(status, message, peer, folder, capsys):
    address = peer(POST=[(404, b'{"error": "Servable not found"}')], GET=status)
    assert cli.main(["classify", str(folder), "--protocol", "rest", "--address", address, "--retries", "1"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"cvt-keras classify: the server at {address} {message}" in line


@both
def test_a_batch_that_is_too_large_for_the_server(protocol, server, images):
    with _client(server, protocol) as client, pytest.raises(ServingError) as raised:
        client.classify(images * 4)
    assert not isinstance(raised.value, ImageError) and raised.value.argument == "images" and len(server.asked) == 1


@both
def test_a_model_with_other_signatures(protocol, server, images, monkeypatch):
    with _client(server, protocol) as client:
        monkeypatch.setattr(module, "SIGNATURE", "bytes")
        with pytest.raises(ServingError) as raised:
            client.classify(images[:1])
        assert raised.value.argument == "model" and raised.value.summary.endswith(" bytes")
        monkeypatch.undo()
        monkeypatch.setattr(server, "_run", lambda *_: {"scores": np.zeros((1, 3), "float32")})
        with pytest.raises(ServingError) as raised:
            client.classify(images[:1])
        assert raised.value.argument == "model" and raised.value.summary.endswith(" serving_bytes")


def test_a_server_of_another_protocol(server, images):
    with Client(server.rest_address, "grpc", retries=0) as client, pytest.raises(ServingError) as raised:
        client.versions()
    assert "8500" in raised.value.summary
    with Client(server.grpc_address, "rest", retries=0) as client, pytest.raises(ServingError) as raised:
        client.versions()
    assert "8501" in raised.value.summary


@both
def test_labels_that_do_not_fit_the_model(protocol, folder, server, tmp_path, capsys):
    for text in ("a\nb\n", "a\n" * 10):
        (tmp_path / "labels.txt").write_text(text)
        assert _main(server, protocol, folder / "0.png", "--labels", tmp_path / "labels.txt") == 1
        assert "cvt-keras classify: `labels` do not fit the model, which has 10 classes" in capsys.readouterr().err


def test_missing_packages_for_grpc(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)  # makes every import fail
    with pytest.raises(MissingPackageError) as raised:
        Client()
    assert raised.value.argument == "protocol"
    assert cli.main(["classify", str(folder)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "pip install tensorflow-serving-api" in line and "--no-deps" in line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch", "0"], "`batch` must be at least 1. Received: batch=0"),
        (["--top", "0"], "`top` must be at least 1. Received: top=0"),
        (["--timeout", "0"], "`timeout` must be over 0 and at most 86400 seconds. Received: timeout=0.0"),
        (["--timeout", "nan"], "Received: timeout=nan"),
        (["--timeout", "inf"], "Received: timeout=inf"),
        (["--version", "0"], "`version` must be at least 1; leave it out for the newest. Received: version=0"),
        (["--retries", "-1"], "`retries` must be at least 0, which means a single try. Received: retries=-1"),
        (["--model", ""], "`model` must be a name in models.config, such as cvt. Received: model="),
        (["--labels", "nowhere"], "`labels` must be an export's labels.txt. Received: nowhere, which can't be read"),
        (["nowhere.png"], "`images` must be files or folders of images. Received: nowhere.png, which does not exist"),
        *(
            (["--address", address], f"`address` must be HOST:PORT, such as localhost:8500. Received: address={address}")
            for address in (
                "localhost",
                ":8500",
                "localhost:",
                "localhost:0",
                "localhost:65536",
                "http://localhost:8501",
                "::1:85",
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_reported_in_one_line(flags, message, folder, capsys):
    assert cli.main(["classify", str(folder), *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("cvt-keras classify: ") and message in line


def test_no_images_at_all(tmp_path, capsys):
    (tmp_path / ".DS_Store").write_text("hello")
    for flags, received in (([], "none"), ([str(tmp_path)], f"{tmp_path}, an empty folder")):
        assert cli.main(["classify", *flags]) == 2
        assert f"Received: {received}" in capsys.readouterr().err


def test_an_unknown_protocol():
    with pytest.raises(ArgumentError) as raised:
        Client(protocol="soap")
    assert raised.value.argument == "protocol"
    assert "grpc, rest" in raised.value.summary and "protocol=soap" in raised.value.summary
    with pytest.raises(SystemExit) as ended:
        cli.main(["classify", "a.png", "--protocol", "soap"])
    assert ended.value.code == 2


def test_the_default_address_depends_on_the_protocol():
    assert {protocol: Client(protocol=protocol).address for protocol in ADDRESSES} == ADDRESSES
    assert Client("[::1]:8501", "rest").address == "[::1]:8501"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_in_one_line(number, code, folder, server, monkeypatch, capsys, heard):
    monkeypatch.setattr(Client, "classify", lambda *_: signal.raise_signal(number))
    assert _main(server, "grpc", folder) == code
    assert capsys.readouterr().err == "\ncvt-keras classify: stopped\n"


def test_a_closed_stdout_gives_no_traceback(folder, server):
    flags = [str(folder), "--protocol", "rest", "--address", server.rest_address]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, *flags], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
