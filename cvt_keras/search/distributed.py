"""A chief that serves one oracle to workers on many machines: keras-tuner's gRPC service with heartbeats.

keras-tuner's own chief waits forever for a lost worker, and its worker for a lost chief.
"""

import _thread
import contextlib
import json
import os
import signal
import tempfile
import threading
import time
import uuid
from concurrent import futures

import grpc
from keras_tuner.engine.trial import Trial

# keras-tuner has no public names for these.
from keras_tuner.src import protos
from keras_tuner.src.distribute import oracle_chief
from keras_tuner.src.distribute.oracle_client import TIMEOUT
from keras_tuner.src.engine.oracle import LOCKS, THREADS

from cvt_keras import signals
from cvt_keras.errors import BusyError, DistributedError, RecipeError
from cvt_keras.search.options import HEARTBEAT_SECONDS, MISSED_HEARTBEATS
from cvt_keras.search.oracles import SETTINGS, differences, is_over, keras_tuner, tried
from cvt_keras.search.tuner import RecipeTuner

NO_CHIEF_SECONDS = 30.0  # without an answer before a worker gives up
CHIEF_THREADS = 64  # more than workers: a worker that waits for a trial occupies a thread
TUNER_ID = "tuner-id"  # gRPC metadata of a heartbeat
REASON = "reason-bin"  # gRPC metadata of a failed trial's end; keras-tuner's protocol has no field for it
BUSY_SECONDS = 2.0  # before a worker tries again to lock a trial's folder
POLL_SECONDS = 0.5  # between two checks of the chief
# A call that is interrupted by a restart of the chief is sent again, so any call may arrive twice.
RETRIES = {
    "maxAttempts": 5,
    "initialBackoff": "0.5s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
CHANNEL_OPTIONS = [
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRIES}]})),
]


class _Servicer(oracle_chief.OracleServicer):
    """Records when each worker was last heard, and the first error.

    Attributes:
        last_heard: tuner id -> time (`time.monotonic`) of its last call.
        error: the first error that a call raised, or `None`.
    """

    def __init__(self, oracle):
        super().__init__(oracle)
        self.last_heard, self.error = {}, None

    def CreateTrial(self, request, context):
        self.last_heard[request.tuner_id] = time.monotonic()
        with self._recording_errors():
            response = super().CreateTrial(request, context)
        self.last_heard[request.tuner_id] = time.monotonic()  # choosing values may take longer than the timeout
        return response

    def UpdateTrial(self, request, context):
        trial = self._require_trial(request.trial_id, context)
        if is_over(trial):  # another worker got it too, and was faster
            return protos.get_service().UpdateTrialResponse(trial=trial.to_proto())
        with self._recording_errors():
            return super().UpdateTrial(request, context)

    def EndTrial(self, request, context):
        self._require_trial(request.trial.trial_id, context)
        trial = Trial.from_proto(request.trial)
        trial.message = dict(context.invocation_metadata()).get(REASON, b"").decode() or None
        with self._recording_errors():
            self.oracle.end_trial(trial)
        return protos.get_service().EndTrialResponse()

    def GetTrial(self, request, context):
        """A heartbeat, if the metadata names a worker. Aborts if its trial was given to another worker."""
        tuner_id = dict(context.invocation_metadata()).get(TUNER_ID)
        if not tuner_id:
            return super().GetTrial(request, context)
        self.last_heard[tuner_id] = time.monotonic()
        if request.trial_id:
            self._require_trial(request.trial_id, context)
            with self._recording_errors():
                owns_trial = _claim(self.oracle, request.trial_id, tuner_id)
            if not owns_trial:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "its trial was given to another worker")
        return protos.get_service().GetTrialResponse()

    def _require_trial(self, trial_id, context):
        if trial_id not in self.oracle.trials:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"the search has no trial {trial_id}")
        return self.oracle.trials[trial_id]

    @contextlib.contextmanager
    def _recording_errors(self):
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            if THREADS[self.oracle] == threading.current_thread().name:  # keras-tuner never releases it
                THREADS[self.oracle] = None
                LOCKS[self.oracle].release()
            raise


def _claim(oracle, trial_id, tuner_id):
    """Whether a worker still owns its trial. After a restart of the chief the worker gets it back.

    Does not wait for keras-tuner's lock: fitting a Gaussian process for another worker holds it for long.
    """
    if oracle.runs_for(tuner_id, trial_id):
        return True
    if not LOCKS[oracle].acquire(blocking=False):
        return True  # the next heartbeat asks again
    try:
        THREADS[oracle] = threading.current_thread().name
        return oracle.give_back(trial_id, tuner_id)
    finally:
        THREADS[oracle] = None
        LOCKS[oracle].release()


def lead(oracle, address, patience, refresh):
    """Serves an oracle to workers until all trials have ended.

    Args:
        oracle: an oracle made by `oracles.make`, opened.
        address: HOST:PORT to listen on.
        patience: seconds without a call after which a worker is lost and its trial goes to another.
        refresh: called after each trial.

    Raises:
        DistributedError: if nothing can listen on the address, or no worker calls for `patience` seconds.
    """
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=CHIEF_THREADS), options=[("grpc.so_reuseport", 0)])
    servicer = _Servicer(oracle)
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise DistributedError(
            f"can't listen on `address`: it is in use, or not an address of this machine. Received: address={address}",
            argument="address",
            hint="Choose another with --address",
        )
    # Workers of an earlier chief may still train their trials; their heartbeats claim them.
    oracle.hold = time.monotonic() + MISSED_HEARTBEATS * HEARTBEAT_SECONDS
    server.start()
    print(f"waiting for workers on {address}: start each like this chief, with `worker` instead of `chief`", flush=True)
    last_call, ended = time.monotonic(), len(oracle.end_order)
    try:
        while not servicer.stop_triggered or oracle.awaits_workers():
            time.sleep(POLL_SECONDS)
            if isinstance(servicer.error, OSError):
                raise servicer.error
            if servicer.error:
                raise DistributedError(f"the chief failed: {servicer.error!r}") from servicer.error
            if len(oracle.end_order) > ended:
                ended = len(oracle.end_order)
                refresh()
            now = time.monotonic()
            for tuner_id, heard in list(servicer.last_heard.items()):
                if now - heard > patience:
                    del servicer.last_heard[tuner_id]
                    if trial_id := oracle.take_back(tuner_id):
                        print(f"no heartbeat of a worker for {patience:g} s: its trial {trial_id} goes to another", flush=True)
            if servicer.last_heard:
                last_call = now
            elif now - last_call >= patience and not oracle.is_done():
                raise DistributedError(
                    f"no heartbeat of any worker for {patience:g} s",
                    hint="The same command resumes the search; start workers with it and --worker instead of --chief",
                )
            elif oracle.is_done():
                break  # the last worker left without asking for another trial
    finally:
        server.stop(grace=2).wait()


def require_chief(address):
    """Raises unless a chief answers. A worker calls it before it loads images.

    Raises:
        DistributedError: if there is no answer within `NO_CHIEF_SECONDS`.
    """
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=NO_CHIEF_SECONDS)
        except grpc.FutureTimeoutError:
            raise _no_chief(address) from None


def _no_chief(address, note=""):
    return DistributedError(
        f"no chief answers at {address}{note}", hint="Start it with the same command and --chief instead of --worker"
    )


def _settings_of(hyperparameters):
    return json.loads(next(hp.value for hp in hyperparameters.space if hp.name == SETTINGS))


class Worker(RecipeTuner):
    """Trains the trials of a chief's oracle.

    Args:
        oracle: an oracle made from this worker's settings, which must be those of the chief.
        candidates, search_dir: as for `RecipeTuner`.
        address: HOST:PORT of the chief.

    Raises:
        DistributedError: if no chief answers.
        RecipeError: if the chief has a different search.
    """

    def __init__(self, oracle, candidates, search_dir, address):
        self.address = address
        self._stop_reason, self._trial_id, self._heartbeat = None, "", None
        host, _, port = address.rpartition(":")
        os.environ |= {
            "KERASTUNER_ORACLE_IP": host,
            "KERASTUNER_ORACLE_PORT": port,
            "KERASTUNER_TUNER_ID": f"worker-{uuid.uuid4().hex[:8]}",
        }
        self._settings = _settings_of(oracle.get_space())
        # keras-tuner makes a folder for the oracle, which a worker does not use.
        self._temporary_dir = tempfile.TemporaryDirectory(prefix="cvt_keras-worker-")
        super().__init__(oracle, candidates, search_dir, directory=self._temporary_dir.name)
        require_chief(address)
        channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.oracle.stub = protos.get_service_grpc().OracleStub(channel)
        with self._translated_errors():
            request = protos.get_service().GetSpaceRequest()
            response = self.oracle.stub.GetSpace(request, wait_for_ready=True, timeout=NO_CHIEF_SECONDS)
        self._require_same(_settings_of(keras_tuner.HyperParameters.from_proto(response.hyperparameters)))

    def search(self):
        """Trains trials until the chief has no more. Call it in the main thread: only there can a signal stop it.

        Raises:
            DistributedError: if the chief is gone, or no longer counts on this worker.
            The errors of `cvt_keras.training.run`.
        """
        previous_handler = signal.getsignal(signal.SIGTERM)
        signals.raise_on_sigterm()
        stopped = threading.Event()
        heartbeats = threading.Thread(target=self._send_heartbeats, args=(stopped,), daemon=True)
        heartbeats.start()
        try:
            with self._translated_errors():
                super().search()
        except KeyboardInterrupt:
            if self._stop_reason:
                raise self._stop_reason from None
            raise
        finally:
            stopped.set()
            while heartbeats.is_alive():
                if self._heartbeat is not None:
                    self._heartbeat.cancel()  # otherwise it waits for a chief that may be gone
                heartbeats.join(0.1)
            signal.signal(signal.SIGTERM, previous_handler)

    def _require_same(self, chief_settings):
        if changes := differences(chief_settings, self._settings, "{!r} for the chief, {!r} here"):
            raise RecipeError(
                f"the chief at {self.address} has a different search: {changes}", hint="Use the chief's flags for the worker"
            )

    def on_trial_begin(self, trial):
        self._require_same(json.loads(trial.hyperparameters.values[SETTINGS]))  # another chief may have taken the address
        self._trial_id = trial.trial_id
        print(f"\ntrial {trial.trial_id}: {tried(self.candidates, trial)}", flush=True)

    def run_trial(self, trial):
        while True:
            try:
                history = super().run_trial(trial)
            except BusyError as error:  # a lost worker still writes to it, and will stop at its next heartbeat
                print(f"{error}: waiting for it", flush=True)
                time.sleep(BUSY_SECONDS)
            else:
                best = max(row["val_accuracy"] for row in history)
                print(f"trial {trial.trial_id}: {best:.2%} top-1 on the validation images", flush=True)
                return history

    def on_trial_end(self, trial):
        if trial.message:
            print(f"trial {trial.trial_id} failed: {trial.message}", flush=True)
        metadata = ((REASON, (trial.message or "").encode()),)
        request = protos.get_service().EndTrialRequest(trial=trial.to_proto())
        # keras-tuner's long timeout: the chief may be choosing values for another worker. Heartbeats notice a lost chief.
        self.oracle.stub.EndTrial(request, metadata=metadata, wait_for_ready=True, timeout=TIMEOUT)
        self._trial_id = ""
        self.skip_pause()

    def _send_heartbeats(self, stopped):
        """Sends heartbeats to the chief, and interrupts the main thread if one is not answered or refused."""
        while not stopped.wait(HEARTBEAT_SECONDS):
            try:
                self._heartbeat = self.oracle.stub.GetTrial.future(
                    protos.get_service().GetTrialRequest(trial_id=self._trial_id),
                    metadata=((TUNER_ID, self.tuner_id),),
                    wait_for_ready=True,
                    timeout=NO_CHIEF_SECONDS,
                )
                self._heartbeat.result()
            except grpc.FutureCancelledError:
                return
            except grpc.RpcError as error:
                if not stopped.is_set():
                    self._stop_reason = self._error_of(error)
                    # Not SIGINT, which background processes of a shell ignore. A training stops after its step.
                    _thread.interrupt_main(signal.SIGTERM)
                return

    @contextlib.contextmanager
    def _translated_errors(self):
        """Raises gRPC errors as errors of the search."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._error_of(error) from error

    def _error_of(self, error):
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            return DistributedError(
                f"the chief at {self.address} refused this worker: {error.details()}", hint="Start the worker again"
            )
        if error.code() == grpc.StatusCode.UNKNOWN:
            return DistributedError(
                f"the chief at {self.address} failed: {error.details()}", hint="Start the chief again: it resumes the search"
            )
        return _no_chief(self.address, "; finished epochs are kept" if self._trial_id else "")
