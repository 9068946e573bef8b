"""Asks TF Serving what images show; also the command `cvt-keras classify`.

It needs neither Keras nor TensorFlow; gRPC needs the messages of tensorflow-serving-api. An image that the server does not read
as training did is sent as a PNG of its pixels.
"""

import array
import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import operator
import os
import random
import re
import shlex
import socket
import stat
import sys
import time
import types
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro

from cvt_keras import cli
from cvt_keras.errors import ArgumentError, ImageError, MissingPackageError, ServingError

from . import files as image_files

MODEL = "cvt"  # as in models.config
SIGNATURE, INPUT = "serving_bytes", "image_bytes"
ADDRESSES = {"grpc": "localhost:8500", "rest": "localhost:8501"}

# What may have passed a moment later; anything else fails again.
TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
# Seconds before the first retry, doubled for each further one up to the longest; and up to a half more or less, so that
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
    """The server does not have the model; or, on a request for an answer, not its version."""


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
        ArgumentError: for an argument that can't be.
        MissingPackageError: if gRPC's packages are missing.
    """

    def __init__(
        self,
        address: str | None = None,
        protocol: str = "grpc",
        model: str = MODEL,
        version: int | None = None,
        timeout: float = 10.0,
        retries: int = 3,
    ) -> None:
        if protocol not in ADDRESSES:
            raise _argument_error("protocol", f"be one of {', '.join(ADDRESSES)}", protocol)
        address = ADDRESSES[protocol] if address is None else address
        if not _is_address(address):
            raise _argument_error("address", f"be HOST:PORT, as {ADDRESSES[protocol]}", address)
        if not model:
            raise _argument_error("model", f"be a name in models.config, as {MODEL}", model)
        if version is not None and version < 1:
            raise _argument_error("version", "be at least 1; leave it out for the newest", version)
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise _argument_error("timeout", f"be over 0 and at most {LONGEST_TIMEOUT} seconds", timeout)
        if retries < 0:
            raise _argument_error("retries", "be at least 0, which is a single try", retries)
        self.address = address
        self.protocol = protocol
        self.model = model
        self.version = version
        self.timeout = timeout
        self.retries = retries
        server = _Grpc if protocol == "grpc" else _Rest
        self._server: _Grpc | _Rest = server(address, model, version, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.close()

    def classify(self, images: Iterable[bytes]) -> list[Answer | ImageError]:
        """Asks for all images at once, and for each alone if the server refuses the whole because of one.

        Args:
            images: the `bytes` of image files, of any kind that `data.images.read` reads. Those that the server does not read
                as training did are sent as PNGs of their pixels, and so is one that it refuses.

        Returns:
            For each image an `Answer`, or the `ImageError` that says why there is none.

        Raises:
            ArgumentError: if one of them is not `bytes`.
            ServingError: if the server does not answer.
        """
        # One bad image fails its whole batch, and on a server that merges requests also those of strangers. So what can't be
        # read here is not sent.
        images = _checked(images)
        files = [_for_server(image) for image in images]
        sent = [file for file in files if isinstance(file, bytes)]
        answers: Iterator[Answer | ImageError]
        try:
            answers = iter(self._predict(sent) if sent else ())
        except ImageError:
            pairs = zip(images, files, strict=True)
            answers = (self._alone(image, file) for image, file in pairs if isinstance(file, bytes))
        return [next(answers) if isinstance(file, bytes) else file for file in files]

    def predict(self, images: Iterable[bytes]) -> list[Answer]:
        """One request, tried again after passing failures.

        Args:
            images: as in `classify`, one or more.

        Returns:
            An `Answer` for each.

        Raises:
            ArgumentError: if there are none, or one is not `bytes`.
            ImageError: if one of them can't be read, or the server refuses one. The server does not say which.
            ServingError: if it does not answer.
        """
        images = _checked(images)
        if not images:
            raise ArgumentError("`images` must be at least one. Received: none", argument="images")
        files = [image_files.for_server(image) for image in images]
        try:
            return self._predict(files)
        except ImageError:
            if not any(map(operator.is_, files, images)):
                raise
        return self._predict([image_files.as_png(image) if file is image else file for file, image in zip(files, images)])

    def _predict(self, files):
        try:
            return self._try(lambda: self._server.predict(files))
        except _NotFoundError as error:
            raise self._missing(self.versions()) from error

    def versions(self) -> list[int]:
        """The versions of the model that the server has loaded, ascending.

        Raises:
            ServingError: if it does not answer, or has no such model.
        """
        return self._try(self._server.versions)

    def _alone(self, image: bytes, file: bytes) -> Answer | ImageError:
        """Asks for one image.

        Args:
            image: the bytes of its file.
            file: what is sent for it.
        """
        # A server that merges requests refuses a good image together with a stranger's bad one. Only an image that it refuses
        # each time is bad.
        tries = self.retries + 1
        for attempt in range(max(tries, 2) if file is image else tries):
            if attempt and file is image:  # there are files that training reads and a server does not
                try:
                    file = image_files.as_png(image)
                except ImageError as error:
                    return error
            try:
                return self._predict([file])[0]
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
        """The error to raise for a `_Failure`."""
        code, text = failure.code, " ".join(failure.text.split())
        server = f"the server at {self.address}"
        tries = f"{self.retries + 1} {'try' if self.retries == 0 else 'tries'}"
        if code == "UNAVAILABLE":
            return ServingError(f"{server} is not available, {tries}: {text}", hint=f"To start one: {start_command()}")
        if code == "DEADLINE_EXCEEDED":
            return ServingError(
                f"{server} gave no answer within {self.timeout:g} s, {tries}",
                argument="timeout",
                hint="Give it a longer --timeout, or send fewer images at once by --batch",
            )
        if code == "NOT_FOUND":
            return _NotFoundError(
                f"{server} does not have the model {self.model}",
                argument="model",
                hint="Give --model a name in its models.config",
            )
        # REST calls several things a bad request.
        if code == "FAILED_PRECONDITION" or "Serving signature" in text:
            return ServingError(
                f"the model {self.model} at {self.address} does not have an export's signature {SIGNATURE}",
                argument="model",
                hint="Name another with --model",
            )
        if code == "INVALID_ARGUMENT" and "larger than maximum" in text:
            return ServingError(
                f"{server} does not take so many images at once: {text}", argument="images", hint="Give a smaller --batch"
            )
        if code == "INVALID_ARGUMENT":
            return ImageError(f"refused by the server: {_about_the_image(text)[:200]}")
        return ServingError(f"{server} failed with {code}: {text[:200]}")

    def _missing(self, loaded):
        """The error for a model of which the server has loaded the versions `loaded`."""
        server = f"the server at {self.address}"
        if self.version is None or not loaded:
            return ServingError(f"{server} has no version of {self.model} loaded at the moment; its log says why")
        return ServingError(
            f"{server} does not have version {self.version} of {self.model}, but {', '.join(map(str, loaded))}",
            argument="version",
            hint="Name one of them with --version",
        )


def start_command():
    """The command line that starts a server."""
    file = Path(__file__).with_name("docker-compose.yml")
    file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f'RUN="$PWD/runs/NAME" docker compose -f {shlex.quote(str(file))} up'


def _about_the_image(text):
    """The part of a server's text that says something about the image."""
    text = GRAPH.sub("", text).strip()
    if text.startswith(ASSERTION):
        text = text.removeprefix(ASSERTION).translate({ord(bracket): None for bracket in "[]"})
    return text


def _checked(images):
    """-> a list of them."""
    images = list(images)
    for image in images:
        if not isinstance(image, bytes):
            raise ArgumentError(f"`images` must be the bytes of files. Received: {type(image).__name__}", argument="images")
    return images


def _for_server(image):
    """The bytes to send, or the `ImageError` that says why there are none."""
    try:
        return image_files.for_server(image)
    except ImageError as error:
        return error


def _argument_error(name, rule, value):
    return ArgumentError(f"`{name}` must {rule}. Received: {name}={value}", argument=name)


def _is_address(address):
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")  # IPv6
    plain = host and not set(host) & set("/:[] ")
    return bool((bracketed or plain) and port.isdecimal() and 0 < int(port) < 65536)


class _Failure(Exception):
    """What a server says instead of an answer.

    Args:
        code: the name of a gRPC status.
        text: the server's words.
    """

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code
        self.text = text


@contextlib.contextmanager
def _read(code, text):
    """Raises a `_Failure` if the block finds that a part of an answer is missing or of another type."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _Failure(code, text) from error


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
            raise MissingPackageError(
                f"`protocol` grpc needs tensorflow-serving-api, which can't be imported: {error}",
                argument="protocol",
                hint="pip install tensorflow-serving-api; or, beside tensorflow-cpu, pip install grpcio and then pip install "
                "--no-deps tensorflow-serving-api; or use --protocol rest, which needs neither",
            ) from error
        self.grpc = grpc
        self.string = types_pb2.DT_STRING
        self.messages = predict_pb2, get_model_status_pb2
        self.model, self.version, self.timeout = model, version, timeout
        # By default gRPC receives 4 MB at most, waits longer for a connection after a failure than a retry here, and goes to
        # $http_proxy even for this machine.
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
            # A flag of the server says which of the two it fills.
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
            code, text = error.code().name, error.details() or ""
            raise _Failure(*(NO_GRPC if "Failed parsing HTTP/2" in text else (code, text))) from error


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
            status, answer = response.status, response.read()
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
                return read(json.loads(answer))
        try:
            text = json.loads(answer)["error"]
        except (ValueError, LookupError, TypeError):
            text = answer.decode(errors="replace")
        raise _Failure(CODES.get(status, f"HTTP {status}"), str(text))


class _Connection(http.client.HTTPConnection):
    """A connection whose `timeout` bounds the whole exchange.

    By hand, as the time-outs of http.client, requests and urllib3 bound each operation of the socket: a server that sends a
    byte now and then would hold the client for ever.
    """

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
        raise ValueError(f"{len(images)} images, {len(names)} names")  # which `_read` turns into a `_Failure`
    return [Answer(name, row) for name, row in zip(names, rows)]


# === Command line ===


@dataclasses.dataclass(frozen=True)
class Arguments:
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files (JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF), or folders with such files, at any depth and with any names. A
    file that is not an image or can't be read is named on stderr, and the exit code is then 1. Skipped silently in folders:
    hidden files, and what systems leave behind (Thumbs.db, desktop.ini, @eaDir, __MACOSX and the like)."""
    address: str | None = None
    """HOST:PORT of the server; localhost:8500, or localhost:8501 for REST."""
    protocol: Literal["grpc", "rest"] = "grpc"
    """How it is asked."""
    model: str = MODEL
    """The model's name in models.config."""
    version: int | None = None
    """Which export; by default the newest."""
    batch: int = 32
    """Images in a request; by batching.config the server takes 256."""
    timeout: float = 10.0
    """Seconds for each try of a request."""
    retries: int = 3
    """How many more tries where the server is not available or late."""
    top: int = 1
    """Write this many classes for each image."""
    labels: Path | None = None
    """The export's labels.txt, for the names of the classes after the first; by default they are numbers."""


def parse(argv):
    """The flags of a command line.

    Raises:
        SystemExit: by tyro, for flags that it refuses and for `--help`.
    """
    settings = {"prog": "cvt-keras classify", "description": "Ask TF Serving what images show.", "args": argv}
    arguments, more = tyro.cli(Arguments, **settings, return_unknown_args=True)
    if any(word.startswith("-") for word in more):
        return tyro.cli(Arguments, **settings)  # ends here, with the name of the unknown flag
    # Images that stand after a flag, while others stand before it.
    return dataclasses.replace(arguments, images=(*arguments.images, *map(Path, more)))


def _files(paths):
    """Yields the files that `paths` name, or that lie in these folders, as `files.within` does."""
    rule = "be files or folders of images"
    if not paths:
        raise ArgumentError(f"`images` must {rule}. Received: none", argument="images")
    for path in paths:
        if not path.exists():
            raise ArgumentError(f"`images` must {rule}. Received: {path}, which does not exist", argument="images")
        found = list(image_files.within(path)) if path.is_dir() else [(path, None)]
        if not found:
            raise ArgumentError(f"`images` must {rule}. Received: {path}, an empty folder", argument="images")
        yield from found


def _labels(file):
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"`labels` must be an export's labels.txt. Received: {file}, which can't be read: {error}", argument="labels"
        ) from error


def _batches(files, size):
    """Yields lists of up to `size` files, each with its `bytes`, or with an `ImageError` if it can't be read."""
    batch, held = [], 0
    for file, error in files:
        image = error
        if error is None:
            try:
                image = image_files.read(file)
                held += len(image)
            except ImageError as unread:
                image = unread
        batch.append((file, image))
        if len(batch) == size or held > BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _line(file, answer, top, labels):
    """The line of an answer: file, class, probability, next class, ..., separated by tabs."""
    chances = answer.probabilities
    order = sorted(range(len(chances)), key=lambda index: -chances[index])
    if labels and (len(labels) != len(chances) or labels[order[0]] != answer.name):
        raise ServingError(
            f"`labels` are those of another model: it calls class {order[0]} of {len(chances)} {answer.name}", argument="labels"
        )
    names = labels or {index: str(index) for index in order} | {order[0]: answer.name}
    shown = ((_escaped(names[index]), f"{chances[index]:.4f}") for index in order[:top])
    return "\t".join([_escaped(file), *(field for pair in shown for field in pair)])


def _escaped(name):
    """A name without tabs and line breaks, so that it stays in its column."""
    return str(name).translate({ord(character): repr(character)[1:-1] for character in "\t\n\r"})


def _is_file(stream):
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # it has no file
        return False


def main(argv):
    arguments = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file may have a name that can't be shown
    for name in ("batch", "top"):
        if (value := getattr(arguments, name)) < 1:
            raise _argument_error(name, "be at least 1", value)
    files = list(_files(arguments.images))
    labels = _labels(arguments.labels) if arguments.labels else None
    if arguments.protocol == "grpc":
        _without_tensorflow()
    names = ("address", "protocol", "model", "version", "timeout", "retries")
    client = Client(**{name: getattr(arguments, name) for name in names})
    if arguments.top > 1 and not labels:
        _warn("without --labels, an export's labels.txt, classes after the first are numbers")
    try:
        with client:
            refused = _classify(client, files, arguments.batch, arguments.top, labels)
    except BrokenPipeError:  # the reader of the lines has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again as it exits
        return 1
    return 1 if refused else 0


def _warn(text):
    print(f"cvt-keras classify: {text}", file=sys.stderr)


def _classify(client, files, batch, top, labels):
    """Writes a line for each file, and returns the number of those that have no answer."""
    # Progress is for a terminal on which the lines themselves can't be seen: they go to a file. A pipe may show them, as tee.
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
                    _warn(f"{_escaped(file)}: {answer}")
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
    """Lets this process import the messages of tensorflow-serving-api without TensorFlow.

    They import parts of `tensorflow.core`, plain protobuf, and with it all of TensorFlow: seconds, and most of a gigabyte. For
    the command only: a program that calls this can't use TensorFlow afterwards.
    """
    if "tensorflow" not in sys.modules and (spec := importlib.util.find_spec("tensorflow")):
        package = types.ModuleType("tensorflow")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["tensorflow"] = package


if __name__ == "__main__":
    sys.exit(cli.run("classify", sys.argv[1:]))
