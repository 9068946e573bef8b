"""Asks TF Serving what images show: python -m export.serving.client IMAGE...

It needs neither Keras nor TensorFlow: for REST Python alone, for gRPC the messages of tensorflow-serving-api.
"""

import array
import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import random
import re
import socket
import stat
import sys
import time
import types
import urllib.parse
from pathlib import Path
from typing import Annotated, Literal

from cvt_keras.export import command

from cvt_keras.errors import ImageError, ServingError

MODEL = "cvt"  # as in models.config
SIGNATURE, INPUT = "serving_bytes", "image_bytes"
ADDRESSES = {"grpc": "localhost:8500", "rest": "localhost:8501"}
START = 'RUN="$PWD/runs/NAME" docker compose -f export/serving/docker-compose.yml up'

# How a PNG and a JPEG begin, by which the SavedModel tells them as well.
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif")

# What may be over in a moment; anything else is answered alike the next time.
TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
# Seconds before the first repetition, doubled for each further one up to the second; and up to a half more or less, so that
# many clients do not come back at once.
BACKOFF, LONGEST_BACKOFF = 0.5, 10.0
# A batch ends with the file that takes it past this, however many images it may have.
BATCH_BYTES = 64_000_000
LONGEST_TIMEOUT = 86_400
# Where in the graph an error came up, which says nothing to whoever sent the image.
GRAPH = re.compile(r"\{\{.*?\}\} ?|\[\[.*|\[Op:.*")
# Before what the export itself says of an image, each part of it in brackets.
ASSERTION = "assertion failed: "

# gRPC's names for what REST tells by a number, as TF Serving translates them.
CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",  # not by the server, but by what stands before it
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
# What an answer of another form means, as a code and a text.
OTHER_MODEL = ("FAILED_PRECONDITION", "an answer of another form")
NO_SERVING = ("an answer that is not TF Serving's", "the REST port is 8501 by default")
NO_GRPC = ("an answer that is not gRPC's", "the gRPC port is 8500 by default")

# What a terminal takes for: from the line's beginning on, nothing.
ERASE = "\r\x1b[K"


class _NotFoundError(ServingError):
    """A server that has not the model; or, where it is asked for an answer, not the version."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an image shows.

    Args:
        name: the most probable class.
        probabilities: of every class, in the order of the export's labels.txt.
    """

    name: str
    probabilities: list[float]


class Client:
    """Asks one model on one server; a context manager.

    Args:
        address: "HOST:PORT"; `None` means `ADDRESSES[protocol]`.
        protocol: "grpc" or "rest".
        model: the name in the server's models.config.
        version: `None` means the newest that is loaded.
        timeout: seconds for each try.
        retries: how many more tries after a passing failure, each after a longer pause.

    Raises:
        ValueError: for an argument that can't be; it is named.
        ServingError: if gRPC's packages are missing.
    """

    def __init__(self, address=None, protocol="grpc", model=MODEL, version=None, timeout=10.0, retries=3):
        if protocol not in ADDRESSES:
            raise ValueError(f"`protocol` must be one of {', '.join(ADDRESSES)}. Received: protocol={protocol}")
        address = ADDRESSES[protocol] if address is None else address
        if not _is_address(address):
            raise ValueError(f"`address` must be HOST:PORT, as {ADDRESSES[protocol]}. Received: address={address}")
        if not model:
            raise ValueError(f"`model` must be a name in models.config, as {MODEL}. Received: model={model}")
        if version is not None and version < 1:
            raise ValueError(f"`version` must be at least 1; leave it out for the newest. Received: version={version}")
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise ValueError(f"`timeout` must be over 0 and at most {LONGEST_TIMEOUT} seconds. Received: timeout={timeout}")
        if retries < 0:
            raise ValueError(f"`retries` must be at least 0, which is a single try. Received: retries={retries}")
        self.address = address
        self.protocol = protocol
        self.model = model
        self.version = version
        self.timeout = timeout
        self.retries = retries
        self._server = {"grpc": _Grpc, "rest": _Rest}[protocol](address, model, version, timeout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._server.close()

    def classify(self, images):
        """Asks for all images at once, and for each alone where the server refuses the whole for the sake of one.

        Args:
            images: the `bytes` of JPEG or PNG files.

        Returns:
            For each image an `Answer`, or the `ImageError` that says why there is none.

        Raises:
            ValueError: if one of them is no `bytes`.
            ServingError: if the server does not answer.
        """
        images = _checked(images)
        # One bad image fails its whole batch, on a server that merges requests those of strangers too: what is plainly no
        # image is not sent.
        answers = [None if image.startswith(MAGIC) else ImageError("neither a PNG nor a JPEG") for image in images]
        sent = [index for index, answer in enumerate(answers) if answer is None]
        try:
            found = self.predict([images[index] for index in sent]) if sent else []
        except ImageError:
            found = [self._alone(images[index]) for index in sent]
        for index, answer in zip(sent, found):
            answers[index] = answer
        return answers

    def predict(self, images):
        """One request, tried again after passing failures.

        Args:
            images: as of `classify`, one or more.

        Returns:
            An `Answer` for each.

        Raises:
            ValueError: if there are none, or one is no `bytes`.
            ImageError: if the server refuses one of them, whichever it is.
            ServingError: if it does not answer.
        """
        images = _checked(images)
        if not images:
            raise ValueError("`images` must be at least one. Received: none")
        try:
            return self._try(lambda: self._server.predict(images))
        except _NotFoundError as error:
            raise self._missing(self.versions()) from error

    def versions(self):
        """The versions of the model that the server has loaded, ascending.

        Raises:
            ServingError: if it does not answer, or has no such model.
        """
        return self._try(self._server.versions)

    def _alone(self, image):
        # A server that merges requests refuses a good image with a stranger's bad one: bad is what it refuses each time.
        for _ in range(self.retries + 1):
            try:
                return self.predict([image])[0]
            except ImageError as error:
                refused = error
        return refused

    def _try(self, call):
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(BACKOFF * 2 ** (attempt - 1), LONGEST_BACKOFF) * random.uniform(0.5, 1.5))
            try:
                return call()
            except _Failure as failure:
                last = failure
                if failure.code not in TRANSIENT:
                    break
        raise self._error(last) from last

    def _error(self, failure):
        """A `_Failure` -> the error to raise."""
        code, said = failure.code, " ".join(failure.said.split())
        server = f"the server at {self.address}"
        tries = f"{self.retries + 1} {'try' if self.retries == 0 else 'tries'}"
        if code == "UNAVAILABLE":
            return ServingError(f"{server} is not available, {tries}: {said}. To start one: {START}")
        if code == "DEADLINE_EXCEEDED":
            return ServingError(
                f"{server} gave no answer within {self.timeout:g} s, {tries}: allow it a longer `timeout` or send fewer images"
            )
        if code == "NOT_FOUND":
            return _NotFoundError(f"{server} has no model {self.model}: give `model` a name in its models.config")
        # What REST calls a bad request is several things.
        if code == "FAILED_PRECONDITION" or "Serving signature" in said:
            signature = f"the signature {SIGNATURE} that python -m export writes"
            return ServingError(f"the model {self.model} at {self.address} has not {signature}: ask for another `model`")
        if code == "INVALID_ARGUMENT" and "larger than maximum" in said:
            return ServingError(f"{server} takes no batch of that size, make `batch` smaller: {said}")
        if code == "INVALID_ARGUMENT":
            return ImageError(f"refused by the server: {_of_the_image(said)[:200]}")
        return ServingError(f"{server} failed with {code}: {said[:200]}")

    def _missing(self, loaded):
        """The error where of the model these versions are loaded."""
        server = f"the server at {self.address}"
        if self.version is None or not loaded:
            return ServingError(f"{server} has no version of {self.model} loaded at the moment; its log says why")
        has = ", ".join(map(str, loaded))
        return ServingError(f"{server} has no version {self.version} of {self.model}: give `version` one of {has}")


def _of_the_image(said):
    """What of a server's text is of use to whoever sent the image."""
    said = GRAPH.sub("", said).strip()
    if said.startswith(ASSERTION):
        said = said.removeprefix(ASSERTION).translate({ord(bracket): None for bracket in "[]"})
    return said


def _checked(images):
    """-> a list of them."""
    images = list(images)
    for image in images:
        if not isinstance(image, bytes):
            raise ValueError(f"`images` must be the bytes of files. Received: {type(image).__name__}")
    return images


def _is_address(address):
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")  # IPv6
    plain = host and not set(host) & set("/:[] ")
    return bool((bracketed or plain) and port.isdecimal() and 0 < int(port) < 65536)


class _Failure(Exception):
    """What a server said instead of an answer.

    Args:
        code: the name of a gRPC status.
        said: its text.
    """

    def __init__(self, code, said):
        super().__init__(code, said)
        self.code = code
        self.said = said


@contextlib.contextmanager
def _read(code, said):
    """Makes a `_Failure` of what an answer lacks or has of another kind."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _Failure(code, said) from error


# === Protocols ===


class _Grpc:
    def __init__(self, address, model, version, timeout):
        try:
            import grpc
            from tensorflow.core.framework import types_pb2
            from tensorflow_serving.apis import (
                get_model_status_pb2,
                model_service_pb2_grpc,
                predict_pb2,
                prediction_service_pb2_grpc,
            )
        except ImportError as error:
            raise ServingError(
                f"gRPC needs tensorflow-serving-api ({error}): pip install tensorflow-serving-api, or beside tensorflow-cpu "
                "pip install grpcio and then pip install --no-deps tensorflow-serving-api. REST needs none of them"
            ) from error
        self.grpc = grpc
        self.string = types_pb2.DT_STRING
        self.messages = predict_pb2, get_model_status_pb2
        self.model, self.version, self.timeout = model, version, timeout
        # By default gRPC receives no more than 4 MB, after a failure waits longer for a connection than a retry here, and goes
        # to $http_proxy even for this machine.
        options = {
            "max_receive_message_length": -1,
            "max_send_message_length": -1,
            "max_reconnect_backoff_ms": 500,
            "enable_http_proxy": 0,
        }
        self.channel = grpc.insecure_channel(address, [(f"grpc.{name}", value) for name, value in options.items()])
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def predict(self, images):
        request = self.messages[0].PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = self.model, SIGNATURE
        if self.version is not None:
            request.model_spec.version.value = self.version
        tensor = request.inputs[INPUT]
        tensor.dtype = self.string
        tensor.tensor_shape.dim.add(size=len(images))
        tensor.string_val.extend(images)
        outputs = self._call(self.prediction.Predict, request).outputs
        with _read(*OTHER_MODEL):
            names = [name.decode() for name in outputs["classes"].string_val]
            flat = outputs["probabilities"]
            # One form or the other, by a flag of the server.
            flat = list(flat.float_val) or array.array("f", flat.tensor_content).tolist()
            width = len(flat) // len(images)
            return _answers(names, [flat[i * width : (i + 1) * width] for i in range(len(images))], images)

    def versions(self):
        request = self.messages[1].GetModelStatusRequest()
        request.model_spec.name = self.model
        statuses = self._call(self.models.GetModelStatus, request).model_version_status
        available = self.messages[1].ModelVersionStatus.AVAILABLE
        return sorted(status.version for status in statuses if status.state == available)

    def close(self):
        self.channel.close()

    def _call(self, method, request):
        try:
            return method(request, timeout=self.timeout)
        except self.grpc.RpcError as error:
            code, said = error.code().name, error.details() or ""
            raise _Failure(*(NO_GRPC if "Failed parsing HTTP/2" in said else (code, said))) from error


class _Rest:
    def __init__(self, address, model, version, timeout):
        host, _, port = address.rpartition(":")
        self.host, self.port, self.timeout = host.strip("[]"), int(port), timeout
        self.model = f"/v1/models/{urllib.parse.quote(model, safe='')}"
        self.path = self.model + ("" if version is None else f"/versions/{version}")

    def predict(self, images):
        instances = [{"b64": base64.b64encode(image).decode()} for image in images]
        body = json.dumps({"signature_name": SIGNATURE, "instances": instances})
        rows = self._call("POST", f"{self.path}:predict", lambda answer: answer["predictions"], body)
        with _read(*OTHER_MODEL):
            return _answers([row["classes"] for row in rows], [row["probabilities"] for row in rows], images)

    def versions(self):
        def available(answer):
            statuses = answer["model_version_status"]
            return sorted(int(status["version"]) for status in statuses if status["state"] == "AVAILABLE")

        return self._call("GET", self.model, available)

    def close(self):
        pass  # a connection for each request

    def _call(self, method, path, read, body=None):
        """What `read` makes of the answer's JSON."""
        connection = _Connection(self.host, self.port, timeout=self.timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, text = response.status, response.read()
        except TimeoutError as error:
            raise _Failure("DEADLINE_EXCEEDED", "timed out") from error
        except OSError as error:
            raise _Failure("UNAVAILABLE", error.strerror or str(error)) from error
        except http.client.IncompleteRead as error:
            raise _Failure("UNAVAILABLE", "the answer broke off") from error
        except http.client.HTTPException as error:
            raise _Failure(*NO_SERVING) from error
        finally:
            connection.close()
        if status == 200:
            with _read(*NO_SERVING):
                return read(json.loads(text))
        try:
            said = json.loads(text)["error"]
        except (ValueError, LookupError, TypeError):
            said = text.decode(errors="replace")
        raise _Failure(CODES.get(status, f"HTTP {status}"), str(said))


class _Connection(http.client.HTTPConnection):
    """One whose `timeout` is for the whole exchange, where http.client's is for each operation of the socket."""

    def connect(self):
        deadline = time.monotonic() + self.timeout
        super().connect()
        self.sock = _Socket(fileno=self.sock.detach())
        self.sock.deadline = deadline


class _Socket(socket.socket):
    def recv_into(self, *arguments):
        self._keep_deadline()
        return super().recv_into(*arguments)

    def sendall(self, *arguments):
        self._keep_deadline()
        return super().sendall(*arguments)

    def _keep_deadline(self):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)


def _answers(names, rows, images):
    if not len(names) == len(rows) == len(images) or not all(rows):
        raise ValueError(f"{len(images)} images, {len(names)} names")
    return [Answer(name, row) for name, row in zip(names, rows)]


# === Command line ===


def _arguments(argv):
    try:
        import tyro  # a program that uses the class above does without
    except ImportError as error:
        raise ServingError(f"the command needs tyro ({error}): pip install tyro") from error

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
        """JPEG or PNG files, or folders with such files in them at any depth."""
        address: str | None = None
        """HOST:PORT of the server; localhost:8500, or localhost:8501 for REST."""
        protocol: Literal["grpc", "rest"] = "grpc"
        """How it is asked."""
        model: str = MODEL
        """The model's name in models.config."""
        version: int | None = None
        """Which export; without it the newest."""
        batch: int = 32
        """Images in a request; by batching.config the server takes 256."""
        timeout: float = 10.0
        """Seconds for each try of a request."""
        retries: int = 3
        """How many more tries where the server is not available or late."""
        top: int = 1
        """Write this many classes for each image."""
        labels: Path | None = None
        """The export's labels.txt, for the names of the classes after the first; else they are numbers."""

    said = {"prog": "python -m export.serving.client", "description": __doc__.partition(":")[0], "args": argv}
    arguments, more = tyro.cli(Arguments, **said, return_unknown_args=True)
    if any(word.startswith("-") for word in more):
        return tyro.cli(Arguments, **said)  # ends here, and says which
    # Images that stand after a flag, while others stand before it.
    return dataclasses.replace(arguments, images=(*arguments.images, *map(Path, more)))


def _files(paths):
    """Files and folders -> files."""
    if not paths:
        raise ValueError("`IMAGE` must be a file or a folder of images. Received: none")
    for path in paths:
        if not path.exists():
            raise ValueError(f"`IMAGE` must be a file or a folder of images. Received: {path}, which is not there")
        within = [path]
        if path.is_dir():
            within = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
        if not within:
            raise ValueError(f"`IMAGE` must be a file or a folder of images. Received: {path}, with no {' or '.join(ENDINGS)}")
        yield from within


def _labels(file):
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`labels` must be an export's labels.txt. Received: {file}, which can't be read: {error}") from error


def _batches(files, size):
    """Lists of up to `size` files, each with its `bytes` or the `ImageError` that says why it can't be read."""
    batch, held = [], 0
    for file in files:
        try:
            image = file.read_bytes()
            held += len(image)
        except OSError as error:
            image = ImageError(f"can't be read: {error.strerror}")
        batch.append((file, image))
        if len(batch) == size or held > BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _line(file, answer, top, labels):
    """An answer's line: file, class, probability, next class, ..., with tabs between."""
    chances = answer.probabilities
    order = sorted(range(len(chances)), key=lambda index: -chances[index])
    if labels and (len(labels) != len(chances) or labels[order[0]] != answer.name):
        raise ServingError(f"`labels` are those of another model: it calls class {order[0]} of {len(chances)} {answer.name}")
    names = labels or {index: str(index) for index in order} | {order[0]: answer.name}
    shown = ((_escaped(names[index]), f"{chances[index]:.4f}") for index in order[:top])
    return "\t".join([_escaped(file), *(field for pair in shown for field in pair)])


def _escaped(name):
    """A name that keeps to its column and line."""
    return str(name).translate({ord(character): repr(character)[1:-1] for character in "\t\n\r"})


def _is_file(stream):
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # there is nothing behind it
        return False


def main(argv):
    """Runs the command line -> its exit code."""
    command.raise_on_sigterm()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file may have a name that can't be shown
    try:
        try:
            arguments = _arguments(argv)
            for name in ("batch", "top"):
                if (value := getattr(arguments, name)) < 1:
                    raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")
            files = list(_files(arguments.images))
            labels = _labels(arguments.labels) if arguments.labels else None
            taken = ("address", "protocol", "model", "version", "timeout", "retries")
            client = Client(**{name: getattr(arguments, name) for name in taken})
        except ValueError as error:
            return command.fail("client", error, 2)
        if arguments.top > 1 and not labels:
            print("client: without `labels`, an export's labels.txt, classes after the first are numbers", file=sys.stderr)
        with client:
            refused = _classify(client, files, arguments.batch, arguments.top, labels)
    except BrokenPipeError:  # of what reads the lines, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more on its way out
        return 1
    except (ServingError, OSError) as error:
        return command.fail("client", error, 1)
    except KeyboardInterrupt as stop:
        return command.stopped("client", stop)
    return 1 if refused else 0


def _classify(client, files, batch, top, labels):
    """Writes a line for each file -> how many the server did not take."""
    # For who looks on, where the lines themselves are not seen to come; a pipe's may be, as those of tee.
    progress = len(files) > batch and sys.stderr.isatty() and _is_file(sys.stdout)
    done = refused = 0
    try:
        for group in _batches(files, batch):
            answers = iter(client.classify([image for _, image in group if isinstance(image, bytes)]))
            if progress:
                print(ERASE, end="", file=sys.stderr, flush=True)
            for file, image in group:
                answer = next(answers) if isinstance(image, bytes) else image
                if isinstance(answer, ImageError):
                    refused += 1
                    print(f"client: {_escaped(file)}: {answer}", file=sys.stderr)
                else:
                    print(_line(file, answer, top, labels))
            sys.stdout.flush()
            done += len(group)
            if progress:
                print(f"{done:,} of {len(files):,} images", end="", file=sys.stderr, flush=True)
    finally:
        if progress:
            print(ERASE, end="", file=sys.stderr, flush=True)
    return refused


def _without_tensorflow():
    """Lets the messages of tensorflow-serving-api be imported alone, in a process that needs nothing else of TensorFlow.

    They import some of tensorflow.core, plain protobuf, and with it the whole of TensorFlow: seconds, and most of a gigabyte.
    """
    found = importlib.util.find_spec("tensorflow")
    if found and "tensorflow" not in sys.modules:
        package = types.ModuleType("tensorflow")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["tensorflow"] = package


if __name__ == "__main__":
    _without_tensorflow()
    sys.exit(main(sys.argv[1:]))
