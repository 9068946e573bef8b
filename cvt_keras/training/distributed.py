"""Training on several devices and by several processes, with JAX.

The processes form a group by `jax.distributed`. Each reads its share of each batch, and `keras.distribution.DataParallel` sums
the gradients of all devices. Process 0 alone writes the run folder. After the last epoch the group parts, and process 0
continues alone.

JAX ends a process by SIGABRT when another one dies or does not join, so what can be checked is checked before.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Literal

from cvt_keras import environment
from cvt_keras.data.share import Share
from cvt_keras.errors import ArgumentError, DistributedError, UserError

COORDINATOR, PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Launchers that JAX knows. Each row names the variables for the number of processes and for the index of this one, a variable
# that only launched processes have (Slurm's batch script has the first two as well), and the one by which JAX finds the
# coordinator.
_LAUNCHERS = (
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NODELIST"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
)

COORDINATOR_SECONDS = 45.0  # how long a process waits for the coordinator to answer
JOIN_SECONDS = 300.0  # how long the group waits for its last process
HEARTBEAT_SECONDS = 20  # without a heartbeat of a process until the others end
PATIENCE_SECONDS = 2.0  # before a failed process says that it waits for the others
LOST = "lost the connection to another process"  # in the error of a process that survives another one
_SLICE_MILLISECONDS = 1_000  # between two chances to answer Ctrl-C while waiting for another process

Devices = int | Literal["all"]


@dataclass(frozen=True)
class Group:
    """The processes that train together.

    Args:
        coordinator: HOST:PORT on which process 0 listens. With `None` JAX asks the launcher.
        processes: the number of processes.
        process_id: the index of this process.
    """

    coordinator: str | None
    processes: int
    process_id: int


# === Finding and joining the group ===


def find(coordinator=None, processes=None, process_id=None, variables=os.environ):
    """The group that this process belongs to, by arguments, else by environment variables, else by the launcher.

    Args:
        coordinator, processes, process_id: as for `Group`; `None` means unknown. `processes=1` means no group.
        variables: environment variables. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` stand for the
            arguments. Slurm and Open MPI set variables that JAX reads.

    Returns:
        A `Group`, or `None` if this process trains alone.

    Raises:
        ArgumentError: if an argument or variable is missing or invalid.
    """
    coordinator = coordinator or variables.get(COORDINATOR)
    processes = _number("processes", processes, PROCESSES, variables)
    process_id = _number("process_id", process_id, PROCESS_ID, variables)
    if processes == 1 and not process_id:
        return None
    launched_processes, launched_id, jax_knows_coordinator = _launched(variables)
    processes = launched_processes if processes is None else processes
    process_id = launched_id if process_id is None else process_id
    settings = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in settings.items() if value is None]
    if len(missing) == len(settings):
        return None
    if missing and not (missing == ["coordinator"] and jax_knows_coordinator):
        received = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ArgumentError(
            f"`{missing[0]}` is required for training by several processes. Received: {received}",
            argument=missing[0],
            hint="Use --coordinator HOST:PORT, --processes N and --process-id I together, or let cvt-keras launch set them",
        )
    if processes < 1:
        raise ArgumentError(f"`processes` must be at least 1. Received: processes={processes}", argument="processes")
    if not 0 <= process_id < processes:
        raise ArgumentError(
            f"`process_id` must be from 0 to {processes - 1}, as there are {processes} processes. "
            f"Received: process_id={process_id}",
            argument="process_id",
        )
    if coordinator is not None:
        host_and_port(coordinator)
    return Group(**settings)


def _number(name, value, variable, variables):
    text = variables.get(variable)
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ArgumentError(f"`{name}` must be a number. Received: {variable}={text}", argument=name)
    return int(text)


def _launched(variables):
    """The number of processes that a launcher started, the index of this one, and whether JAX finds the coordinator."""
    for number, index, own, coordinator in _LAUNCHERS:
        if variables.get(number, "1") != "1" and own in variables:
            return int(variables[number]), int(variables[index]), coordinator in variables
    return None, None, False


def host_and_port(coordinator):
    """Splits an address.

    Raises:
        ArgumentError: if it is not HOST:PORT.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ArgumentError(
            f"`coordinator` must be HOST:PORT, such as 10.0.0.1:7272. Received: coordinator={coordinator}",
            argument="coordinator",
        )
    return host.strip("[]"), int(port)


def join(group):
    """Joins the group. Must come before anything else uses JAX.

    After an error, end the process by `end_process`: a thread of JAX may still wait for the group.

    Args:
        group: a `Group`.

    Raises:
        ArgumentError: if Keras does not run on JAX, or if another process has another number of processes.
        DistributedError: if the coordinator does not answer within `COORDINATOR_SECONDS`, if its address is in use, or if the
            group is not complete after `JOIN_SECONDS`.
    """
    require_jax(f"`processes` must be 1 on {environment.backend()}. Received: processes={group.processes}", "processes")
    import jax
    from jax.experimental import multihost_utils

    # JAX's preemption service would replace Python's handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    if group.coordinator is not None:
        (_require_answer if group.process_id else _require_free)(group.coordinator)
    if group.process_id == 0:
        where = f" at {group.coordinator}" if group.coordinator else ""
        print(f"waiting until all {group.processes} processes have joined{where}", flush=True)
    # In a thread, so that this one can answer Ctrl-C.
    failures = []
    joining = threading.Thread(target=_initialize, args=(group, failures), daemon=True)
    joining.start()
    deadline = time.monotonic() + JOIN_SECONDS  # JAX would abort the process with a stack trace
    while joining.is_alive():
        joining.join(0.2)
        if time.monotonic() > deadline:
            raise DistributedError(
                f"not all of the {group.processes} processes joined within {JOIN_SECONDS:.0f} s",
                hint="Start them all, with the same --coordinator",
            )
    if failures:
        raise DistributedError(f"this process can't join its group: {failures[0]}") from failures[0]
    _require_same_number(group)
    with _without_output():
        multihost_utils.sync_global_devices("join")  # connects the devices


def _initialize(group, failures):
    import jax

    try:
        jax.distributed.initialize(
            group.coordinator,
            group.processes,
            group.process_id,
            initialization_timeout=2 * int(JOIN_SECONDS),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,  # at the exit of a process that failed alone
        )
    except (RuntimeError, ValueError) as error:
        failures.append(error)


def _require_same_number(group):
    """Raises unless all processes were started for a group of the same size. JAX does not compare the sizes."""
    _state().client.key_value_set(f"cvt_keras/processes/{index()}", str(group.processes))
    for process in range(group.processes):
        other = int(_stored(f"cvt_keras/processes/{process}"))
        if other != group.processes:
            raise ArgumentError(
                f"`processes` must be the same in all. Received: processes={group.processes} in process {index()}, "
                f"processes={other} in process {process}",
                argument="processes",
            )


@contextlib.contextmanager
def _without_output():
    """Hides what C++ code prints during the block. The library that connects CPUs prints a line in each process."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def require_jax(summary, argument):
    """Raises an `ArgumentError` with this summary unless Keras runs on JAX."""
    if environment.backend() != "jax":
        raise ArgumentError(
            summary,
            argument=argument,
            hint="Set KERAS_BACKEND=jax, after pip install jax: only on JAX can Keras train on several devices",
        )


def _require_free(coordinator):
    _, port = host_and_port(coordinator)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DistributedError(
                f"process 0 can't listen on the port of `coordinator`: {error.strerror}. Received: coordinator={coordinator}",
                argument="coordinator",
                hint="Choose another port for all processes",
            ) from error


def _require_answer(coordinator):
    host, port = host_and_port(coordinator)
    deadline = time.monotonic() + COORDINATOR_SECONDS
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"no coordinator answers at {coordinator} within {COORDINATOR_SECONDS:.0f} s: {error.strerror or error}",
                    argument="coordinator",
                    hint="Start process 0 on that machine, or check --coordinator and the firewall",
                ) from error
        time.sleep(0.5)


def end_process(code):
    """Ends this process at once. A usual exit waits for the other processes, which may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(1)  # the others need the coordinator until they have said why they end
    os._exit(code)


def is_lost(error):
    """Whether an error came from the connection to another process."""
    if count() == 1:
        return False
    import jax

    first_line = str(error).partition("\n")[0]
    says_so = re.search(r"\b(gloo|nccl|coordination|connection|peer)\b", first_line, re.IGNORECASE)
    return isinstance(error, jax.errors.JaxRuntimeError) and says_so is not None


def leave():
    """Leaves the group when all its processes do. This process can use its own devices after that. Needs no group."""
    if count() > 1:
        import jax

        wait("leave")  # process 0 may still be writing
        jax.distributed.shutdown()


# === Inside the group ===


def count():
    """The number of processes that train together."""
    return _state().num_processes if _state() else 1


def index():
    """The index of this process. Process 0 writes the run folder."""
    return _state().process_id if _state() else 0


def is_first():
    """Whether this process writes the run folder."""
    return index() == 0


def _state():
    """JAX's record of the group, or `None` outside of one. JAX has no public way to send text from process to process.

    `jax.process_count()` would start the devices, and still counts the group after it has parted.
    """
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state if distributed.global_state.client is not None else None


def exchange(topic, value):
    """Sends a value to all processes, and waits for theirs.

    Args:
        topic: a name, new in each call.
        value: a JSON value.

    Returns:
        The values of all processes, in their order.
    """
    if count() == 1:
        return [value]
    _state().client.key_value_set(f"cvt_keras/{topic}/{index()}", json.dumps(value))
    return [json.loads(_stored(f"cvt_keras/{topic}/{i}")) for i in range(count())]


def _stored(key):
    """Waits for a value of JAX's coordination service, in slices: Python answers no signal while JAX waits."""
    import jax

    while True:
        try:
            return _state().client.blocking_key_value_get(key, _SLICE_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def broadcast(arrays):
    """Gives all processes the arrays of process 0.

    Args:
        arrays: a list of NumPy arrays, of the same shapes and types in all processes.

    Returns:
        The arrays of process 0.
    """
    if count() == 1:
        return arrays
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(arrays)


def wait(topic):
    """Waits until all processes call this with the same topic, which must be new in each call."""
    exchange(topic, None)


@contextlib.contextmanager
def agreeing(topic):
    """If the block raises in one process, raises in all: what it raised there, and an error that names it elsewhere.

    The group parts before that, as it does for all errors that its processes agree on.

    Raises:
        DistributedError: if another process failed.
    """
    try:
        yield
    except UserError as error:
        text = f"process {index()} failed: {error.summary}. Waiting for the others"
        late = threading.Timer(PATIENCE_SECONDS, lambda: print(text, file=sys.__stderr__, flush=True))
        late.daemon = True
        late.start()
        exchange(topic, [error.summary, error.exit_code, error.hint])
        late.cancel()
        leave()
        raise
    for process, failure in enumerate(exchange(topic, None)):
        if failure is not None:
            summary, exit_code, hint = failure
            relayed = DistributedError(f"process {process} failed: {summary}", hint=hint)
            relayed.exit_code = exit_code
            leave()
            raise relayed


def require_same(topic, settings):
    """Raises in all processes unless they have the same settings.

    Args:
        topic: a name, new in each call.
        settings: a dict of JSON values.

    Raises:
        ArgumentError: if the settings of a process differ from those of process 0. Names both values of each.
    """
    first, *others = exchange(topic, settings)
    for process, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            leave()
            raise ArgumentError(
                f"process {process} differs from process 0",
                details=[
                    f"{name}: {other.get(name)!r} in process {process}, {first.get(name)!r} in process 0" for name in names
                ],
                hint="Start all processes with the same flags, images and versions, and with one run folder that all see",
            )


@contextlib.contextmanager
def quiet():
    """Hides the output of all processes except the first during the block. Errors that it raises are not hidden."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


# === Devices ===


def devices_of(devices=None):
    """The devices to train on.

    Args:
        devices: the number of devices of each process, or `"all"`. `None` is 1 for a process that trains alone, otherwise all.

    Returns:
        A list of JAX's devices of all processes, or `None` for one device.

    Raises:
        ArgumentError: if there are fewer devices, or if Keras runs on TensorFlow and there should be several.
    """
    if devices is not None and devices != "all" and (not isinstance(devices, int) or devices < 1):
        raise ArgumentError(f"`devices` must be a number from 1, or all. Received: devices={devices!r}", argument="devices")
    if environment.backend() != "jax":
        several = max(1, len(environment.gpus())) > 1 if devices == "all" else devices not in (None, 1)
        if several:
            require_jax(f"`devices` must be 1 on TensorFlow. Received: devices={devices}", "devices")
        return None
    import jax

    here = jax.local_device_count()
    if devices is None:
        devices = 1 if count() == 1 else here
    elif devices == "all":
        devices = here
    if devices > here:
        raise ArgumentError(
            f"`devices` must be at most {here}, the number of devices that JAX sees here. Received: devices={devices}",
            argument="devices",
            hint="On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N devices of it",
        )
    if devices == 1 and count() == 1:
        return None
    of_processes = [[device for device in jax.devices() if device.process_index == i] for i in range(count())]
    return [device for own in of_processes for device in own[:devices]]


def share(devices):
    """The `Share` of this process, for `devices_of`'s result."""
    return Share(index(), count(), len(devices) if devices else 1)


@contextlib.contextmanager
def spread(devices):
    """Makes the block's models train on these devices: each holds all weights and a part of each batch.

    Args:
        devices: what `devices_of` returned.
    """
    if devices is None:
        yield
        return
    import keras

    before = keras.distribution.distribution()
    # Not sharded by Keras: the pipeline gives each process its share.
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False))
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)
