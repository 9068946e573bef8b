"""The server's configuration, as far as it can be tested without the real server."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tensorflow as tf
import yaml
from double import SERVING, models_config
from tensorflow_serving.apis import prediction_log_pb2

from cvt_keras.export.saved_model import WARM_UP, WARM_UP_BATCHES
from cvt_keras.export.serving import client

ROOT = SERVING.parents[1]


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((SERVING / "docker-compose.yml").read_text())["services"]["serving"]


@pytest.fixture(scope="module")
def mounts(service):
    return {mount["target"]: mount for mount in service["volumes"]}


def _batching():
    """The lines of batching.config."""
    fields = {}
    for line in (SERVING / "batching.config").read_text().splitlines():
        if line and not line.startswith("#"):
            name, value = re.fullmatch(r"(\w+) \{ value: (\w+) \}", line).groups()
            assert name not in fields
            fields[name] = value
    return fields


def test_the_model_has_one_name(exported):
    config = models_config()
    records = tf.data.TFRecordDataset(str(exported / "export" / "saved_model" / "1" / WARM_UP))
    logs = [prediction_log_pb2.PredictionLog.FromString(record.numpy()) for record in records]
    warmed_up = {log.predict_log.request.model_spec.name for log in logs}
    assert {config.name} == {client.MODEL} == warmed_up


def test_the_two_newest_versions_are_served(serving):
    config = models_config()
    assert (config.model_platform, config.model_version_policy.latest.num_versions) == ("tensorflow", 2)
    assert sorted(serving.versions) == [2, 3]


def test_warm_up_requests_are_replayed(serving):
    assert serving.warmed_up == len(serving.versions) * 3 * len(WARM_UP_BATCHES)


def test_batching_parameters_exist_in_the_server():
    """tensorflow-serving-api lacks their proto, so this lists the wrapped values of session_bundle_config.proto."""
    numbers = {
        "max_batch_size",
        "batch_timeout_micros",
        "max_enqueued_batches",
        "num_batch_threads",
        "max_execution_batch_size",
    }
    fields = _batching()
    assert set(fields) == numbers | {"enable_large_batch_splitting"}
    assert fields["enable_large_batch_splitting"] == "true"
    sizes = {name: int(fields[name]) for name in numbers}
    assert sizes["num_batch_threads"] >= 1 and sizes["max_enqueued_batches"] >= 1
    assert sizes["max_batch_size"] >= sizes["max_execution_batch_size"] >= max(WARM_UP_BATCHES)


def test_the_server_accepts_the_clients_default_batch():
    assert client.parse(["a.png"]).batch <= int(_batching()["max_batch_size"])


def test_the_clients_help_names_the_largest_batch(capsys):
    with pytest.raises(SystemExit):
        client.main(["--help"])
    text = " ".join(re.findall(r"[^\s│]+", capsys.readouterr().out))
    assert f"Images per request, at most {_batching()['max_batch_size']} (batching.config)." in text


def test_the_image_has_tensorflows_minor_version(service):
    pinned = re.search(r"^tensorflow==(\d+\.\d+)\.", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert re.fullmatch(rf"tensorflow/serving:\$\{{SERVING_TAG:-{re.escape(pinned)}\.\d+\}}", service["image"])
    assert service["platform"] == "linux/amd64"


def test_flags_name_mounted_files(service, mounts):
    flags = dict(flag.removeprefix("--").split("=") for flag in service["command"])
    assert flags == {
        "model_config_file": "/config/models.config",
        "enable_batching": "true",
        "batching_parameters_file": "/config/batching.config",
        "enable_model_warmup": "true",
    }
    for name in ("model_config_file", "batching_parameters_file"):
        assert (SERVING / mounts[flags[name]]["source"]).is_file()


def test_the_run_is_mounted_at_the_models_base_path(mounts, exported):
    mount = mounts[models_config().base_path]
    hint, path = re.fullmatch(r"\$\{RUN:\?(.+)\}/(.+)", mount["source"]).groups()
    assert "RUN" in hint and (exported / path / "1" / "saved_model.pb").is_file()
    assert mount["bind"] == {"create_host_path": False}


def test_mounts_are_read_only(mounts):
    assert len(mounts) == 3 and all(mount["type"] == "bind" and mount["read_only"] is True for mount in mounts.values())


def test_ports_are_the_clients_and_local_only(service):
    ports = [address.rpartition(":")[2] for address in client.ADDRESSES.values()]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]


def test_the_health_check_succeeds_only_with_the_model(service, serving):
    command = service["healthcheck"]["test"]
    assert command[:3] == ["CMD", "bash", "-c"]
    assert "$" not in command[3]  # compose would substitute a variable

    def healthy(port, path="models/cvt"):
        script = command[3].replace("8501", str(port)).replace("models/cvt", path)
        return subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True).returncode == 0

    assert healthy(serving.rest.server_port)
    assert not healthy(serving.rest.server_port, "models/dog")
    assert not healthy(1)


def test_the_start_command_names_the_compose_file(monkeypatch, tmp_path):
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        command = client.start_command()
        assert Path(re.search(r"-f (\S+)", command)[1]).is_file() and command.startswith("RUN=")
