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
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.src import protos
from small_search import SMOKE

from cvt_keras import runs
from cvt_keras.errors import BusyError, DistributedError, DivergedError, RecipeError
from cvt_keras.search import distributed, folder, oracles, tuner
from cvt_keras.search.distributed import Worker, lead
from cvt_keras.search.space import Choice
from cvt_keras.training import RECIPES

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def kept_environment(monkeypatch):
    """What a worker sets in its process is gone after the test."""
    for name in ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "HEARTBEAT_SECONDS", 0.1)
    yield


class _Chief(threading.Thread):
    def __init__(self, oracle, address, patience=4.0):
        super().__init__(daemon=True)
        self.oracle, self.address, self.patience = oracle, address, patience
        self.error, self.refreshed = None, 0
        self.start()

    def run(self):
        try:
            lead(self.oracle, self.address, self.patience, self._refresh)
        except (DistributedError, OSError) as error:
            self.error = error

    def _refresh(self):
        self.refreshed += 1


def _worker(make_oracle, tmp_path, address, **changes):
    oracle = make_oracle(**changes)
    return Worker(oracle, oracle.candidates, tmp_path / "search", address)


def _served(servicer, address, threads=4):
    """A chief's server alone, to be stopped at any moment."""
    server = grpc.server(futures.ThreadPoolExecutor(threads))
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    return server


def test_workers_finish_what_a_chief_hands_out(make_oracle, tmp_path, address, quick_run):
    chief = _Chief(make_oracle(trials=5), address, patience=30.0)  # a busy machine stands still for seconds
    worker = _worker(make_oracle, tmp_path, address, trials=5)
    worker.search()
    chief.join(10)
    assert not chief.is_alive() and chief.error is None
    assert [trial.status for trial in chief.oracle.trials.values()] == [TrialStatus.COMPLETED] * 5
    assert len(quick_run) == 5 and chief.refreshed >= 2
    assert all(len(oracles.curve(trial)) == 2 for trial in chief.oracle.trials.values())


def test_a_chief_without_workers_ends(make_oracle, address):
    began = time.monotonic()
    with pytest.raises(DistributedError) as error:
        lead(make_oracle(), address, 1.0, None)
    assert "1 s" in error.value.summary and "--worker" in error.value.hint
    assert time.monotonic() - began < 6


def test_a_chief_whose_trials_are_done_ends(make_oracle, address):
    oracle = make_oracle(trials=1)
    trial = oracle.create_trial("a")
    oracle.update_trial(trial.trial_id, {oracles.OBJECTIVE: 0.5})
    trial.status = TrialStatus.COMPLETED
    oracle.end_trial(trial)
    lead(make_oracle(trials=1), address, 60.0, None)


def test_an_address_in_use_is_told(make_oracle, address):
    host, port = address.split(":")
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        with pytest.raises(DistributedError) as error:
            lead(make_oracle(), address, 1.0, None)
    assert error.value.argument == "address"
    assert address in error.value.summary


def test_a_worker_without_a_chief_ends(make_oracle, tmp_path, address, monkeypatch):
    assert distributed.NO_CHIEF_SECONDS < 45  # a minute, with its start
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 0.5)
    with pytest.raises(DistributedError) as error:
        _worker(make_oracle, tmp_path, address)
    assert error.value.summary.endswith(address)
    assert "--chief" in error.value.hint


def test_a_worker_of_another_search_is_refused(make_oracle, tmp_path, address):
    _Chief(make_oracle(), address)
    other = dataclasses.replace(RECIPES["smoke"], dataset="digits", flip=False, seed=7)
    with pytest.raises(RecipeError) as error:
        _worker(make_oracle, tmp_path, address, recipe=other)
    assert "seed was 0 and is 7" in error.value.summary


def _stub(address):
    return protos.get_service_grpc().OracleStub(grpc.insecure_channel(address)), protos.get_service()


def test_the_trial_of_a_silent_worker_goes_to_another(make_oracle, tmp_path, address, quick_run, capsys):
    chief = _Chief(make_oracle(trials=2), address, patience=10.0)  # a busy machine stands still for seconds
    stub, service = _stub(address)
    lost = stub.CreateTrial(service.CreateTrialRequest(tuner_id="silent"), wait_for_ready=True, timeout=10).trial.trial_id
    _worker(make_oracle, tmp_path, address, trials=2).search()
    chief.join(30)
    assert chief.error is None and not chief.is_alive()
    assert [trial.status for trial in chief.oracle.trials.values()] == [TrialStatus.COMPLETED] * 2
    assert chief.oracle.end_order[-1] == lost and len(quick_run) == 2
    assert f"not heard for 10 s: trial {lost} goes to another" in capsys.readouterr().out


def test_heartbeats_keep_a_trial_and_a_late_one_is_told(make_oracle, address):
    chief = _Chief(make_oracle(trials=2), address, patience=3.0)
    stub, service = _stub(address)

    def beat(trial_id, tuner_id):
        metadata = ((distributed.TUNER_ID, tuner_id),)
        return stub.GetTrial(service.GetTrialRequest(trial_id=trial_id), metadata=metadata, timeout=5)

    mine = stub.CreateTrial(service.CreateTrialRequest(tuner_id="mine"), wait_for_ready=True, timeout=10).trial.trial_id
    for _ in range(16):
        time.sleep(0.25)
        beat(mine, "mine")
    assert chief.oracle.ongoing_trials["mine"].trial_id == mine
    with pytest.raises(grpc.RpcError) as error:
        beat(mine, "another")
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    # As after a restart of the chief: what is nobody's is the worker's again that is at it.
    chief.oracle.take_back("mine")
    beat(mine, "mine")
    assert chief.oracle.ongoing_trials["mine"].trial_id == mine and not chief.oracle._retry_queue


def test_a_worker_whose_chief_goes_stops_training(make_oracle, tmp_path, address, monkeypatch):
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 0.5)

    def endless(*_, **__):
        server_gone.set()
        while True:
            time.sleep(0.05)

    server_gone = threading.Event()
    monkeypatch.setattr(tuner, "run", endless)
    server = _served(distributed._Servicer(make_oracle()), address, threads=1)
    worker = _worker(make_oracle, tmp_path, address)
    threading.Thread(target=lambda: (server_gone.wait(), server.stop(None)), daemon=True).start()
    # A shell has its background processes ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(DistributedError) as error:
            worker.search()
        assert address in error.value.summary and "finished epochs are kept" in error.value.summary
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "search").exists()  # which is the chief's to make


def test_a_worker_that_waits_for_an_answer_can_be_stopped(make_oracle, tmp_path, address):
    """By its heartbeat: keras-tuner's client would wait for an hour."""
    waiting = threading.Event()

    class Stuck(distributed._Servicer):
        def CreateTrial(self, request, context):
            waiting.wait(60)

        def GetTrial(self, request, context):
            context.abort(grpc.StatusCode.UNAVAILABLE, "")

    server = _served(Stuck(make_oracle()), address)
    worker = _worker(make_oracle, tmp_path, address)
    began = time.monotonic()
    with pytest.raises(DistributedError) as error:
        worker.search()
    assert address in error.value.summary and "finished epochs" not in error.value.summary
    assert time.monotonic() - began < 10
    waiting.set()
    server.stop(None).wait()


def test_the_chief_knows_why_a_trial_failed(make_oracle, tmp_path, address, monkeypatch):
    def run(*_, **__):
        raise DivergedError("the loss is NaN: größer", hint="Train anew")

    monkeypatch.setattr(tuner, "run", run)
    chief = _Chief(make_oracle(trials=5), address, patience=30.0)  # a busy machine stands still for seconds
    _worker(make_oracle, tmp_path, address, trials=5).search()
    chief.join(10)
    assert [trial.status for trial in chief.oracle.trials.values()] == [TrialStatus.FAILED] * 3
    assert oracles.reason(chief.oracle.trials["0"]) == "the loss is NaN: größer"


def test_a_worker_whose_disk_has_another_search_ends(make_oracle, tmp_path, address):
    """Its trial is another worker's then, and not a failed one."""
    for trial in ("0", "1"):
        run_dir = tmp_path / "search" / folder.TRIALS / trial
        run_dir.mkdir(parents=True)
        other = dataclasses.replace(SMOKE, precision="float32", xla="off", seed=9)
        runs.write_json(run_dir / runs.RECIPE, other.settings())
    chief = _Chief(make_oracle(trials=2), address, patience=2.0)
    with pytest.raises(RecipeError) as error:
        _worker(make_oracle, tmp_path, address, trials=2).search()
    assert error.value.argument == "search_dir"
    assert "seed was 9 and is 0" in error.value.summary
    chief.join(10)
    assert chief.oracle.trials["0"].status == TrialStatus.RUNNING


def test_a_worker_waits_for_a_folder_that_is_not_free_yet(make_oracle, tmp_path, address, quick_run, monkeypatch, capsys):
    """As one that was frozen holds it until it wakes."""
    monkeypatch.setattr(distributed, "BUSY_SECONDS", 0.1)
    quick, tries = tuner.run, []

    def run(*given, **flags):
        tries.append(1)
        if len(tries) < 3:
            raise BusyError("another process is at work")
        return quick(*given, **flags)

    monkeypatch.setattr(tuner, "run", run)
    chief = _Chief(make_oracle(trials=1), address, patience=30.0)
    _worker(make_oracle, tmp_path, address, trials=1).search()
    chief.join(30)
    assert chief.error is None and len(quick_run) == 1 and "waiting for it" in capsys.readouterr().out


def test_a_chief_that_starts_again_leaves_workers_their_trials(make_oracle, tmp_path, address, quick_run, monkeypatch):
    quick, at_it, go_on = tuner.run, threading.Event(), threading.Event()

    def run(*given, **flags):
        at_it.set()
        go_on.wait(20)
        return quick(*given, **flags)

    monkeypatch.setattr(tuner, "run", run)
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 10.0)

    class Slow(distributed._Servicer):
        def GetTrial(self, request, context):
            asked.set()
            go_on.wait(20)
            return super().GetTrial(request, context)

    asked = threading.Event()
    server = _served(Slow(make_oracle(trials=2)), address)
    worker = _worker(make_oracle, tmp_path, address, trials=2)

    def again():
        at_it.wait(20)
        asked.wait(20)  # so that a heartbeat is on its way
        server.stop(None).wait(0.5)
        started.append(_Chief(make_oracle(trials=2), address, patience=5.0))
        until = time.monotonic() + 10
        while not started[0].oracle.ongoing_trials and time.monotonic() < until:
            time.sleep(0.05)
        go_on.set()

    started = []
    threading.Thread(target=again, daemon=True).start()
    worker.search()
    started[0].join(15)
    assert started[0].error is None and len(quick_run) == 2
    assert [trial.status for trial in started[0].oracle.trials.values()] == [TrialStatus.COMPLETED] * 2


def test_a_trial_that_the_chief_does_not_know_is_no_harm(make_oracle, address):
    chief = _Chief(make_oracle(), address)
    stub, service = _stub(address)
    with pytest.raises(grpc.RpcError) as error:
        stub.UpdateTrial(service.UpdateTrialRequest(trial_id="77"), wait_for_ready=True, timeout=10)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION and error.value.details() == "there is no trial 77"
    chief.join(10)
    assert "no worker was heard" in str(chief.error)


def test_a_slow_choice_loses_no_worker(make_oracle, tmp_path, address, quick_run, monkeypatch):
    """A Gaussian process can take longer than the patience of either side."""
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 3.0)
    oracle = make_oracle(trials=1)
    populate = oracle.populate_space

    def slow(trial_id):
        time.sleep(4)
        return populate(trial_id)

    oracle.populate_space = slow
    chief = _Chief(oracle, address, patience=3.0)
    _worker(make_oracle, tmp_path, address, trials=1).search()
    chief.join(10)
    assert chief.error is None and len(quick_run) == 1


def test_the_end_of_a_trial_waits_for_a_slow_choice(make_oracle, tmp_path, address, quick_run, monkeypatch):
    """Which the chief makes for another worker."""
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 2.0)
    quick, oracle = tuner.run, make_oracle(trials=3)
    populate, choosing = oracle.populate_space, threading.Event()

    def slow(trial_id):
        if trial_id == "1":
            choosing.set()
            time.sleep(5)
        return populate(trial_id)

    def run(*given, **flags):
        if not quick_run:  # the end of a trial that failed is all that a worker tells of it
            threading.Thread(target=ask, daemon=True).start()
            choosing.wait(20)
            quick_run.append(None)
            raise DivergedError("the loss is NaN")
        return quick(*given, **flags)

    def ask():
        stub, service = _stub(address)
        stub.CreateTrial(service.CreateTrialRequest(tuner_id="another"), wait_for_ready=True, timeout=20)

    oracle.populate_space = slow
    monkeypatch.setattr(tuner, "run", run)
    chief = _Chief(oracle, address, patience=7.0)
    _worker(make_oracle, tmp_path, address, trials=3).search()
    chief.join(15)
    assert chief.error is None
    statuses = [trial.status for trial in oracle.trials.values()]
    assert statuses == [TrialStatus.FAILED, TrialStatus.COMPLETED, TrialStatus.COMPLETED]


def test_a_slow_choice_answers_the_heartbeat_of_a_worker_that_is_known_no_more(make_oracle):
    oracle = make_oracle()
    trial = oracle.create_trial("a")
    oracle.take_back("a")
    with distributed.LOCKS[oracle]:
        assert distributed._claim(oracle, trial.trial_id, "a")
        assert not oracle.ongoing_trials
    assert distributed._claim(oracle, trial.trial_id, "a")
    assert oracle.ongoing_trials["a"] is trial


def test_a_chief_does_not_end_with_trials_that_lost_their_workers(make_oracle, address):
    """Also where the space is used up, and one worker was told so."""
    oracle = make_oracle(trials=9, space={"stage0_depth": Choice((1, 2))})
    chief = _Chief(oracle, address, patience=2.0)
    stub, service = _stub(address)
    for tuner_id in ("a", "b", "c"):
        stub.CreateTrial(service.CreateTrialRequest(tuner_id=tuner_id), wait_for_ready=True, timeout=10)
    chief.join(15)
    assert "no worker was heard for 2 s" in str(chief.error)
    assert len(oracle._retry_queue) == 2


def test_ctrl_c_does_not_wait_for_a_chief_that_is_gone(make_oracle, tmp_path, address, monkeypatch):
    def stopped(*_, **__):
        server.stop(None).wait()
        time.sleep(0.5)  # for a heartbeat that nobody answers
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "run", stopped)
    server = _served(distributed._Servicer(make_oracle()), address)
    worker = _worker(make_oracle, tmp_path, address)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        worker.search()
    assert time.monotonic() - began < 10 < distributed.NO_CHIEF_SECONDS


def test_a_disk_that_is_full_ends_the_chief_and_its_workers(make_oracle, tmp_path, address, quick_run):
    oracle = make_oracle(trials=3)
    save = oracle._save_trial

    def full(trial):
        if trial.status == TrialStatus.COMPLETED:
            raise OSError("No space left on device")
        save(trial)

    oracle._save_trial = full
    chief = _Chief(oracle, address)
    with pytest.raises(DistributedError) as error:
        _worker(make_oracle, tmp_path, address, trials=3).search()
    assert address in error.value.summary and "No space left" in error.value.summary
    chief.join(10)
    assert "No space left" in str(chief.error)
    assert make_oracle(trials=3).create_trial("again").trial_id == "0"


def test_a_chief_and_two_workers_as_processes(space_file, tmp_path, address, table):
    """With real trainings: as many trials as asked for, none lost, none run twice."""
    words = ["smoke", "--dataset", "digits", "--train-limit", "64", "--epochs", "1", "--space", str(space_file)]
    words += ["--search-dir", str(tmp_path / "search"), "--trials", "4", "--algorithm", "random", "--address", address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in environment.items() if not name.startswith("KERASTUNER")}

    def start(flag):
        return subprocess.Popen(
            [sys.executable, "-m", "cvt_keras.search", *words, flag],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    processes = [start(flag) for flag in ("--chief", "--worker", "--worker")]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(said)
    rows = table(tmp_path / "search")
    assert len(rows) == 4 and {row["status"] for row in rows} == {"completed"}
    begun = [line.split()[1].rstrip(":") for text in said[1:] for line in text.splitlines() if "MACs" in line]
    trained = [line.split()[1].rstrip(":") for text in said[1:] for line in text.splitlines() if "% top-1" in line]
    assert sorted(begun) == sorted(trained)
    assert sorted(trained) == ["0", "1", "2", "3"]
    assert all("\ntrial " in text and "nothing is left for this worker" in text for text in said[1:])  # each had its share
    for row in rows:
        report = json.loads((tmp_path / "search" / "trials" / row["trial"] / "report.json").read_text())
        assert float(row["val_accuracy"]) == pytest.approx(report["validation"]["top1"], abs=5e-5)
    assert "best: trial" in said[0] and (tmp_path / "search" / "report.html").exists()
