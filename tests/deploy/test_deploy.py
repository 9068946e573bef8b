"""deploy/: Kubernetes' schemas and the project's own parsers read the files, and the Slurm scripts run with stubs of Slurm."""

import dataclasses
import functools
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cvt_keras.cli import COMMANDS
from cvt_keras.errors import ArgumentError

kubernetes_validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
KUBERNETES, SLURM = ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "slurm"
FILES = ["storage", "search", "train"]
SCRIPTS = ["search", "train"]
WRONG_ARGUMENT = ArgumentError("").exit_code
OLDEST = "1.31"  # of Kubernetes, as the files say
# Long options of sbatch 22.05.
SBATCH = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container contiguous
core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label
mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core
ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer
priority profile propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job switches test-only
thread-spec threads-per-core time time-min tmp uid usage use-min-nodes verbose wait wait-all-nodes wckey wrap
"""


def _parse(words):
    """Parses a command line with the parser of its command, which raises for an unknown flag or a wrong value."""
    program, name, *arguments = words
    assert program == "cvt-keras"
    parsed = importlib.import_module(COMMANDS[name].module).parse([*COMMANDS[name].before, *arguments])
    return parsed[1] if name == "train" else parsed  # train's comes with the name of the recipe


# === Kubernetes ===


@functools.cache
def _objects(file):
    """The objects of a file, by kind and name."""
    objects = yaml.safe_load_all((KUBERNETES / f"{file}.yaml").read_text())
    return {(item["kind"], item["metadata"]["name"]): item for item in objects}


def _pod(file, job):
    return _objects(file)["Job", job]["spec"]["template"]["spec"]


def _main(file, job):
    [container] = _pod(file, job)["containers"]
    return container


def _environment(container):
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def _gpus(container):
    return container["resources"]["limits"].get("nvidia.com/gpu", 0)


JOBS = [(file, name) for file in FILES for kind, name in _objects(file) if kind == "Job"]


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("file", FILES)
def test_kubernetes_knows_every_field(file, version):
    for item in _objects(file).values():
        kubernetes_validate.validate(item, version, strict=True)


def test_a_misspelt_field_is_found():
    job = _objects("train")["Job", "cvt-train"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "completion": 2}}, OLDEST, strict=True)


def test_there_are_three_jobs():
    assert JOBS == [("search", "cvt-search-chief"), ("search", "cvt-search-workers"), ("train", "cvt-train")]


@pytest.mark.parametrize("file, job", JOBS)
def test_a_wrong_argument_is_not_retried_and_an_eviction_is_no_failure(file, job):
    fail, ignore = _objects(file)["Job", job]["spec"]["podFailurePolicy"]["rules"]
    codes = {"containerName": _main(file, job)["name"], "operator": "In", "values": [WRONG_ARGUMENT]}
    assert fail == {"action": "FailJob", "onExitCodes": codes}
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert _pod(file, job)["restartPolicy"] == "Never"  # Kubernetes accepts no other with a podFailurePolicy


@pytest.mark.parametrize("file, job", JOBS)
def test_a_job_writes_to_the_shared_volume_and_keeps_the_cache_to_itself(file, job):
    container, arguments = _main(file, job), _parse(_main(file, job)["command"])
    volumes = {volume["name"]: volume for volume in _pod(file, job)["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = mounts["/shared"]["persistentVolumeClaim"]["claimName"]
    assert _objects("storage")["PersistentVolumeClaim", claim]["spec"]["accessModes"] == ["ReadWriteMany"]
    output = arguments.search_dir if file == "search" else arguments.run_dir
    assert str(output).startswith("/shared/") and arguments.recipe.data_dir.startswith("/shared/")
    assert "emptyDir" in mounts[arguments.recipe.cache_dir]


@pytest.mark.parametrize("file, job", JOBS)
def test_pods_have_few_rights_and_the_image_of_the_dockerfile(file, job):
    pod, lines = _pod(file, job), (KUBERNETES / "Dockerfile").read_text()
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert f"USER {pod['securityContext']['runAsUser']}\n" in lines and f"--uid {pod['securityContext']['runAsUser']} " in lines
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert f"-t {container['image']} ." in lines


def test_the_processes_of_a_training_find_each_other():
    job, service = _objects("train")["Job", "cvt-train"], _objects("train")["Service", "cvt-train"]
    spec, container = job["spec"], _main("train", "cvt-train")
    environment = _environment(container)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["JAX_NUM_PROCESSES"]) > 1
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert environment["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    # The pod of index 0 has the host name JOB-0, under the name of the headless Service that is its subdomain.
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    name, [port] = service["metadata"]["name"], service["spec"]["ports"]
    assert spec["template"]["spec"]["subdomain"] == name
    assert environment["JAX_COORDINATOR_ADDRESS"] == f"{job['metadata']['name']}-0.{name}:{port['port']}"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert environment["KERAS_BACKEND"] == "jax"


def test_a_training_restarts_as_a_whole_and_divides_its_batches():
    spec = _objects("train")["Job", "cvt-train"]["spec"]
    arguments = _parse(_main("train", "cvt-train")["command"])
    assert arguments.resume
    assert spec["maxFailedIndexes"] == 0 and spec["backoffLimitPerIndex"] > 0 and "backoffLimit" not in spec
    assert arguments.recipe.batch_size % (spec["completions"] * _gpus(_main("train", "cvt-train"))) == 0


def test_only_pods_of_the_job_may_connect():
    [training] = _objects("train")["NetworkPolicy", "cvt-train"]["spec"]["ingress"]
    own = _objects("train")["NetworkPolicy", "cvt-train"]["spec"]["podSelector"]
    assert own == {"matchLabels": {"batch.kubernetes.io/job-name": "cvt-train"}}
    assert training == {"from": [{"podSelector": own}]}
    policy = _objects("search")["NetworkPolicy", "cvt-search"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"batch.kubernetes.io/job-name": "cvt-search-chief"}}
    workers = {"matchLabels": {"batch.kubernetes.io/job-name": "cvt-search-workers"}}
    assert policy["ingress"] == [{"from": [{"podSelector": workers}], "ports": [{"port": 7171}]}]


def test_workers_have_the_chiefs_flags_and_address():
    chief, worker = (_main("search", f"cvt-search-{name}") for name in ("chief", "workers"))
    of_chief, of_worker = _parse(chief["command"]), _parse(worker["command"])
    assert of_chief.chief and of_worker.worker
    own = {"chief": False, "worker": False, "address": "127.0.0.1:7171"}
    assert dataclasses.replace(of_chief, **own) == dataclasses.replace(of_worker, **own)
    service = _objects("search")["Service", "cvt-search"]
    [port] = service["spec"]["ports"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "cvt-search-chief"}
    assert of_chief.address == f"0.0.0.0:{port['port']}" and of_worker.address == f"cvt-search:{port['port']}"
    [wait] = _pod("search", "cvt-search-workers")["initContainers"]
    assert f"/dev/tcp/{of_worker.address.replace(':', '/')}'" in wait["command"][-1]
    assert not _gpus(chief) and _gpus(worker) == 1
    assert _environment(chief)["KERAS_BACKEND"] == _environment(worker)["KERAS_BACKEND"]


def test_workers_wait_for_the_chief():
    [wait] = _pod("search", "cvt-search-workers")["initContainers"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1/{server.getsockname()[1]}"
        command = [word.replace("cvt-search/7171", address) for word in wait["command"]]
        assert address in command[-1]
        subprocess.run(command, check=True, timeout=10)
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, check=True, timeout=0.5)


def test_the_image_has_all_that_it_copies_and_the_tested_jax():
    lines = (KUBERNETES / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    [version] = re.findall(r'"jax\[cuda13\](==\S+)"', "\n".join(lines))
    assert f"jax{version}" in (ROOT / "requirements-dev.txt").read_text().splitlines()


# === Slurm ===

# One stub for each program. They write what they get into the folder STUBS, and end with the exit codes of the test.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$STUBS/srun"
while [[ $1 == --*=* ]]; do shift; done
highest=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID
  code=0
  "$@" || code=$?
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$STUBS/scontrol"
"""
CVT_KERAS = f"""#!{sys.executable}
import json, os, pathlib, signal, socket, sys, time
stubs = pathlib.Path(os.environ["STUBS"])
name = "chief" if "--chief" in sys.argv else "process" + os.environ["SLURM_PROCID"]
variables = {{key: os.environ.get(key) for key in ("KERAS_BACKEND", "JAX_PLATFORMS")}}
code = int(os.environ.get("CHIEF_CODE" if name == "chief" else "CODE", "0"))
if code == 143:  # stops cleanly after SIGTERM
    def stop(number, frame):
        time.sleep(0.3)
        (stubs / "stopped").touch()
        sys.exit(code)
    signal.signal(signal.SIGTERM, stop)
unfinished = stubs / f"{{name}}.unfinished"
unfinished.write_text(json.dumps([["cvt-keras", *sys.argv[1:]], variables, [os.getpid(), os.getppid()]]))
unfinished.rename(stubs / name)
if name == "chief" and code != {WRONG_ARGUMENT}:
    port = int(sys.argv[sys.argv.index("--address") + 1].partition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        while not (stubs / "process1").exists():
            time.sleep(0.05)
elif code == 143:
    time.sleep(30)
sys.exit(code)
"""


@pytest.fixture
def slurm(tmp_path):
    """A folder with the stubs, and the environment of a job on two nodes."""
    activate = tmp_path / "cvt-keras" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    activate.write_text(f'PATH="{activate.parent}:$PATH"\n')
    for path, script in {
        activate.with_name("cvt-keras"): CVT_KERAS,
        tmp_path / "bin" / "srun": SRUN,
        tmp_path / "bin" / "scontrol": SCONTROL,
    }.items():
        path.write_text(script)
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": _job_id(), "SLURM_CPUS_PER_TASK": "8", "SLURMD_NODENAME": "localhost"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return tmp_path, {**os.environ, **job, "STUBS": str(tmp_path), "HOME": str(tmp_path), "PATH": path}


def _job_id():
    """The id of a job whose port nothing uses."""
    for job in range(os.getpid() % 10_000, 30_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + job % 10_000)):
                return str(job)


def _started(slurm, script, **variables):
    folder, environment = slurm
    command = ["bash", str(SLURM / f"{script}.sh")]
    return subprocess.Popen(command, cwd=folder, env={**environment, **variables}, start_new_session=True)


def _finished(slurm, script, **variables):
    """Runs a script. Returns its exit code, and whether it requeued the job."""
    code = _started(slurm, script, **variables).wait(timeout=20)
    folder, environment = slurm
    requeued = (folder / "scontrol").exists()
    if requeued:
        assert (folder / "scontrol").read_text().split() == ["requeue", environment["SLURM_JOB_ID"]]
    return code, requeued


def _options(slurm):
    """The options that srun got."""
    words = (slurm[0] / "srun").read_text().splitlines()
    return dict(word[2:].split("=", 1) for word in words if re.match("--[a-z-]+=", word) and words.index(word) < 4)


def _record(slurm, name):
    """The command line of a process, its variables, and its process id and that of its parent."""
    return json.loads((slurm[0] / name).read_text())


def _sbatch(script):
    lines = (SLURM / f"{script}.sh").read_text().splitlines()
    words = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words), lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_sbatch_knows_the_options_and_reads_them_all(script):
    options, lines = _sbatch(script)
    assert options and set(options) <= set(SBATCH.split())
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]  # sbatch would ignore it
    assert options["gpus-per-node"] == options["ntasks-per-node"] and int(options["nodes"]) > 1
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # to the steps; with B: to the script alone
    assert "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_and_shellcheck_find_no_fault(script):
    subprocess.run(["bash", "-n", SLURM / f"{script}.sh"], check=True)
    subprocess.run([Path(sys.executable).with_name("shellcheck"), SLURM / f"{script}.sh"], check=True)


def test_each_task_trains(slurm):
    assert _finished(slurm, "train") == (0, False)
    assert _options(slurm) == {"cpus-per-task": "8", "gpu-bind": "none", "kill-on-bad-exit": "1", "wait": "0"}
    command, variables, _ = _record(slurm, "process0")
    assert _record(slurm, "process1")[:2] == [command, variables]
    assert variables["KERAS_BACKEND"] == "jax"
    arguments, options = _parse(command), _sbatch("train")[0]
    assert arguments.resume and arguments.run_dir
    assert arguments.recipe.batch_size % (int(options["nodes"]) * int(options["ntasks-per-node"])) == 0


@pytest.mark.parametrize("code, restarts, expected", [(1, 0, True), (134, 19, True), (1, 20, False)])
def test_a_failed_training_goes_back_to_the_queue(slurm, code, restarts, expected):
    variables = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    assert _finished(slurm, "train", CODE=str(code), **variables) == (code, expected)


def test_a_training_with_a_wrong_argument_does_not(slurm):
    assert _finished(slurm, "train", CODE=str(WRONG_ARGUMENT)) == (WRONG_ARGUMENT, False)


def _wait_for(path):
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_at_the_time_limit_a_training_stops_cleanly_and_goes_back_to_the_queue(slurm):
    script = _started(slurm, "train", CODE="143")
    for name in ("process0", "process1"):  # one after the other, as the stub starts them
        _wait_for(slurm[0] / name)
        for process in _record(slurm, name)[2][::-1]:  # Slurm signals all processes of the task
            os.kill(process, signal.SIGTERM)
        _wait_for(slurm[0] / "stopped")
        (slurm[0] / "stopped").unlink()
    assert script.wait(timeout=20) == 143
    assert (slurm[0] / "scontrol").exists()


def test_a_cancelled_training_does_not_go_back(slurm):
    script = _started(slurm, "train", CODE="143")
    _wait_for(slurm[0] / "process0")
    os.killpg(script.pid, signal.SIGTERM)  # scancel signals the script too
    assert script.wait(timeout=20) == -signal.SIGTERM
    assert not (slurm[0] / "scontrol").exists()


@pytest.mark.parametrize("code, expected", [(0, False), (1, True)])
def test_a_chief_and_workers_search(slurm, code, expected):
    # A worker that fails does not fail the job: the chief counts.
    assert _finished(slurm, "search", CHIEF_CODE=str(code), CODE="1") == (code, expected)
    assert _options(slurm) == {"cpus-per-task": "8", "gpu-bind": "per_task:1", "kill-on-bad-exit": "0", "wait": "0"}
    (chief, of_chief, _), (worker, of_worker, _) = _record(slurm, "chief"), _record(slurm, "process0")
    assert _record(slurm, "process1")[:2] == [worker, of_worker]
    assert of_chief == {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    assert of_worker == {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": None}
    chief, worker = _parse(chief), _parse(worker)
    assert chief.chief and worker.worker
    port = 20_000 + int(slurm[1]["SLURM_JOB_ID"]) % 10_000
    assert (chief.address, worker.address) == (f"0.0.0.0:{port}", f"localhost:{port}")
    own = {"chief": False, "worker": False, "address": ""}
    assert dataclasses.replace(chief, **own) == dataclasses.replace(worker, **own)


def test_a_search_with_a_wrong_argument_starts_no_workers_and_does_not_go_back(slurm):
    assert _finished(slurm, "search", CHIEF_CODE=str(WRONG_ARGUMENT)) == (WRONG_ARGUMENT, False)
    assert not (slurm[0] / "srun").exists()


def test_workers_get_sigterm_early_enough_for_the_chief_to_end_before_the_time_limit(slurm):
    arguments = _parse(["cvt-keras", "search", "--search-dir", "runs/search"])
    seconds = int(_sbatch("search")[0]["signal"].partition("@")[2])
    assert seconds >= 2 * arguments.worker_timeout
