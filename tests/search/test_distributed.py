"""A chief and its workers in one process; `test_a_chief_serves_a_worker_in_another_process` starts a second.

Time stands still for the chief unless a test advances it, so that no test depends on how fast the machine is.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from addresses import unused_address
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.src import protos
from small_search import SMOKE

from cvt_keras import cli, runs
from cvt_keras.errors import BusyError, DistributedError, DivergedError, RecipeError
from cvt_keras.search import distributed, folder, oracles, tuner
from cvt_keras.search.distributed import Worker, lead
from cvt_keras.search.space import Choice

ROOT = Path(__file__).parent.parent.parent
DEADLINE = 60.0  # seconds, far more than any step takes; only a failing test waits so long
PATIENCE = 10.0  # seconds of the chief's clock
RETRIES = {**distributed.RETRIES, "initialBackoff": "0.05s", "maxBackoff": "0.1s"}
NO_CHIEF_SECONDS = distributed.NO_CHIEF_SECONDS  # before `quick` replaces it


def _wait_until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _Clock:
    """Stands in for the module `time` in `distributed`."""

    def __init__(self):
        self.now, self.sleeps = time.monotonic(), 0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps += 1
        time.sleep(0.01)

    def advance(self, seconds):
        """Advances the time, and waits until the chief has looked at it."""
        self.now += seconds
        sleeps = self.sleeps
        _wait_until(lambda: self.sleeps >= sleeps + 2)


class _Chief(threading.Thread):
    def __init__(self, oracle, address):
        super().__init__(daemon=True)
        self.oracle, self.address, self.servicer = oracle, address, None
        self.error, self.refreshed = None, 0

    def run(self):
        try:
            lead(self.oracle, self.address, PATIENCE, self._refresh)
        except (DistributedError, OSError) as error:
            self.error = error

    def end(self):
        """Waits until the chief has ended by itself."""
        self.join(DEADLINE)
        assert not self.is_alive()
        return self

    def _refresh(self):
        self.refreshed += 1


@pytest.fixture
def address():
    return unused_address()


@pytest.fixture
def clock():
    return _Clock()


@pytest.fixture(autouse=True)
def quick(monkeypatch, clock):
    """Short pauses, and an environment in which the variables of a worker are gone after the test."""
    for name in ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "time", clock)
    monkeypatch.setattr(distributed, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", DEADLINE)
    monkeypatch.setattr(tuner, "IDLE_SECONDS", 0.02)
    policy = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRIES}]})
    reconnects = [(f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")]
    monkeypatch.setattr(distributed, "CHANNEL_OPTIONS", [*reconnects, ("grpc.service_config", policy)])


@pytest.fixture
def start_chief(address, clock, monkeypatch):
    """Starts a chief in a thread, and waits until it serves; it ends with the test."""
    chiefs = []

    class Servicer(distributed._Servicer):
        def __init__(self, oracle):
            super().__init__(oracle)
            for chief in chiefs:
                if chief.oracle is oracle:
                    chief.servicer = self

    def start(oracle):
        chief, sleeps = _Chief(oracle, address), clock.sleeps
        chiefs.append(chief)
        chief.start()
        _wait_until(lambda: clock.sleeps > sleeps or not chief.is_alive())
        return chief

    monkeypatch.setattr(distributed, "_Servicer", Servicer)
    yield start
    for chief in chiefs:
        while chief.is_alive():
            clock.now += PATIENCE + 1
            chief.join(0.05)


@pytest.fixture
def make_worker(make_oracle, tmp_path, address):
    def make(**changes):
        oracle = make_oracle(**changes)
        return Worker(oracle, oracle.candidates, tmp_path / "search", address)

    return make


@pytest.fixture
def serve(address):
    """Starts the server of a chief without its loop, which a test can stop at any moment."""
    servers = []

    def start(servicer, threads=4):
        server = grpc.server(futures.ThreadPoolExecutor(threads), options=[("grpc.so_reuseport", 0)])
        protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
        server.add_insecure_port(address)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop(None).wait(DEADLINE)


class _Client:
    """Calls of a worker, one by one."""

    def __init__(self, address):
        self.stub, self.service = protos.get_service_grpc().OracleStub(grpc.insecure_channel(address)), protos.get_service()

    def create_trial(self, tuner_id):
        request = self.service.CreateTrialRequest(tuner_id=tuner_id)
        return self.stub.CreateTrial(request, wait_for_ready=True, timeout=DEADLINE).trial.trial_id

    def send_heartbeat(self, tuner_id, trial_id):
        metadata = ((distributed.TUNER_ID, tuner_id),)
        self.stub.GetTrial(self.service.GetTrialRequest(trial_id=trial_id), metadata=metadata, timeout=DEADLINE)


@pytest.fixture
def client(address):
    return _Client(address)


def _statuses(oracle):
    return [trial.status for trial in oracle.trials.values()]


def test_workers_finish_what_a_chief_hands_out(make_oracle, make_worker, start_chief, quick_run, monkeypatch):
    chief = start_chief(make_oracle(trials=5))
    run = tuner.run

    def run_after_the_page(*args, **kwargs):
        """Lets the chief refresh its page after the first trial."""
        if len(quick_run) == 1:
            _wait_until(lambda: chief.refreshed)
        return run(*args, **kwargs)

    monkeypatch.setattr(tuner, "run", run_after_the_page)
    make_worker(trials=5).search()
    assert chief.end().error is None
    assert _statuses(chief.oracle) == [TrialStatus.COMPLETED] * 5
    assert len(quick_run) == 5 and chief.refreshed >= 2
    assert all(len(oracles.curve(trial)) == 2 for trial in chief.oracle.trials.values())


def test_a_chief_without_workers_ends(make_oracle, start_chief, clock):
    chief = start_chief(make_oracle())
    clock.advance(PATIENCE - 1)
    assert chief.is_alive()
    clock.now += 2
    error = chief.end().error
    assert "10 s" in error.summary and "--worker" in error.hint


def test_a_chief_whose_trials_are_done_ends(make_oracle, address):
    oracle = make_oracle(trials=1)
    trial = oracle.create_trial("a")
    oracle.update_trial(trial.trial_id, {oracles.OBJECTIVE: 0.5})
    trial.status = TrialStatus.COMPLETED
    oracle.end_trial(trial)
    lead(make_oracle(trials=1), address, PATIENCE, None)


def test_an_address_in_use_is_refused(make_oracle, address):
    host, port = address.split(":")
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        with pytest.raises(DistributedError) as error:
            lead(make_oracle(), address, PATIENCE, None)
    assert error.value.argument == "address"
    assert address in error.value.summary


def test_a_worker_without_a_chief_ends(make_worker, address, monkeypatch):
    assert NO_CHIEF_SECONDS < 45  # a minute, with its start
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 0.2)
    with pytest.raises(DistributedError) as error:
        make_worker()
    assert error.value.summary.endswith(address)
    assert "--chief" in error.value.hint


def test_a_worker_of_another_search_is_refused(make_oracle, make_worker, start_chief):
    start_chief(make_oracle())
    with pytest.raises(RecipeError) as error:
        make_worker(recipe=dataclasses.replace(SMOKE, seed=7))
    assert "seed: 0 for the chief, 7 here" in error.value.summary


def test_the_trial_of_a_silent_worker_goes_to_another(make_oracle, make_worker, start_chief, client, clock, quick_run, capsys):
    chief = start_chief(make_oracle(trials=2))
    lost = client.create_trial("silent")
    clock.advance(PATIENCE * 0.6)
    assert chief.oracle.ongoing_trials["silent"].trial_id == lost
    clock.advance(PATIENCE * 0.6)
    assert not chief.oracle.ongoing_trials
    make_worker(trials=2).search()
    assert chief.end().error is None
    assert _statuses(chief.oracle) == [TrialStatus.COMPLETED] * 2
    assert len(quick_run) == 2
    assert f"no heartbeat of a worker for 10 s: its trial {lost} goes to another" in capsys.readouterr().out


def test_heartbeats_keep_a_trial(make_oracle, start_chief, client, clock):
    chief = start_chief(make_oracle(trials=2))
    trial_id = client.create_trial("mine")
    for _ in range(3):
        clock.advance(PATIENCE * 0.6)
        client.send_heartbeat("mine", trial_id)
    assert chief.oracle.ongoing_trials["mine"].trial_id == trial_id
    with pytest.raises(grpc.RpcError) as error:
        client.send_heartbeat("another", trial_id)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    # A restarted chief does not know whose the trial is, and gives it back.
    chief.oracle.take_back("mine")
    client.send_heartbeat("mine", trial_id)
    assert chief.oracle.ongoing_trials["mine"].trial_id == trial_id and not chief.oracle._retry_queue


def test_a_lost_chief_stops_the_training_of_a_worker(make_oracle, make_worker, serve, address, tmp_path, monkeypatch):
    training, send_heartbeats = threading.Event(), Worker._send_heartbeats

    def train(*_, **__):
        server.stop(None).wait(DEADLINE)
        training.set()
        while True:
            time.sleep(0.01)

    def send_after_start(worker, stopped):
        training.wait(DEADLINE)
        send_heartbeats(worker, stopped)

    monkeypatch.setattr(tuner, "run", train)
    monkeypatch.setattr(Worker, "_send_heartbeats", send_after_start)
    server = serve(distributed._Servicer(make_oracle()), threads=1)
    worker = make_worker()
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 0.2)
    # Background processes of a shell ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(DistributedError) as error:
            worker.search()
        assert address in error.value.summary and "finished epochs are kept" in error.value.summary
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not (tmp_path / "search").exists()  # only the chief creates it


def test_a_worker_that_waits_for_a_trial_can_be_stopped(make_oracle, make_worker, serve, address):
    """By its heartbeat: keras-tuner's client would wait for an hour."""
    stopped = threading.Event()

    class Stuck(distributed._Servicer):
        def CreateTrial(self, request, context):
            stopped.wait(DEADLINE)

        def GetTrial(self, request, context):
            context.abort(grpc.StatusCode.UNAVAILABLE, "")

    serve(Stuck(make_oracle()))
    worker = make_worker()
    started = time.monotonic()
    with pytest.raises(DistributedError) as error:
        worker.search()
    assert address in error.value.summary and "finished epochs" not in error.value.summary
    assert time.monotonic() - started < DEADLINE
    stopped.set()


def test_the_chief_knows_why_a_trial_failed(make_oracle, make_worker, start_chief, monkeypatch):
    def run(*_, **__):
        raise DivergedError("the loss is NaN: größer", hint="Train again")

    monkeypatch.setattr(tuner, "run", run)
    chief = start_chief(make_oracle(trials=5))
    make_worker(trials=5).search()
    assert _statuses(chief.end().oracle) == [TrialStatus.FAILED] * 3
    assert oracles.reason(chief.oracle.trials["0"]) == "the loss is NaN: größer"


def test_a_worker_whose_disk_has_another_search_ends(make_oracle, make_worker, start_chief, tmp_path):
    """Its trial is left for another worker, and does not fail."""
    for trial in ("0", "1"):
        run_dir = tmp_path / "search" / folder.TRIALS / trial
        run_dir.mkdir(parents=True)
        other = dataclasses.replace(SMOKE, precision="float32", xla="off", seed=9)
        runs.write_json(run_dir / runs.RECIPE, other.settings())
    chief = start_chief(make_oracle(trials=2))
    with pytest.raises(RecipeError) as error:
        make_worker(trials=2).search()
    assert error.value.argument == "search_dir"
    assert "seed: 9 in the run, now 0" in error.value.summary
    assert chief.oracle.trials["0"].status == TrialStatus.RUNNING


def test_a_worker_waits_for_a_locked_folder(make_oracle, make_worker, start_chief, quick_run, monkeypatch, capsys):
    """A suspended worker holds the lock of its trial's folder until it wakes up."""
    quick, calls = tuner.run, []

    def run(*arguments, **options):
        calls.append(1)
        if len(calls) < 3:
            raise BusyError("another process is writing")
        return quick(*arguments, **options)

    monkeypatch.setattr(tuner, "run", run)
    chief = start_chief(make_oracle(trials=1))
    make_worker(trials=1).search()
    assert chief.end().error is None and len(quick_run) == 1 and "waiting for it" in capsys.readouterr().out


def test_a_restarted_chief_leaves_workers_their_trials(
    make_oracle, make_worker, serve, start_chief, address, quick_run, monkeypatch
):
    quick, training, go_on, asked, chiefs = tuner.run, threading.Event(), threading.Event(), threading.Event(), []

    def run(*arguments, **options):
        training.set()
        go_on.wait(DEADLINE)
        return quick(*arguments, **options)

    class Slow(distributed._Servicer):
        def GetTrial(self, request, context):
            asked.set()
            interrupted.wait(DEADLINE)
            return super().GetTrial(request, context)

    def restart():
        training.wait(DEADLINE)
        asked.wait(DEADLINE)  # a heartbeat is on its way
        stopping = server.stop(None)
        interrupted.set()
        stopping.wait(DEADLINE)
        chiefs.append(start_chief(make_oracle(trials=2)))
        _wait_until(lambda: chiefs[0].oracle.ongoing_trials)
        go_on.set()

    interrupted = threading.Event()
    monkeypatch.setattr(tuner, "run", run)
    server = serve(Slow(make_oracle(trials=2)))
    worker = make_worker(trials=2)
    threading.Thread(target=restart, daemon=True).start()
    worker.search()
    assert chiefs[0].end().error is None and len(quick_run) == 2
    assert _statuses(chiefs[0].oracle) == [TrialStatus.COMPLETED] * 2


def test_a_trial_that_the_chief_does_not_know_is_refused(make_oracle, start_chief, client):
    chief = start_chief(make_oracle())
    with pytest.raises(grpc.RpcError) as error:
        client.stub.UpdateTrial(client.service.UpdateTrialRequest(trial_id="77"), wait_for_ready=True, timeout=DEADLINE)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error.value.details() == "the search has no trial 77"
    assert chief.is_alive() and chief.servicer.error is None


def test_a_slow_choice_loses_no_worker(make_oracle, make_worker, start_chief, clock, quick_run):
    """Fitting a Gaussian process can take longer than the chief waits for a heartbeat."""
    oracle = make_oracle(trials=1)
    populate_space = oracle.populate_space

    def slow(trial_id):
        for _ in range(3):
            clock.advance(PATIENCE * 0.6)
            _wait_until(lambda: clock.now in chief.servicer.last_heard.values())  # a heartbeat came through
        return populate_space(trial_id)

    chief = start_chief(oracle)
    oracle.populate_space = slow
    make_worker(trials=1).search()
    assert chief.end().error is None and len(quick_run) == 1


def test_a_slow_choice_counts_as_a_call(make_oracle, start_chief, client, clock):
    """A worker is heard again when its choice is made, even if its heartbeats did not get through meanwhile."""
    oracle = make_oracle(trials=1)
    populate_space = oracle.populate_space

    def slow(trial_id):
        clock.now += PATIENCE * 0.6
        return populate_space(trial_id)

    oracle.populate_space = slow
    chief = start_chief(oracle)
    client.create_trial("a")
    assert chief.servicer.last_heard["a"] == clock.now


def test_the_end_of_a_trial_waits_for_a_slow_choice(make_oracle, make_worker, start_chief, client, quick_run, monkeypatch):
    """The chief chooses for another worker for longer than this one waits for a chief."""
    quick, oracle = tuner.run, make_oracle(trials=3)
    populate_space, choosing = oracle.populate_space, threading.Event()

    def slow(trial_id):
        if trial_id == "1":
            choosing.set()
            time.sleep(1.0)
        return populate_space(trial_id)

    def run(*arguments, **options):
        if quick_run:
            oracle.take_back("another")
            return quick(*arguments, **options)
        quick_run.append(None)
        threading.Thread(target=client.create_trial, args=("another",), daemon=True).start()
        choosing.wait(DEADLINE)
        raise DivergedError("the loss is NaN")  # without epochs to report, so that EndTrial comes next

    oracle.populate_space = slow
    monkeypatch.setattr(tuner, "run", run)
    monkeypatch.setattr(Worker, "_send_heartbeats", lambda worker, stopped: None)
    chief = start_chief(oracle)
    worker = make_worker(trials=3)
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 0.2)
    worker.search()
    assert chief.end().error is None
    assert _statuses(oracle) == [TrialStatus.FAILED, TrialStatus.COMPLETED, TrialStatus.COMPLETED]


def test_a_heartbeat_does_not_wait_for_a_slow_choice(make_oracle):
    oracle = make_oracle()
    trial = oracle.create_trial("a")
    oracle.take_back("a")
    with distributed.LOCKS[oracle]:
        assert distributed._claim(oracle, trial.trial_id, "a")
        assert not oracle.ongoing_trials
    assert distributed._claim(oracle, trial.trial_id, "a")
    assert oracle.ongoing_trials["a"] is trial


def test_a_chief_without_workers_does_not_end_as_done_while_trials_are_left(make_oracle, start_chief, client, clock):
    """Also if the space is used up, and one worker was told so."""
    oracle = make_oracle(trials=9, space={"stage0_depth": Choice((1, 2))})
    chief = start_chief(oracle)
    for tuner_id in ("a", "b", "c"):
        client.create_trial(tuner_id)
    clock.now += PATIENCE + 1
    assert "no heartbeat of any worker for 10 s" in str(chief.end().error)
    assert len(oracle._retry_queue) == 2


def test_ctrl_c_does_not_wait_for_a_lost_chief(make_oracle, make_worker, serve, monkeypatch):
    def run(*_, **__):
        server.stop(None).wait(DEADLINE)
        _wait_until(lambda: worker._heartbeat is not None and not worker._heartbeat.done())
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "run", run)
    server = serve(distributed._Servicer(make_oracle()))
    worker = make_worker()
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 10 * DEADLINE)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        worker.search()
    assert time.monotonic() - started < DEADLINE


def test_a_full_disk_ends_the_chief_and_its_workers(make_oracle, make_worker, start_chief, address, quick_run):
    oracle = make_oracle(trials=3)
    save = oracle._save_trial

    def full(trial):
        if trial.status == TrialStatus.COMPLETED:
            raise OSError("No space left on device")
        save(trial)

    oracle._save_trial = full
    chief = start_chief(oracle)
    with pytest.raises(DistributedError) as error:
        make_worker(trials=3).search()
    assert address in error.value.summary and "No space left" in error.value.summary
    assert "No space left" in str(chief.end().error)
    assert make_oracle(trials=3).create_trial("again").trial_id == "0"


def _processes(flags, words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KERASTUNER")}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "cvt_keras.search", *words, flag],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            cwd=ROOT,
        )
        for flag in flags
    ]


@pytest.fixture
def command(space_file, tmp_path, address):
    words = ["smoke", "--dataset", "digits", "--train-limit", "64", "--epochs", "1", "--space", str(space_file)]
    return [*words, "--search-dir", str(tmp_path / "search"), "--trials", "4", "--algorithm", "random", "--address", address]


def test_a_chief_serves_a_worker_in_another_process(command, tmp_path, table, quick_run, monkeypatch, capsys):
    """The commands of both, with trials that are not trained; --run-slow trains them."""
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 5 * DEADLINE)  # the chief imports TensorFlow first
    [chief] = _processes(["--chief"], command)
    try:
        assert cli.main(["search", *command, "--worker"]) == 0
        output = chief.communicate(timeout=DEADLINE)[0]
    finally:
        chief.kill()
    assert chief.returncode == 0, output
    assert "no more trials for this worker" in capsys.readouterr().out
    assert [row["status"] for row in table(tmp_path / "search")] == ["completed"] * 4
    assert len(quick_run) == 4
    assert "best: trial" in output and (tmp_path / "search" / "report.html").exists()


@pytest.mark.slow
def test_a_chief_and_two_workers_as_processes(command, tmp_path, table):
    """With real trainings: all trials are trained, none twice."""
    processes = _processes(["--chief", "--worker", "--worker"], command)
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(outputs)
    rows = table(tmp_path / "search")
    assert len(rows) == 4 and {row["status"] for row in rows} == {"completed"}
    lines = [line for output in outputs[1:] for line in output.splitlines()]
    started = sorted(line.split()[1].rstrip(":") for line in lines if "MACs" in line)
    trained = sorted(line.split()[1].rstrip(":") for line in lines if "% top-1" in line)
    assert started == trained == ["0", "1", "2", "3"]
    assert all("no more trials for this worker" in output for output in outputs[1:])
    for row in rows:
        report = json.loads((tmp_path / "search" / "trials" / row["trial"] / "report.json").read_text())
        assert float(row["val_accuracy"]) == pytest.approx(report["validation"]["top1"], abs=5e-5)
    assert "best: trial" in outputs[0]
