"""One oracle for workers on many machines: keras-tuner's gRPC service, and heartbeats beside it.

By hand, as keras-tuner's own chief waits for ever for a worker that is gone, and its worker for a chief that is.
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

# As keras-tuner's own `search` imports them: there is no public name for them.
from keras_tuner.src import protos
from keras_tuner.src.distribute import oracle_chief
from keras_tuner.src.distribute.oracle_client import TIMEOUT
from keras_tuner.src.engine.oracle import LOCKS, THREADS

from cvt_keras import signals
from cvt_keras.errors import BusyError, DistributedError, RecipeError
from cvt_keras.search.options import HEARTBEAT_SECONDS, MISSED_HEARTBEATS
from cvt_keras.search.oracles import SETTINGS, differences, is_over, keras_tuner, tried
from cvt_keras.search.tuner import RecipeTuner

NO_CHIEF_SECONDS = 30.0  # without an answer, after which a worker gives up
THREADS_OF_CHIEF = 64  # more than there are workers: one that waits for a trial keeps a thread
TUNER_ID = "tuner-id"  # gRPC metadata of a heartbeat
REASON = "reason-bin"  # and of the end of a trial that failed: keras-tuner's own message has no room for it
BUSY_SECONDS = 2.0  # before a worker looks again whether a trial's folder is free
# A call that was on its way as the chief went is sent again to the next: each may come twice.
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
    """Notes who was heard when, and what went wrong.

    Attributes:
        heard: tuner id -> when, by `time.monotonic`.
        error: the first that a call raised, or `None`.
    """

    def __init__(self, oracle):
        super().__init__(oracle)
        self.heard, self.error = {}, None

    def CreateTrial(self, request, context):
        self.heard[request.tuner_id] = time.monotonic()
        with self._noted():
            response = super().CreateTrial(request, context)
        self.heard[request.tuner_id] = time.monotonic()  # once more: a choice may take longer than it is waited for
        return response

    def UpdateTrial(self, request, context):
        trial = self._known(request.trial_id, context)
        if is_over(trial):  # another worker was faster
            return protos.get_service().UpdateTrialResponse(trial=trial.to_proto())
        with self._noted():
            return super().UpdateTrial(request, context)

    def EndTrial(self, request, context):
        self._known(request.trial.trial_id, context)
        trial = Trial.from_proto(request.trial)
        trial.message = dict(context.invocation_metadata()).get(REASON, b"").decode() or None
        with self._noted():
            self.oracle.end_trial(trial)
        return protos.get_service().EndTrialResponse()

    def GetTrial(self, request, context):
        """With a worker's name a heartbeat. What it runs may have been given away while it was not heard."""
        tuner_id = dict(context.invocation_metadata()).get(TUNER_ID)
        if not tuner_id:
            return super().GetTrial(request, context)
        self.heard[tuner_id] = time.monotonic()
        if request.trial_id:
            self._known(request.trial_id, context)
            with self._noted():
                its_own = _claim(self.oracle, request.trial_id, tuner_id)
            if not its_own:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "its trial was given to another")
        return protos.get_service().GetTrialResponse()

    def _known(self, trial_id, context):
        if trial_id not in self.oracle.trials:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"there is no trial {trial_id}")
        return self.oracle.trials[trial_id]

    @contextlib.contextmanager
    def _noted(self):
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            if THREADS[self.oracle] == threading.current_thread().name:  # keras-tuner would hold its lock for ever
                THREADS[self.oracle] = None
                LOCKS[self.oracle].release()
            raise


def _claim(oracle, trial_id, tuner_id):
    """Whether a worker's trial is still its own; after a restart of the chief it is again.

    Without the lock: a worker is not to be lost while a Gaussian process is fitted for another.
    """
    if oracle.runs_for(tuner_id, trial_id):
        return True
    if not LOCKS[oracle].acquire(blocking=False):
        return True  # for now: the next heartbeat asks again
    try:
        THREADS[oracle] = threading.current_thread().name
        return oracle.give_back(trial_id, tuner_id)
    finally:
        THREADS[oracle] = None
        LOCKS[oracle].release()


def lead(oracle, address, patience, refresh):
    """Serves an oracle to workers until all trials are done.

    Args:
        oracle: of `oracles.make`, opened.
        address: HOST:PORT to listen at.
        patience: seconds; a worker that is not heard for so long has lost its trial to the others.
        refresh: called after each trial.

    Raises:
        DistributedError: if the address can't be listened at, or no worker is heard for `patience`.
    """
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=THREADS_OF_CHIEF), options=[("grpc.so_reuseport", 0)])
    servicer = _Servicer(oracle)
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise DistributedError(
            f"nothing can listen at `address`: it is in use, or not this machine's. Received: address={address}",
            argument="address",
            hint="Name another with --address",
        )
    # Of a chief before this one workers may still be at their trials: they say so.
    oracle.hold = time.monotonic() + MISSED_HEARTBEATS * HEARTBEAT_SECONDS
    server.start()
    print(f"waiting for workers at {address}: start each like this chief, with `worker` in place of `chief`", flush=True)
    began, ended = time.monotonic(), len(oracle.end_order)
    try:
        while not servicer.stop_triggered or oracle.awaits_workers():
            time.sleep(0.5)
            if isinstance(servicer.error, OSError):
                raise servicer.error
            if servicer.error:
                raise DistributedError(f"the chief failed: {servicer.error!r}") from servicer.error
            if len(oracle.end_order) > ended:
                ended = len(oracle.end_order)
                refresh()
            now = time.monotonic()
            for tuner_id, then in list(servicer.heard.items()):
                if now - then > patience:
                    del servicer.heard[tuner_id]
                    if lost := oracle.take_back(tuner_id):
                        print(f"a worker was not heard for {patience:g} s: trial {lost} goes to another", flush=True)
            if servicer.heard:
                began = now
            elif now - began >= patience and not oracle.is_done():
                raise DistributedError(
                    f"no worker was heard for {patience:g} s",
                    hint="The same command resumes the search; start workers by it, with --worker in place of --chief",
                )
            elif oracle.is_done():
                break  # the last worker went without asking for more
    finally:
        server.stop(grace=2).wait()


def require_chief(address):
    """Raises unless a chief answers. Called before a worker downloads data.

    Raises:
        DistributedError: if none answers in `NO_CHIEF_SECONDS`.
    """
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=NO_CHIEF_SECONDS)
        except grpc.FutureTimeoutError:
            raise _no_chief(address) from None


def _no_chief(address, note=""):
    return DistributedError(
        f"no chief answers at {address}{note}", hint="Start it, by the same command with --chief in place of --worker"
    )


def _settings_of(hyperparameters):
    return json.loads(next(hp.value for hp in hyperparameters.space if hp.name == SETTINGS))


class Worker(RecipeTuner):
    """Runs the trials of a chief's oracle.

    Args:
        oracle: as the chief's, to be compared with it.
        candidates, search_dir: as `RecipeTuner` has them.
        address: HOST:PORT of the chief.

    Raises:
        DistributedError: if there is no chief.
        RecipeError: if it has a different search.
    """

    def __init__(self, oracle, candidates, search_dir, address):
        self.address = address
        self._lost, self._at, self._call = None, "", None
        host, _, port = address.rpartition(":")
        os.environ |= {
            "KERASTUNER_ORACLE_IP": host,
            "KERASTUNER_ORACLE_PORT": port,
            "KERASTUNER_TUNER_ID": f"worker-{uuid.uuid4().hex[:8]}",
        }
        self._settings = _settings_of(oracle.get_space())
        # The search's folder is the chief's; keras-tuner makes one for each worker too.
        self._aside = tempfile.TemporaryDirectory(prefix="cvt_keras-worker-")
        super().__init__(oracle, candidates, search_dir, directory=self._aside.name)
        require_chief(address)
        channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.oracle.stub = protos.get_service_grpc().OracleStub(channel)
        with self._asking():
            request = protos.get_service().GetSpaceRequest()
            theirs = self.oracle.stub.GetSpace(request, wait_for_ready=True, timeout=NO_CHIEF_SECONDS)
        self._compare(_settings_of(keras_tuner.HyperParameters.from_proto(theirs.hyperparameters)))

    def search(self):
        """Runs trials until the chief has no more; in the main thread, which alone can be stopped.

        Raises:
            DistributedError: if the chief is gone, or has given up this worker.
            And what `cvt_keras.training.run` raises.
        """
        before = signal.getsignal(signal.SIGTERM)
        signals.raise_on_sigterm()
        over = threading.Event()
        beating = threading.Thread(target=self._beat, args=(over,), daemon=True)
        beating.start()
        try:
            with self._asking():
                super().search()
        except KeyboardInterrupt:
            if self._lost:
                raise self._lost from None
            raise
        finally:
            over.set()
            while beating.is_alive():
                if self._call is not None:
                    self._call.cancel()  # which would wait for a chief that is gone
                beating.join(0.1)
            signal.signal(signal.SIGTERM, before)

    def _compare(self, theirs):
        if found := differences(theirs, self._settings):
            raise RecipeError(
                f"the chief at {self.address} has a different search: {found}", hint="Give the worker the chief's settings"
            )

    def on_trial_begin(self, trial):
        self._compare(json.loads(trial.hyperparameters.values[SETTINGS]))  # it may be another chief by now
        self._at = trial.trial_id
        print(f"\ntrial {trial.trial_id}: {tried(self.candidates, trial)}", flush=True)

    def run_trial(self, trial):
        while True:
            try:
                history = super().run_trial(trial)
            except BusyError as error:  # a worker that was given up, and has not noticed yet
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
        # As long as keras-tuner: the chief may be choosing for another. That there is one the heartbeat knows.
        self.oracle.stub.EndTrial(request, metadata=metadata, wait_for_ready=True, timeout=TIMEOUT)
        self._at = ""
        self.go_on()

    def _beat(self, over):
        """Tells the chief that this worker is alive, and stops the worker if the chief is not."""
        while not over.wait(HEARTBEAT_SECONDS):
            try:
                self._call = self.oracle.stub.GetTrial.future(
                    protos.get_service().GetTrialRequest(trial_id=self._at),
                    metadata=((TUNER_ID, self.tuner_id),),
                    wait_for_ready=True,
                    timeout=NO_CHIEF_SECONDS,
                )
                self._call.result()
            except grpc.FutureCancelledError:
                return
            except grpc.RpcError as error:
                if not over.is_set():
                    self._lost = self._error_of(error)
                    # SIGTERM, as a shell has its background processes ignore SIGINT; a training stops after its step.
                    _thread.interrupt_main(signal.SIGTERM)
                return

    @contextlib.contextmanager
    def _asking(self):
        """Raises gRPC's errors as the search's own."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._error_of(error) from error

    def _error_of(self, error):
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            return DistributedError(
                f"the chief at {self.address} gave this worker up: {error.details()}", hint="Start the worker again"
            )
        if error.code() == grpc.StatusCode.UNKNOWN:
            return DistributedError(
                f"the chief at {self.address} failed: {error.details()}", hint="Start the chief again: it resumes the search"
            )
        return _no_chief(self.address, "; finished epochs are kept" if self._at else "")
