"""A client for TF Serving, and the command `cvt-keras classify`.

Imports neither Keras nor TensorFlow; gRPC needs the messages of tensorflow-serving-api. An image that the server does not read
as training did is decoded here and sent as a PNG.
"""

import array
import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import operator
import random
import re
import shlex
import socket
import sys
import time
import types
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro

from cvt_keras import cli, terminal
from cvt_keras.data import image_files
from cvt_keras.errors import ArgumentError, ImageError, MissingPackageError, ServingError

from . import files as server_files

MODEL = "cvt"  # as in models.config
SIGNATURE, INPUT = "serving_bytes", "image_bytes"
ADDRESSES = {"grpc": "localhost:8500", "rest": "localhost:8501"}

# Failures that may pass, which are retried.
TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
# Seconds before the first retry, doubled for each further one up to the longest. Each varies by up to a half, so that many
# clients do not retry at once.
BACKOFF, LONGEST_BACKOFF = 0.5, 10.0
# A batch ends with the file that exceeds this, even if it has fewer images than `batch`.
BATCH_BYTES = 64_000_000
LONGEST_TIMEOUT = 86_400
# The place in the graph where an error arose, which does not help who sent the image.
GRAPH = re.compile(r"\{\{.*?\}\} ?|\[\[.*|\[Op:.*")
# Starts the export's own message about an image, whose parts are in brackets.
ASSERTION = "assertion failed: "

# HTTP status -> gRPC status, as TF Serving translates them.
CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",  # from a proxy in front of the server
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
# Code and text for an answer in another format.
OTHER_MODEL = ("FAILED_PRECONDITION", "an answer in another format")
NO_SERVING = ("an answer that is not TF Serving's", "the REST port is 8501 by default")
NO_GRPC = ("an answer that is not gRPC's", "the gRPC port is 8500 by default")

# Makes a terminal erase the current line.
ERASE = "\r\x1b[K"


class _NotFoundError(ServingError):
    """The server does not have the model or, in answer to a prediction, the version."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The class of an image.

    Args:
        name: the most probable class.
        probabilities: one per class, in the order of the export's labels.txt; calibrated on validation images.
        unsure: whether the highest probability is below the threshold that training chose. `False` from exports of version 0.6
            and older.
    """

    name: str
    probabilities: list[float]
    unsure: bool = False


class Client:
    """A client for one model on one server; a context manager.

    Args:
        address: "HOST:PORT"; `None` means `ADDRESSES[protocol]`.
        protocol: "grpc" or "rest".
        model: the name in the server's models.config.
        version: the version to ask; `None` means the newest that is loaded.
        timeout: seconds for each try.
        retries: how often to retry after a temporary failure, each time after a longer pause.

    Raises:
        ArgumentError: if an argument is invalid.
        MissingPackageError: if the packages for gRPC are missing.
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
            raise _argument_error("address", f"be HOST:PORT, such as {ADDRESSES[protocol]}", address)
        if not model:
            raise _argument_error("model", f"be a name in models.config, such as {MODEL}", model)
        if version is not None and version < 1:
            raise _argument_error("version", "be at least 1; leave it out for the newest", version)
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise _argument_error("timeout", f"be over 0 and at most {LONGEST_TIMEOUT} seconds", timeout)
        if retries < 0:
            raise _argument_error("retries", "be at least 0, which means a single try", retries)
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
        """Classifies images in one request, or one by one if the server refuses that request because of an image.

        Args:
            images: the `bytes` of image files, of any format that `data.images.read` reads. A file that the server refuses, or
                does not read as training did, is decoded and sent as a PNG.

        Returns:
            For each image an `Answer`, or the `ImageError` that says why there is none.

        Raises:
            ArgumentError: if an image is not `bytes`.
            ServingError: if the server does not answer.
        """
        # One bad image fails its whole request and, on a server that merges requests, those of other clients. So an image that
        # can't be read here is not sent.
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
        """Classifies images in one request, which is retried after temporary failures.

        Args:
            images: as in `classify`, at least one.

        Returns:
            An `Answer` for each image.

        Raises:
            ArgumentError: if there are no images, or one is not `bytes`.
            ImageError: if an image can't be read, or the server refuses one. The server does not say which.
            ServingError: if the server does not answer.
        """
        images = _checked(images)
        if not images:
            raise ArgumentError("`images` must have at least one image. Received: none", argument="images")
        files = [server_files.for_server(image) for image in images]
        try:
            return self._predict(files)
        except ImageError:
            if not any(map(operator.is_, files, images)):
                raise
        return self._predict([server_files.as_png(image) if file is image else file for file, image in zip(files, images)])

    def _predict(self, files):
        try:
            return self._try(lambda: self._server.predict(files))
        except _NotFoundError as error:
            raise self._missing(self.versions()) from error

    def versions(self) -> list[int]:
        """The versions of the model that the server has loaded, ascending.

        Raises:
            ServingError: if the server does not answer, or does not have the model.
        """
        return self._try(self._server.versions)

    def _alone(self, image: bytes, file: bytes) -> Answer | ImageError:
        """Classifies one image.

        Args:
            image: the bytes of its file.
            file: the bytes to send for it.
        """
        # A server that merges requests refuses a good image together with another client's bad one. So an image is bad only if
        # it is refused each time.
        tries = self.retries + 1
        for attempt in range(max(tries, 2) if file is image else tries):
            if attempt and file is image:  # training reads some files that a server does not
                try:
                    file = server_files.as_png(image)
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
                last_failure = failure
                if failure.code not in TRANSIENT:
                    break
        raise self._error(last_failure) from last_failure

    def _error(self, failure):
        """The error to raise for a `_Failure`."""
        code, text = failure.code, " ".join(failure.text.split())
        server = f"the server at {self.address}"
        tries = f"{self.retries + 1} {'try' if self.retries == 0 else 'tries'}"
        if code == "UNAVAILABLE":
            return ServingError(f"{server} is not available after {tries}: {text}", hint=f"Start it with: {start_command()}")
        if code == "DEADLINE_EXCEEDED":
            return ServingError(
                f"{server} did not answer within {self.timeout:g} s, {tries}",
                argument="timeout",
                hint="Set a longer --timeout, or send fewer images per request with --batch",
            )
        if code == "NOT_FOUND":
            return _NotFoundError(
                f"{server} does not have the model {self.model}",
                argument="model",
                hint="Set --model to a name in its models.config",
            )
        # REST answers 400 for several faults.
        if code == "FAILED_PRECONDITION" or "Serving signature" in text:
            return ServingError(
                f"the model {self.model} at {self.address} does not have an export's signature {SIGNATURE}",
                argument="model",
                hint="Set --model to another model of the server",
            )
        if code == "INVALID_ARGUMENT" and "larger than maximum" in text:
            return ServingError(
                f"{server} does not accept so many images per request: {text}", argument="images", hint="Set a smaller --batch"
            )
        if code == "INVALID_ARGUMENT":
            return ImageError(f"refused by the server: {_about_the_image(text)[:200]}")
        return ServingError(f"{server} failed with {code}: {text[:200]}")

    def _missing(self, loaded):
        """The error for a missing model or version. `loaded` are the versions that the server has loaded."""
        server = f"the server at {self.address}"
        if self.version is None or not loaded:
            return ServingError(f"{server} has not loaded any version of {self.model}; its log says why")
        return ServingError(
            f"{server} does not have version {self.version} of {self.model}, only {', '.join(map(str, loaded))}",
            argument="version",
            hint="Set --version to one of them, or leave it out",
        )


def start_command():
    """The command line that starts a server."""
    file = Path(__file__).with_name("docker-compose.yml")
    file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f'RUN="$PWD/runs/NAME" docker compose -f {shlex.quote(str(file))} up'


def _about_the_image(text):
    """The part of a server's message that concerns the image."""
    text = GRAPH.sub("", text).strip()
    if text.startswith(ASSERTION):
        text = text.removeprefix(ASSERTION).translate({ord(bracket): None for bracket in "[]"})
    return text


def _checked(images):
    """Returns `images` as a list, or raises an `ArgumentError` if one is not `bytes`."""
    images = list(images)
    for image in images:
        if not isinstance(image, bytes):
            raise ArgumentError(
                f"`images` must hold the bytes of image files. Received: {type(image).__name__}", argument="images"
            )
    return images


def _for_server(image):
    """The bytes to send, or the `ImageError` that says why there are none."""
    try:
        return server_files.for_server(image)
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
    """A server's error.

    Args:
        code: the name of a gRPC status.
        text: the server's message.
    """

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code
        self.text = text


@contextlib.contextmanager
def _read(code, text):
    """Raises a `_Failure` if the block fails because a part of an answer is missing or has another type."""
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
        # By default gRPC receives at most 4 MB, waits longer before it reconnects than a retry here, and uses $http_proxy even
        # for this machine.
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
            # Which of the two is filled depends on a flag of the server.
            flat = list(flat.float_val) or array.array("f", flat.tensor_content).tolist()
            width = len(flat) // len(images)
            unsure = outputs["unsure"]  # empty from an export of an older version
            unsure = list(unsure.bool_val) or list(map(bool, unsure.tensor_content))
            return _answers(names, [flat[i * width : (i + 1) * width] for i in range(len(images))], unsure, images)

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
            unsure = [row["unsure"] for row in rows if "unsure" in row]
            return _answers([row["classes"] for row in rows], [row["probabilities"] for row in rows], unsure, images)

    def versions(self):
        def available(answer):
            statuses = answer["model_version_status"]
            return sorted(int(status["version"]) for status in statuses if status["state"] == "AVAILABLE")

        return self._call("GET", self.model, available)

    def close(self):
        pass  # each request has its own connection

    def _call(self, method, path, read, body=None):
        """Returns what `read` makes of the answer's JSON."""
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
            raise _Failure("UNAVAILABLE", "the connection closed in the middle of the answer") from error
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
    """A connection whose `timeout` limits the whole exchange.

    The timeouts of http.client, requests and urllib3 limit each operation of the socket: a server that sends a byte now and
    then would hold the client forever.
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
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self.settimeout(seconds)


def _answers(names, rows, unsure, images):
    unsure = unsure or [False] * len(images)
    if not len(names) == len(rows) == len(unsure) == len(images) or not all(rows):
        raise ValueError(f"{len(images)} images, {len(names)} names")  # which `_read` turns into a `_Failure`
    return [Answer(*answer) for answer in zip(names, rows, unsure)]


# === Command line ===


@dataclasses.dataclass(frozen=True)
class Arguments:
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files; folders, which are searched at any depth; patterns such as 'photos/*.jpg'; or - for a list of paths on
    standard input.
    Formats: JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF, and HEIC with pillow-heif.
    A file that is not an image or can't be read is reported on stderr, with exit code 1.
    Hidden files and system files in folders (Thumbs.db, desktop.ini, @eaDir, __MACOSX and the like) are skipped."""
    address: str | None = None
    """HOST:PORT of the server; by default localhost:8500, or localhost:8501 with --protocol rest."""
    protocol: Literal["grpc", "rest"] = "grpc"
    """gRPC or REST."""
    model: str = MODEL
    """The model's name in models.config."""
    version: int | None = None
    """Version of the export; by default the newest."""
    batch: int = 32
    """Images per request, at most 256 (batching.config)."""
    timeout: float = 10.0
    """Timeout per attempt, in seconds."""
    retries: int = 3
    """Retries if the server is unavailable or times out."""
    top: int = 1
    """Classes to print per image, most probable first."""
    labels: Path | None = None
    """The export's labels.txt. Needed for class names beyond the first; otherwise --top prints numbers."""


def parse(argv):
    """Parses the command line.

    Raises:
        ArgumentError: for a number that is too small.
        SystemExit: from tyro, for invalid flags and for `--help`.
    """
    arguments = cli.parse_images(
        Arguments, argv, prog="cvt-keras classify", description="Classify images with a TF Serving server."
    )
    for name in ("batch", "top"):
        if (value := getattr(arguments, name)) < 1:
            raise _argument_error(name, "be at least 1", value)
    return arguments


def _labels(file):
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"`labels` must be an export's labels.txt. Received: {file}, which can't be read: {error}", argument="labels"
        ) from error


def _batches(files, size):
    """Yields lists of up to `size` pairs: a file, and its `bytes` or the `ImageError` that says why it can't be read."""
    batch, batch_bytes = [], 0
    for file, error in files:
        image = error
        if error is None:
            try:
                image = image_files.read(file)
                batch_bytes += len(image)
            except ImageError as reason:
                image = reason
        batch.append((file, image))
        if len(batch) == size or batch_bytes > BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def _line(file, answer, top, labels):
    """Formats an answer: file, class, probability, next class, and so on, then `unsure` if it is, separated by tabs."""
    probabilities = answer.probabilities
    order = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])
    if labels and (len(labels) != len(probabilities) or labels[order[0]] != answer.name):
        raise ServingError(
            f"`labels` do not fit the model, which has {len(probabilities)} classes and names class {order[0]} {answer.name}",
            argument="labels",
        )
    names = labels or {index: str(index) for index in order} | {order[0]: answer.name}
    columns = ((terminal.one_line(names[index]), f"{probabilities[index]:.4f}") for index in order[:top])
    unsure = ["unsure"] if answer.unsure else []
    return "\t".join([terminal.one_line(file), *(field for pair in columns for field in pair), *unsure])


def main(argv):
    arguments = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may have characters that stdout can't encode
    files = list(image_files.listed(arguments.images))
    labels = _labels(arguments.labels) if arguments.labels else None
    if arguments.protocol == "grpc":
        _without_tensorflow()
    names = ("address", "protocol", "model", "version", "timeout", "retries")
    client = Client(**{name: getattr(arguments, name) for name in names})
    if arguments.top > 1 and not labels:
        _warn("without --labels (the export's labels.txt), classes after the first are numbers")
    try:
        with client:
            refused = _classify(client, files, arguments.batch, arguments.top, labels)
    except BrokenPipeError:  # the reader of stdout has closed it, as head does
        terminal.discard_output()
        return 1
    return 1 if refused else 0


def _warn(text):
    print(f"cvt-keras classify: {text}", file=sys.stderr)


def _classify(client, files, batch, top, labels):
    """Prints a line for each file, and returns the number of files without an answer."""
    # Show progress only if the lines go to a file: on a terminal, or through a pipe such as tee, they show it themselves.
    progress = len(files) > batch and sys.stderr.isatty() and terminal.is_file(sys.stdout)
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
                    _warn(f"{terminal.one_line(file)}: {answer}")
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

    They need only protobuf modules in `tensorflow.core`, but importing these imports all of TensorFlow: seconds, and most of a
    gigabyte. For the command only: a program that calls this can't use TensorFlow afterwards.
    """
    if "tensorflow" not in sys.modules and (spec := importlib.util.find_spec("tensorflow")):
        package = types.ModuleType("tensorflow")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["tensorflow"] = package


if __name__ == "__main__":
    sys.exit(cli.run("classify", sys.argv[1:]))
