import base64
import dataclasses
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from small_sources import small_source

from cvt_keras import cli, runs
from cvt_keras.data import sources
from cvt_keras.data.cache import Cache
from cvt_keras.data.images import MAX_PIXELS
from cvt_keras.data.record import ImageRecord
from cvt_keras.export.verify import TFLITE_FORMATS
from cvt_keras.export.web import __main__ as command
from cvt_keras.export.web import samples as module_of_samples
from cvt_keras.export.web import server as module
from cvt_keras.export.web.samples import Samples, first_of_each_class
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.training.recipes import RESIZING


def _ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_labels_and_files_of_the_run_are_served(server, exported):
    response, body = _ask(server, "/run.json")
    assert response.status == 200
    run = json.loads(body)
    assert run["labels"] == (exported / "export" / "labels.txt").read_text().splitlines()
    assert [artifact["name"] for artifact in run["artifacts"]] == list(TFLITE_FORMATS)
    assert 0 < run["threshold"] == json.loads((exported / "export" / "report.json").read_text())["calibration"]["threshold"]
    for artifact in run["artifacts"]:
        response, body = _ask(server, f"/{artifact['name']}.tflite")
        assert body == (exported / "export" / "tflite" / f"{artifact['name']}.tflite").read_bytes()
        assert len(body) == artifact["bytes"]


def test_the_page_has_the_limit_of_training():
    [limit] = re.findall(r"MAX_PIXELS = ([\d_]+);", (module.WEB / "pixels.js").read_text())
    assert int(limit) == MAX_PIXELS


@pytest.mark.parametrize(
    "path",
    [
        *("/model.keras", "/recipe.json", "/report.json", "/export/labels.txt", "/tflite/float32.tflite"),
        *("/__main__.py", "/server.py", "/package.json", "/..", "/../__main__.py", "/../../README.md"),
        *("/export/report.json", "/export/tflite/float32.tflite", "//etc/passwd"),
        *("/%2e%2e/%2e%2e/README.md", "/node_modules/../package.json", "/style.css/../server.py", "/..%2f..%2fREADME.md"),
        *("/samples/10.png", "/samples/-1.png", "/samples/00000.png", "/other.tflite", "/../float32.tflite", "/style.css%00"),
    ],
)
def test_nothing_else_is(path, server):
    response, body = _ask(server, path)
    assert response.status == 404
    assert body.decode() == f"Not found. The page is at {server.url}\n"


def test_other_methods_and_names_of_this_machine_are_refused(server):
    assert _ask(server, "/", "POST")[0].status == 501
    assert _ask(server, "/run.json", Host="evil.example")[0].status == 421
    assert _ask(server, "/run.json", Host=f"evil.example:{server.server_port}")[0].status == 421
    assert _ask(server, "/run.json", Host=f"localhost:{server.server_port}")[0].status == 200
    # The header that a tunnel from another port sends.
    response, body = _ask(server, "/", Host="localhost:9000")
    port = server.server_port
    message = f"Open this page at http://127.0.0.1:{port}/ only. A tunnel must keep the port: ssh -L {port}:localhost:{port}\n"
    assert (response.status, body.decode()) == (421, message)
    response, body = _ask(server, "/", "HEAD")
    assert (response.status, body) == (200, b"") and int(response.headers["Content-Length"]) > 1000


def test_on_port_80_the_host_may_lack_the_port(server, monkeypatch):
    assert _ask(server, "/", Host="localhost")[0].status == 421
    monkeypatch.setattr(server, "server_port", 80)
    for host in ("localhost", "127.0.0.1", "localhost:80"):
        assert _ask(server, "/", Host=host)[0].status == 200
    assert _ask(server, "/", Host="evil.example")[0].status == 421


def test_the_server_listens_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_every_answer_forbids_other_hosts(server):
    for path in ("/", "/app.js", "/nothing"):
        policy = dict(rule.split(" ", 1) for rule in _ask(server, path)[0].headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert not [source for value in policy.values() for source in value.split() if "*" in source or "http" in source]
        assert "'unsafe-inline'" not in str(policy) and "'unsafe-eval'" not in str(policy)


@pytest.mark.parametrize(
    "name, value",
    [
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Embedder-Policy", "require-corp"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    ],
)
def test_every_answer_has_the_header(name, value, server):
    for path in ("/", "/app.js", "/run.json", "/nothing"):
        assert _ask(server, path)[0].headers[name] == value


def test_a_deleted_file_is_not_found(exported, serve, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(exported / "export", run_dir / "export")
    server = serve(run_dir)
    (run_dir / "export" / "tflite" / "int8.tflite").unlink()
    assert _ask(server, "/int8.tflite")[0].status == 404
    assert [artifact["name"] for artifact in json.loads(_ask(server, "/run.json")[1])["artifacts"]] == list(TFLITE_FORMATS)[:3]


def test_samples_are_the_first_test_image_of_each_class(cifar10_dir):
    source = sources.load("cifar10", str(cifar10_dir))
    samples = dict(first_of_each_class(source))
    assert list(samples) == list(source.class_names)
    for label, image in enumerate(samples.values()):
        assert (image == source.test.images[list(source.test.labels).index(label)]).all()


def test_the_first_20_of_many_classes_have_samples():
    test = types.SimpleNamespace(labels=np.arange(25), images=np.arange(25))
    source = types.SimpleNamespace(class_names=[f"class {label}" for label in range(25)], test=test)
    assert list(first_of_each_class(source)) == [(f"class {label}", label) for label in range(20)]


# === The command ===


@pytest.fixture
def installed(monkeypatch):
    """Makes the command run without npm's packages."""
    monkeypatch.setattr(command, "RUNTIME", ())


@pytest.mark.parametrize(
    "damage, flags, code, part",
    [
        (shutil.rmtree, [], 2, "`run` must be a run folder"),
        (
            lambda run_dir: shutil.rmtree(run_dir / "export"),
            [],
            1,
            "`run` has no .tflite file: {run_dir}. Export it first: cvt-keras export {run_dir}",
        ),
        (
            lambda run_dir: (run_dir / "export/labels.txt").unlink(),
            [],
            1,
            "`run` has no export/labels.txt: {run_dir}. Export it first: ",
        ),
        (lambda run_dir: None, ["--port", "65536"], 2, "`port` must be within 0 and 65535. Received: port=65536"),
        (lambda run_dir: None, ["--port", "-1"], 2, "`port` must be within 0 and 65535. Received: port=-1"),
    ],
)
def test_bad_input_is_one_line(damage, flags, code, part, exported, tmp_path, capsys, installed):
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir)
    damage(run_dir)
    assert cli.main(["web", str(run_dir), *flags]) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cvt-keras web: ") and part.format(run_dir=run_dir) in line


def test_a_port_in_use_is_one_line(exported, capsys, installed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["web", str(exported), "--port", str(port)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line == f"cvt-keras web: `port` is in use: {port}. Choose another with --port"


def test_a_missing_runtime_is_one_line_with_the_command_that_installs_it(exported, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RUNTIME", ("node_modules/none.js",))
    for folder, shown in ((module.WEB.parents[1], "export/web"), (tmp_path, str(module.WEB))):
        monkeypatch.chdir(folder)
        assert cli.main(["web", str(exported)]) == 1
        [line] = capsys.readouterr().err.strip().splitlines()
        assert "node_modules/none.js is missing" in line and line.endswith(f": npm ci --prefix {shown}")


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"resize": "crop", "crop_pct": 0.9, "interpolation": "bicubic", "image_size": [24, 40]}, ["crop", 0.9, "bicubic"]),
        ({"image_size": 32}, ["stretch", 0.875, "bilinear"]),  # of an earlier version
    ],
)
def test_the_command_serves_how_the_run_resizes(settings, expected, tmp_path, installed, monkeypatch):
    (tmp_path / "export" / "tflite").mkdir(parents=True)
    (tmp_path / "recipe.json").write_text(json.dumps(settings))
    for name in ("labels.txt", "tflite/float32.tflite"):
        (tmp_path / "export" / name).touch()
    answers = []
    monkeypatch.setattr(command.Server, "serve_forever", lambda server: answers.append(server.find("/run.json")[0]))
    monkeypatch.setattr(command, "Samples", lambda *arguments: types.SimpleNamespace(stop=lambda: None))
    command.main([str(tmp_path), "--port", "0"])
    run = json.loads(answers[0])
    assert run["threshold"] == 0  # this export has no report
    resizing = run["resizing"]
    assert resizing == dict(zip(RESIZING, expected, strict=True))


@pytest.fixture
def start(tmp_path):
    """A function that starts the command with flags. Returns its process and the URL that it prints."""
    started = []
    code = (
        "import sys; from cvt_keras import cli; from cvt_keras.export.web import __main__ as command\n"
        "command.RUNTIME = (); sys.exit(cli.main(['web', *sys.argv[1:]]))"
    )

    def start_(*flags):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, flags)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A background shell's children ignore SIGINT by default.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process, re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]

    yield start_
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_command_while_it_reads_samples(number, code, exported, start):
    process, url = start(exported, "--port", "0")
    with urllib.request.urlopen(url) as page:
        assert b"What is in the picture?" in page.read()
    process.send_signal(number)
    _, error = process.communicate(timeout=5)
    assert process.returncode == code
    assert error.strip() == "cvt-keras web: stopped"


def test_samples_come_from_the_folder_of_the_flag(exported, cifar10_dir, start, samples, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir)
    recipe = json.loads((run_dir / "recipe.json").read_text())
    (run_dir / "recipe.json").write_text(json.dumps({**recipe, "data_dir": "nowhere"}))
    _, url = start(run_dir, "--port", "0", "--data-dir", cifar10_dir)
    with urllib.request.urlopen(f"{url}samples.json", timeout=120) as answer:
        assert json.load(answer) == {"labels": [sample["label"] for sample in samples], "note": ""}
    with urllib.request.urlopen(f"{url}samples/9.png") as answer:
        assert answer.headers["Content-Type"] == "image/png"
        assert (tf.io.decode_png(answer.read()) == tf.io.decode_png(samples[9]["png"])).numpy().all()


def test_samples_are_of_the_runs_data_set_and_what_it_prints_goes_to_stderr(exported, monkeypatch, capsys, samples):
    real = sources.load

    def load(*arguments, **options):
        print("Downloading and preparing")
        return real(*arguments, **options)

    monkeypatch.setattr(sources, "load", load)
    module_of_samples.main([str(exported)])
    out, err = capsys.readouterr()
    assert [sample["label"] for sample in json.loads(out)["samples"]] == [sample["label"] for sample in samples]
    assert "Downloading" in err


def test_without_the_data_set_there_are_no_samples_and_a_line_says_why(exported, tmp_path):
    warnings = []
    samples = Samples(exported, str(tmp_path), warnings.append)
    assert samples() == ([], "")
    reason = f"cifar10 is not in {tmp_path}, and this command does not download it. Give its folder with --data-dir"
    assert warnings == [f"the page has no test images: {reason}"]
    assert not list(tmp_path.iterdir())  # nothing was downloaded


# === Samples of a folder ===


def test_warnings_reach_the_terminal_and_the_note_reaches_the_page(monkeypatch):
    output = {"samples": [{"label": "cat", "png": ""}], "note": "a note", "warnings": ["a line"]}
    code = f"print({json.dumps(output)!r})"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", code], **more))
    warnings = []
    assert Samples("run", None, warnings.append)() == ([{"label": "cat", "png": b""}], "a note")
    assert warnings == ["a line"]


@pytest.mark.parametrize("recorded", [True, False])
def test_samples_of_a_folder_are_test_images_of_the_run(recorded, exported, monkeypatch, tmp_path, capsys):
    recipe = json.loads((exported / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "dataset": "folder", "data_dir": "photos"}))
    if recorded:
        ImageRecord.of_source(small_source("2a", "3a", "1a 4b")).write(tmp_path / runs.IMAGES)
    calls = []
    source = dataclasses.replace(small_source("1a 4b", "3a", "2a 5b"), left_out={"broken: the file is empty": 2})
    monkeypatch.setattr(sources, "load", lambda *arguments, **options: calls.append((arguments, options)) or source)
    module_of_samples.main([str(tmp_path)])
    record = ImageRecord.read(tmp_path / runs.IMAGES)
    arguments = "folder", "photos", Preprocessing(image_size=(24, 40))
    assert calls == [(arguments, {"skip_broken": True, "record": record, "cache": Cache()})]
    printed = json.loads(capsys.readouterr().out)
    assert [sample["label"] for sample in printed["samples"]] == ["a", "b"]
    colours = [int(tf.io.decode_png(base64.b64decode(sample["png"]))[0, 0, 0]) for sample in printed["samples"]]
    broken = "Files that can't be read are left out: 2."
    if recorded:
        assert (colours, printed["note"]) == ([1, 4], "")
        assert printed["warnings"] == ["Images differ from those of the run: 1 new. New ones are left out.", broken]
    else:
        assert (colours, printed["warnings"]) == ([2, 5], [broken])
        assert printed["note"].startswith("Held-out images not verified. The run has no images.csv")
