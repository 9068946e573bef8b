"""The networks that can classify images: a Keras classifier, a `.tflite` file and a SavedModel, behind one interface.

A network has:
    class_names: a tuple, in the order of its outputs.
    preprocessing: its `Preprocessing`, or `None` if its file does not say how images are resized.
    model: the Keras classifier, or `None`.
    batch_size: the number of images per call.
    gives_probabilities: whether it returns calibrated probabilities instead of logits.
    calibration: its `Calibration`; one that changes nothing for files of version 0.6 and older.
    prepare(pixels): uint8 `(height, width, 3)` of any size -> what a call takes for this image. Thread-safe.
    __call__(batch): a list of prepared images -> float32 `(n, classes)`.
"""

import io
import json
import re
import zipfile

import numpy as np

from cvt_keras.data import images
from cvt_keras.errors import MissingPackageError, RunError, first_line
from cvt_keras.preprocessing import CALIBRATION_FILE, Calibration, Preprocessing

# Pixels per batch, 256 images of 32x32: the memory of attention grows with the image.
_BATCH_PIXELS = 2**18
_SIGNATURE = "serving_bytes"
_EXPORT = "Use a file that cvt-keras export wrote"
# The text that an export writes into the metadata of a .tflite file.
_DESCRIPTION = re.compile(rb"An image of raw pixels, 0 to 255(?:, resized as in training: ([\w=., -]+?))?\.\0")
_LABELS = "labels.txt"
_EXTRA_ASSETS = "assets.extra"  # of a SavedModel


class KerasNetwork:
    """The classifier in a `.keras` file, on any backend."""

    gives_probabilities = False

    def __init__(self, file):
        from cvt_keras.model import calibration_of, load_classifier, preprocessing_of

        self.model = load_classifier(file)
        self.calibration = calibration_of(self.model)
        *size, channels = self.model.input_shape[1:]
        outputs = self.model.output_shape[-1]
        self.preprocessing = preprocessing_of(self.model)
        if None not in size:  # classifiers of version 0.1 do not store it
            self.preprocessing = self.preprocessing.replace(image_size=size)
        if self.preprocessing.image_size is None:
            raise RunError(f"{file} does not say how large its images are")
        if channels != 3:
            raise RunError(f"{file} takes images of {channels} channels, not RGB")
        self.class_names = tuple(self.preprocessing.class_names or map(str, range(outputs)))
        _require_as_many(self.class_names, outputs, file)
        height, width = self.preprocessing.image_size
        self.batch_size = max(1, _BATCH_PIXELS // (height * width))

    def prepare(self, pixels):
        return _fitted(pixels, self.preprocessing)

    def __call__(self, batch):
        images = np.stack(batch).astype("float32")
        # JAX compiles for each batch size, so round it up to a power of two.
        padding = 2 ** (len(batch) - 1).bit_length() - len(batch)
        images = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
        return np.asarray(self.model.predict_on_batch(images))[: len(batch)]


class TFLiteNetwork:
    """A `.tflite` file of an export, run by LiteRT."""

    gives_probabilities = True
    model = None
    batch_size = 32

    def __init__(self, file):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise MissingPackageError(
                f"a .tflite file needs LiteRT, which can't be imported: {error}", hint="Install it: pip install ai-edge-litert"
            ) from error
        resizing, labels = resizing_in(file.read_bytes()), _labels(file)
        self.calibration = _calibration(_in_zip(file, CALIBRATION_FILE), file)
        if resizing is None or labels is None:
            raise RunError(f"{file} has no metadata of an export, which name the classes and say how to resize", hint=_EXPORT)
        try:
            self.interpreter = Interpreter(str(file), num_threads=images.threads())
            self.interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise RunError(f"{file} can't be read: {first_line(error)}", hint=_EXPORT) from error
        [self.input], [self.output] = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        self.class_names = labels
        _require_as_many(self.class_names, self.output["shape"][-1], file)
        self.preprocessing = Preprocessing(class_names=labels, image_size=self.input["shape"][1:3], **resizing)

    def prepare(self, pixels):
        return _fitted(pixels, self.preprocessing)

    def __call__(self, batch):
        rows = []
        for image in batch:
            self.interpreter.set_tensor(self.input["index"], image[None])
            self.interpreter.invoke()
            rows.append(self.interpreter.get_tensor(self.output["index"])[0])
        scale, zero_point = self.output["quantization"]
        rows = np.stack(rows).astype("float32")
        return (rows - zero_point) * np.float32(scale) if scale else rows  # 0 for an output of floats


class SavedModelNetwork:
    """A SavedModel of an export. Its signature resizes images, as only its graph knows how."""

    gives_probabilities = True
    model = None
    preprocessing = None
    batch_size = 8  # whole photos wait in memory, as PNG

    def __init__(self, folder):
        import tensorflow as tf

        try:
            self.loaded = tf.saved_model.load(str(folder))
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise RunError(f"{folder} can't be read: {first_line(error)}", hint=_EXPORT) from error
        self.serve = self.loaded.signatures.get(_SIGNATURE)
        # The only strings that an export's graph holds as a variable tensor are its class names.
        names = [tensor for tensor in getattr(self.serve, "captured_inputs", ()) if tensor.dtype == tf.string]
        if len(names) != 1 or "probabilities" not in self.serve.structured_outputs:
            raise RunError(f"{folder} does not have an export's signature {_SIGNATURE}", hint=_EXPORT)
        self.class_names = tuple(name.decode() for name in names[0].numpy())
        _require_as_many(self.class_names, self.serve.structured_outputs["probabilities"].shape[-1], folder)
        stored = folder / _EXTRA_ASSETS / CALIBRATION_FILE
        if "unsure" in self.serve.structured_outputs and not stored.exists():
            raise RunError(f"{folder} is not complete: {stored.relative_to(folder)} is missing", hint=_EXPORT)
        self.calibration = _calibration(stored.read_bytes() if stored.exists() else None, folder)
        # TensorFlow prints some of its greetings at the first call, and the command hides them only while it loads.
        self([self.prepare(np.zeros((1, 1, 3), "uint8"))])

    def prepare(self, pixels):
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG", compress_level=1)  # six times faster than the default
        return png.getvalue()

    def __call__(self, batch):
        import tensorflow as tf

        return self.serve(image_bytes=tf.constant(batch))["probabilities"].numpy()


def _fitted(pixels, preprocessing):
    import tensorflow as tf

    with tf.device("CPU:0"):  # also beside a GPU: waiting for it would only cost time
        return images.fit(pixels, preprocessing).numpy()


def resizing_in(data):
    """The fields of `Preprocessing` in the metadata of a `.tflite` file; `None` if it is not of an export.

    Args:
        data: the bytes of the file.
    """
    description = _DESCRIPTION.search(data)
    if description is None:
        return None
    # Exports of versions before 0.6 name none: they stretch, which is the default.
    pairs = dict(pair.split("=") for pair in (description[1] or b"").decode().split(", ") if pair)
    return {name: float(value) if name == "crop_pct" else value for name, value in pairs.items()}


def _labels(file):
    """The class names in the metadata of a `.tflite` file, or `None`."""
    text = _in_zip(file, _LABELS)
    try:
        return None if text is None else tuple(text.decode().splitlines())
    except UnicodeDecodeError:
        return None


def _in_zip(file, name):
    """The bytes of an entry in the zip archive at the end of a `.tflite` file, or `None`."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, KeyError):
        return None


def _calibration(data, file):
    """The `Calibration` in JSON, or one that changes nothing if there is none."""
    try:
        return Calibration.from_config(None if data is None else json.loads(data))
    except (ValueError, TypeError) as error:
        raise RunError(f"the calibration in {file} is damaged: {error}", hint=_EXPORT) from error


def _require_as_many(class_names, outputs, file):
    if len(class_names) != outputs:
        raise RunError(f"{file} names {len(class_names)} classes, but has {outputs} outputs", hint=_EXPORT)
