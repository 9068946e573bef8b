"""A test double of TF Serving: its two gRPC services and its REST interface, over a real SavedModel.

It uses the official stubs and the names, codes and texts of the server's source, and replays warm-up requests as it loads. It
does not merge requests; `faults` simulate what merging does to a client. To run it as a process:

    python tests/export/double.py RUN/export/saved_model [GRPC_PORT REST_PORT]
"""

import base64
import collections
import dataclasses
import json
import re
import sys
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format, text_format
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

SERVING = Path(__file__).parents[2] / "export" / "serving"
WARM_UP = "assets.extra/tf_serving_warmup_requests"
STATUS = grpc.StatusCode
HTTP = {
    STATUS.INVALID_ARGUMENT: 400,
    STATUS.FAILED_PRECONDITION: 400,
    STATUS.NOT_FOUND: 404,
    STATUS.RESOURCE_EXHAUSTED: 429,
    STATUS.INTERNAL: 500,
    STATUS.UNAVAILABLE: 503,
    STATUS.DEADLINE_EXCEEDED: 504,
}
PREDICT = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+))?:predict")
MODEL_STATUS = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+))?(/metadata)?")


class Refused(Exception):
    """An error of the server: a status code and its text."""


@dataclasses.dataclass
class Asked:
    """A request that the double received.

    Args:
        protocol: "grpc" or "rest".
        version: the version that answers.
        images: the number of images.
        seconds: the time until the client's deadline, by gRPC only.
    """

    protocol: str
    version: int
    images: int
    seconds: float | None = None


def models_config():
    """The one model of models.config."""
    text = (SERVING / "models.config").read_text()
    [config] = text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config
    return config


def batching(name):
    """A number in batching.config."""
    return int(re.search(rf"^{name} {{ value: (\d+) }}$", (SERVING / "batching.config").read_text(), re.MULTILINE)[1])


class Double:
    """Both servers, on the loopback interface.

    `faults` are the `(status, text)` of errors for the next requests. `delay` is the seconds that each answer takes. `states`
    are those of the versions: only AVAILABLE ones answer; a dropped one is END, and one that can't be loaded stays LOADING.

    Args:
        folder: has a SavedModel per version, as `export/saved_model`.
        ports: for gRPC and REST; 0 means any free port.
    """

    def __init__(self, folder, ports=(0, 0)):
        config = models_config()
        self.name = config.name
        self.faults = collections.deque()
        self.delay = 0.0
        self.tensor_content = False  # --enable_serialization_as_tensor_content
        self.asked = []
        self.warmed_up = 0
        versions = sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdecimal())
        latest = versions[-config.model_version_policy.latest.num_versions :]
        self.loaded = {version: "AVAILABLE" if version in latest else "END" for version in versions}
        self.states = dict(self.loaded)
        self.versions = {version: tf.saved_model.load(str(Path(folder) / str(version))) for version in latest}
        for version in latest:
            self._warm_up(version, Path(folder) / str(version) / WARM_UP)
        sizes = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        self.grpc = grpc.server(futures.ThreadPoolExecutor(4), options=sizes)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_Prediction(self), self.grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), self.grpc)
        self.grpc_address = f"127.0.0.1:{self.grpc.add_insecure_port(f'127.0.0.1:{ports[0]}')}"
        self.rest = ThreadingHTTPServer(("127.0.0.1", ports[1]), type("Handler", (_Handler,), {"double": self}))
        self.rest_address = f"127.0.0.1:{self.rest.server_port}"

    def __enter__(self):
        self.grpc.start()
        threading.Thread(target=self.rest.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.grpc.stop(None).wait()
        self.rest.shutdown()
        self.rest.server_close()

    def reset(self):
        self.faults.clear()
        self.asked.clear()
        self.delay, self.tensor_content = 0.0, False
        self.states = dict(self.loaded)

    def _warm_up(self, version, path):
        for record in tf.data.TFRecordDataset(str(path)):
            request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
            self._run(version, request.model_spec.signature_name, request.inputs)
            self.warmed_up += 1

    def predict(self, protocol, request, seconds=None):
        """Answers a `PredictRequest` with the version and a dict of arrays."""
        spec = request.model_spec
        available = [version for version, state in self.states.items() if state == "AVAILABLE"]
        version = spec.version.value if spec.HasField("version") else max(available, default=0)
        if spec.name != self.name or version not in available:
            servable = f"Specific({spec.name}, {version})" if spec.HasField("version") else f"Latest({spec.name})"
            raise Refused(STATUS.NOT_FOUND, f"Servable not found for request: {servable}")
        images = max((value.tensor_shape.dim[0].size for value in request.inputs.values()), default=0)
        self.asked.append(Asked(protocol, version, images, seconds))
        time.sleep(self.delay)
        if self.faults:
            raise Refused(*self.faults.popleft())
        most = batching("max_batch_size")
        if images > most:
            text = f"Task size {images} is larger than maximum input batch size {most}"
            raise Refused(STATUS.INVALID_ARGUMENT, text)
        signature = spec.signature_name or "serving_default"
        if signature not in self.versions[version].signatures:
            if protocol == "rest":
                raise Refused(STATUS.INVALID_ARGUMENT, f'Serving signature name: "{signature}" not found in signature def')
            raise Refused(STATUS.FAILED_PRECONDITION, f'Serving signature key "{signature}" not found.')
        return version, self._run(version, signature, request.inputs)

    def _run(self, version, signature, inputs):
        values = {name: tf.constant(tf.make_ndarray(value)) for name, value in inputs.items()}
        try:
            outputs = self.versions[version].signatures[signature](**values)
        except tf.errors.InvalidArgumentError as error:
            raise Refused(STATUS.INVALID_ARGUMENT, error.message) from error
        return {name: value.numpy() for name, value in outputs.items()}

    def status(self, name, version=None):
        """Returns a `GetModelStatusResponse`."""
        if name != self.name or (version or max(self.states)) not in self.states:
            missing = f"version {version} of model {name}" if version else f"any versions of model {name}"
            raise Refused(STATUS.NOT_FOUND, f"Could not find {missing}")
        response = get_model_status_pb2.GetModelStatusResponse()
        for each in [version] if version else self.states:
            state = get_model_status_pb2.ModelVersionStatus.State.Value(self.states[each])
            response.model_version_status.add(version=each, state=state)
        return response


class _Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, double):
        self.double = double

    def Predict(self, request, context):
        try:
            version, outputs = self.double.predict("grpc", request, context.time_remaining())
        except Refused as refused:
            context.abort(*refused.args)
        response = predict_pb2.PredictResponse()
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = version
        for name, value in outputs.items():
            tensor = response.outputs[name]
            tensor.dtype = tf.as_dtype(value.dtype).as_datatype_enum
            for side in value.shape:
                tensor.tensor_shape.dim.add(size=side)
            if value.dtype == object:
                tensor.string_val.extend(value)
            elif self.double.tensor_content:
                tensor.tensor_content = value.tobytes()
            else:
                values = tensor.bool_val if value.dtype == bool else tensor.float_val
                values.extend(value.ravel().tolist())
        return response


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, double):
        self.double = double

    def GetModelStatus(self, request, context):
        spec = request.model_spec
        try:
            return self.double.status(spec.name, spec.version.value if spec.HasField("version") else None)
        except Refused as refused:
            context.abort(*refused.args)


class _Handler(BaseHTTPRequestHandler):
    """REST: input strings are `{"b64": ...}`. Output strings are text, because no output's name ends in _bytes."""

    double: Double

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            if not (path := PREDICT.fullmatch(self.path)):
                raise Refused(STATUS.INVALID_ARGUMENT, f"Malformed request: POST {self.path}")
            _, outputs = self.double.predict("rest", self._request(path, json.loads(body)))
        except Refused as refused:
            return self._refuse(refused)
        columns = {
            name: value.astype(str).tolist() if value.dtype == object else value.tolist() for name, value in outputs.items()
        }
        if len(columns) == 1:
            return self._answer(200, {"predictions": next(iter(columns.values()))})
        self._answer(200, {"predictions": [dict(zip(columns, row)) for row in zip(*columns.values())]})

    def do_GET(self):
        try:
            if not (path := MODEL_STATUS.fullmatch(self.path)):
                raise Refused(STATUS.INVALID_ARGUMENT, f"Malformed request: GET {self.path}")
            status = self.double.status(path[1], path[2] and int(path[2]))
        except Refused as refused:
            return self._refuse(refused)
        if path[3]:
            signatures = {
                name: {"inputs": list(signature.structured_input_signature[1]), "outputs": list(signature.structured_outputs)}
                for name, signature in self.double.versions[max(self.double.versions)].signatures.items()
            }
            return self._answer(200, {"model_spec": {"name": path[1]}, "metadata": {"signature_def": signatures}})
        self._answer(200, json_format.MessageToDict(status, preserving_proto_field_name=True))

    def _request(self, path, body):
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = path[1], body.get("signature_name", "")
        if path[2]:
            request.model_spec.version.value = int(path[2])
        if not body.get("instances"):
            raise Refused(STATUS.INVALID_ARGUMENT, "Missing 'inputs' or 'instances' key")
        rows = [next(iter(row.values())) if isinstance(row, dict) and "b64" not in row else row for row in body["instances"]]
        if isinstance(rows[0], dict):
            name, values = "image_bytes", np.array([base64.b64decode(row["b64"]) for row in rows], object)
        else:
            name, values = "images", np.array(rows, "uint8")
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
        return request

    def _refuse(self, refused):
        status, text = refused.args
        self._answer(HTTP[status], {"error": text})

    def _answer(self, status, body):
        data = json.dumps(body, indent=4).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    with Double(sys.argv[1], tuple(map(int, sys.argv[2:4])) or (8500, 8501)) as double:
        print(
            f"{double.name} versions {list(double.versions)}: gRPC {double.grpc_address}, REST {double.rest_address}",
            flush=True,
        )
        threading.Event().wait()
