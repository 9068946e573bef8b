import subprocess
import threading
import time
import types

import jax
import keras
import numpy as np
import pytest

from cvt_keras.errors import ArgumentError, DataError, DistributedError
from cvt_keras.training import RunResult, distributed, launch, loop
from cvt_keras.training.distributed import Group, find
from cvt_keras.training.objective import Accuracy, CrossEntropy

GROUP = {"coordinator": "10.0.0.1:7272", "processes": 4, "process_id": 2}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:7272", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "node[1-2]"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}


# === The group ===


@pytest.mark.parametrize(
    ("arguments", "variables", "group"),
    [
        ({}, {}, None),
        (GROUP, {}, Group(**GROUP)),
        ({}, VARIABLES, Group(**GROUP)),
        ({"process_id": 0}, VARIABLES, Group("10.0.0.1:7272", 4, 0)),
        ({"coordinator": "[::1]:1"}, VARIABLES, Group("[::1]:1", 4, 2)),
        ({}, SLURM, Group(None, 8, 3)),
        ({}, {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, Group(None, 2, 0)),
        ({"coordinator": "a:1"}, OPEN_MPI, Group("a:1", 2, 0)),
        ({"coordinator": "a:1"}, SLURM, Group("a:1", 8, 3)),
        ({}, {**SLURM, "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"}, Group("a:1", 8, 0)),
        ({"processes": 1}, SLURM, None),
        ({}, {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # in a batch script, not started by srun
        ({}, {**VARIABLES, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_the_group_comes_from_flags_then_variables_then_the_launcher(arguments, variables, group):
    assert find(**arguments, variables=variables) == group


@pytest.mark.parametrize(
    ("arguments", "variables", "argument"),
    [
        ({"coordinator": "a:1"}, {}, "processes"),
        ({"processes": 2}, {}, "coordinator"),
        ({"coordinator": "a:1", "processes": 2}, {}, "process_id"),
        ({**GROUP, "process_id": 4}, {}, "process_id"),
        ({**GROUP, "process_id": -1}, {}, "process_id"),
        ({**GROUP, "processes": 0}, {}, "processes"),
        ({**GROUP, "coordinator": "10.0.0.1"}, {}, "coordinator"),
        ({**GROUP, "coordinator": "a:70000"}, {}, "coordinator"),
        ({}, {**VARIABLES, "JAX_PROCESS_ID": "two"}, "process_id"),
        ({"process_id": 9}, SLURM, "process_id"),
        ({"processes": 0}, SLURM, "processes"),
        ({"coordinator": "first"}, SLURM, "coordinator"),
        ({}, OPEN_MPI, "coordinator"),  # a version of which JAX can't tell where process 0 is
    ],
)
def test_an_incomplete_or_wrong_group_is_refused(arguments, variables, argument):
    with pytest.raises(ArgumentError) as error:
        find(**arguments, variables=variables)
    assert error.value.argument == argument


def test_a_group_on_tensorflow_is_refused():
    with pytest.raises(ArgumentError) as error:
        distributed.join(Group(**GROUP))
    assert error.value.argument == "processes"
    assert "KERAS_BACKEND=jax" in error.value.hint


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch):
    port = launch._free_port()
    monkeypatch.setattr(distributed, "COORDINATOR_SECONDS", 0.0)
    with pytest.raises(DistributedError) as error:
        distributed._require_answer(f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in error.value.summary


def test_a_port_in_use_is_named():
    with distributed.socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        distributed._require_answer(address)
        with pytest.raises(DistributedError) as error:
            distributed._require_free(address)
    assert address in error.value.summary


def test_a_group_that_stays_incomplete_is_an_error(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.3)
    monkeypatch.setattr(distributed, "_initialize", lambda group, failures: time.sleep(3))
    with pytest.raises(DistributedError, match="not all of the 4 processes joined"):
        distributed.join(Group(None, 4, 2))
    monkeypatch.setattr(distributed, "_initialize", lambda group, failures: failures.append(ValueError("no address")))
    with pytest.raises(DistributedError, match="no address"):
        distributed.join(Group(None, 4, 2))


class _Client:
    """JAX's client of the coordination service, for threads."""

    def __init__(self):
        self.values, self.changed, self.slices = {}, threading.Condition(), 0

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            self.slices += 1
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]


@pytest.fixture
def in_a_group(monkeypatch):
    """Runs a function in threads that pass for processes. Returns what each returned or raised."""
    client, states = _Client(), threading.local()

    def run(function, processes=3):
        results = [None] * processes

        def process(i):
            states.value = types.SimpleNamespace(client=client, num_processes=processes, process_id=i)
            try:
                results[i] = function(i)
            except Exception as error:
                results[i] = error

        threads = [threading.Thread(target=process, args=(i,)) for i in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    monkeypatch.setattr(distributed, "_state", lambda: getattr(states, "value", None))
    monkeypatch.setattr(distributed, "_SLICE_MILLISECONDS", 20)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: setattr(states, "value", None))
    run.client = client
    return run


def test_waiting_for_another_process_is_done_in_slices(in_a_group):
    def late(i):
        time.sleep(0.2 * i)
        return distributed.exchange("topic", i)

    assert in_a_group(late, 2) == [[0, 1]] * 2
    assert in_a_group.client.slices > 5


def test_different_numbers_of_processes_are_refused(in_a_group):
    errors = in_a_group(lambda i: distributed._require_same_number(Group(None, 2 + i, i)), 2)
    assert "processes=2 in process 0, processes=3 in process 1" in errors[0].summary
    assert "processes=3 in process 1, processes=2 in process 0" in errors[1].summary


def test_a_run_that_only_one_process_sees_as_finished_is_refused(in_a_group, monkeypatch):
    def settle(*arguments):
        return RunResult("run", None, []) if distributed.is_first() else None

    monkeypatch.setattr(loop, "settle", settle)
    for error in in_a_group(lambda i: loop.run(None), 2):
        assert type(error) is ArgumentError
        assert error.details == ("finished run: False in process 1, True in process 0",)
        assert "one run folder that all see" in error.hint


def test_processes_exchange_values_in_their_order(in_a_group):
    assert in_a_group(lambda i: distributed.exchange("topic", {"id": i})) == [[{"id": 0}, {"id": 1}, {"id": 2}]] * 3
    assert distributed.exchange("topic", 5) == [5]  # outside of a group


def test_all_processes_raise_if_one_fails(in_a_group):
    def settle(i):
        with distributed.agreeing("settle"):
            if i == 1:
                raise DataError("no images")

    first, failed, last = in_a_group(settle)
    assert type(failed) is DataError
    for error in (first, last):
        assert type(error) is DistributedError
        assert "process 1" in error.summary and "no images" in error.summary
        assert error.exit_code == failed.exit_code


def test_different_settings_are_refused_in_all_processes_with_both_values(in_a_group):
    def compare(i):
        distributed.require_same("same", {"seed": 0, "images": 9})
        distributed.require_same("plan", {"seed": i // 2, **({"only here": 1} if i == 2 else {})})

    for error in in_a_group(compare):
        assert type(error) is ArgumentError
        assert "process 2" in error.summary
        assert error.details == ("seed: 1 in process 2, 0 in process 0", "only here: 1 in process 2, None in process 0")


def test_only_the_first_process_prints(in_a_group, capsys, monkeypatch):
    assert (distributed.count(), distributed.index(), distributed.is_first()) == (1, 0, True)
    assert in_a_group(lambda i: (distributed.count(), distributed.index(), distributed.is_first()), 2) == [
        (2, 0, True),
        (2, 1, False),
    ]

    for i in range(2):  # one after the other, as threads share standard output
        monkeypatch.setattr(distributed, "_state", lambda i=i: types.SimpleNamespace(num_processes=2, process_id=i))
        with distributed.quiet():
            print(f"from {i}")
    assert capsys.readouterr().out == "from 0\n"


# === Devices ===


def test_devices_are_those_of_this_machine(monkeypatch):
    assert [distributed.devices_of(devices) for devices in (None, 1, "all")] == [None] * 3
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    local = [types.SimpleNamespace(process_index=0, id=i) for i in range(4)]
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    monkeypatch.setattr(jax, "devices", lambda: local)
    assert distributed.devices_of() is None
    assert distributed.devices_of(2) == local[:2]
    assert distributed.devices_of("all") == local
    with pytest.raises(ArgumentError) as error:
        distributed.devices_of(5)
    assert error.value.argument == "devices" and "at most 4" in error.value.summary


def test_the_devices_of_a_group_are_ordered_by_process(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    devices = [types.SimpleNamespace(process_index=i, id=id_) for i, id_ in ((1, 0), (0, 1), (1, 2), (0, 3))]
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(distributed, "_state", lambda: types.SimpleNamespace(num_processes=2, process_id=1))
    assert [device.id for device in distributed.devices_of()] == [1, 3, 0, 2]
    assert [device.id for device in distributed.devices_of(1)] == [1, 0]
    assert distributed.share(devices) == (1, 2, 4)
    assert distributed.share(None) == (1, 2, 1)


def test_metrics_count_each_image_once_whatever_its_weight_and_those_of_weight_0_not():
    labels, logits = np.eye(3, dtype="float32"), np.array([[3, 0, 0], [0, 2, 0], [9, 0, 0]], "float32")
    for metric, plain in (
        (Accuracy(), keras.metrics.CategoricalAccuracy()),
        (CrossEntropy(from_logits=True), keras.metrics.CategoricalCrossentropy(from_logits=True)),
    ):
        metric.update_state(labels, logits, np.array([0.5, 4.0, 0.0], "float32"))
        plain.update_state(labels[:2], logits[:2])
        assert float(metric.result()) == pytest.approx(float(plain.result()))
        metric.reset_state()
        metric.update_state(labels, logits)
        plain.reset_state()
        plain.update_state(labels, logits)
        assert float(metric.result()) == pytest.approx(float(plain.result()))


# === Launch ===


@pytest.mark.parametrize(
    ("argv", "argument"),
    [
        (["--processes", "0", "--", "train"], "processes"),
        (["--processes", "2", "--restarts", "-1", "--", "train"], "restarts"),
        (["--processes", "2"], None),
        (["--processes", "2", "train", "smoke"], None),
        (["--processes", "2", "--", "search"], None),
        (["--processes", "2", "--", "train", "--processes", "2"], "processes"),
        (["--processes", "2", "--", "train", "smoke", "--coordinator", "a:1"], "coordinator"),
        (["--processes", "2", "--", "train", "nonsense"], "RECIPE"),
        (["--processes", "2", "--", "train", "--epochs", "0"], "epochs"),
    ],
)
def test_launch_refuses_wrong_arguments_before_it_starts_anything(argv, argument):
    with pytest.raises(ArgumentError) as error:
        launch.parse(argv)
    assert error.value.argument == argument


def test_launch_passes_the_arguments_of_train():
    arguments, rest = launch.parse(["--processes", "2", "--restarts", "3", "--", "train", "smoke", "--epochs", "4"])
    assert (arguments.processes, arguments.restarts, rest) == (2, 3, ["smoke", "--epochs", "4"])


def test_each_process_gets_its_gpus():
    assert launch.devices_of_processes(2, 0) is None
    assert launch.devices_of_processes(2, 4) == ["0,1", "2,3"]
    assert launch.devices_of_processes(4, 4) == ["0", "1", "2", "3"]
    with pytest.raises(ArgumentError, match="must divide 4"):
        launch.devices_of_processes(3, 4)


LOST = f"cvt-keras train: this process {distributed.LOST}: closed by peer\n"


@pytest.mark.parametrize(
    ("codes", "outputs", "dead", "exit_code"),
    [
        ((1, -9), ("", ""), 1, 1),  # the first one lost the second
        ((-9, 1), ("", LOST), 0, 1),
        ((-6, -6, -11), ("", "", ""), 2, 1),
        ((1, 1, 1), ("", LOST, "cvt-keras train: disk full\n"), 2, 1),
        ((1, 1), ("", LOST), 0, 1),  # what the first one says is on the terminal
        ((2, 2), ("", "cvt-keras train: process 1 differs\n"), 0, 2),
        ((None, 3), ("", "Traceback\nValueError\n"), 1, 3),
    ],
)
def test_the_process_that_failed_first_is_named(codes, outputs, dead, exit_code):
    started = [types.SimpleNamespace(returncode=code) for code in codes]
    error = launch._failure(started, outputs, "RESUME")
    assert error.summary.startswith(f"process {dead} of {len(codes)} ")
    assert error.exit_code == exit_code
    assert error.details == tuple(outputs[dead].splitlines())
    assert (error.hint is not None and error.hint.endswith("RESUME")) == (codes[dead] < 0)


def _started(*codes):
    """Starts a program per exit code; `None` waits for SIGTERM."""
    return [subprocess.Popen(["sleep", "60"] if code is None else ["sh", "-c", f"exit {code}"]) for code in codes]


def test_launch_ends_the_others_when_one_dies(monkeypatch):
    monkeypatch.setattr(launch, "OTHERS_SECONDS", 0.1)
    started = _started(None, 3)
    assert launch._wait(started)
    launch._see_others_end(started)
    launch._end(started)
    assert [process.returncode for process in started] == [-15, 3]
    assert not launch._wait(_started(0, 0))


@pytest.mark.parametrize(("restarts", "failures", "runs", "code"), [(0, 1, 1, 1), (2, 1, 2, 0), (2, 3, 3, 1)])
def test_launch_resumes_as_often_as_it_may(restarts, failures, runs, code, monkeypatch, capsys):
    calls = []

    def run(processes, devices, train_argv, program):
        calls.append(train_argv)
        return DistributedError("process 1 of 2 was killed by SIGKILL") if len(calls) <= failures else None

    monkeypatch.setattr(launch, "run", run)
    argv = ["--processes", "2", "--restarts", str(restarts), "--", "train", "smoke"]
    assert launch.cli.main(["launch", *argv]) == code
    assert calls == [["smoke"], ["smoke", "--resume"], ["smoke", "--resume"]][:runs]
    assert ("process 1 of 2 was killed" in capsys.readouterr().err) == (failures > 0)


def test_launch_does_not_restart_after_a_wrong_argument(monkeypatch, capsys):
    error = DistributedError("process 0 of 2 ended with exit code 2")
    error.exit_code = 2
    calls = []
    monkeypatch.setattr(launch, "run", lambda *arguments: calls.append(arguments) or error)
    assert launch.cli.main(["launch", "--processes", "2", "--restarts", "5", "--", "train"]) == 2
    assert len(calls) == 1
    assert "To resume" not in capsys.readouterr().err
