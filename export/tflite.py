"""TFLite files for phones and browsers: one image of raw uint8 pixels in, probabilities out, labels in the metadata."""

import contextlib
import io
import json
import tempfile
import zipfile

import flatbuffers
import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from cvt_keras.model import calibration_of, cvt_of, preprocessing_of
from cvt_keras.quantized.model import quantized_cvt_of
from cvt_keras.training.recipes import RESIZING

LABELS = "labels.txt"
CALIBRATION = "calibration.json"
# More images bring more outliers, which widen the ranges of activations and cost precision.
CALIBRATION_IMAGES = 100


def convert(classifier, class_names, kind, calibration=None):
    """Converts a classifier to the bytes of a TFLite file, which uses TFLite's builtin operations only.

    Input: `images`, uint8 `(1, height, width, 3)`.
    Output: `probabilities`, `(1, classes)`, calibrated: float32, or for `"int8"` uint8 with scale and zero point.

    Args:
        classifier: maps float pixels in 0..255 to logits, as `build_classifier` returns it, in float32; or for `"int8"` one
            that was trained for quantisation and stores its ranges.
        class_names: in the order of the logits.
        kind: one of `verify.TFLITE_FORMATS`.
        calibration: for `"int8"`: uint8 images `(n, height, width, 3)`, see `calibration_images`; `None` if the classifier
            stores its ranges.
    """
    # A uint8 signature would leave a cast and a float tensor in an int8 file, so the converter makes that input uint8.
    pixels = tf.float32 if kind == "int8" else tf.uint8
    with tempfile.TemporaryDirectory() as folder, _integer_layer_norm() if kind == "int8" else contextlib.nullcontext():
        # Calibration can't read variables, so freeze them. Save, because a function alone would lose the signature.
        signature = frozen(classifier, (1, *classifier.input_shape[1:]), pixels)
        tf.saved_model.save(tf.Module(), folder, signatures=signature)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]  # phones have no TensorFlow operations
        if kind != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if kind == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if kind == "int8" and calibration is not None:
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.representative_dataset = lambda: ([image[None].astype("float32")] for image in _whole_range(calibration))
        if kind == "int8":
            converter.inference_input_type = converter.inference_output_type = tf.uint8
        model = converter.convert()
    return _with_metadata(model, class_names, preprocessing_of(classifier), calibration_of(classifier))


def frozen(classifier, shape, pixels):
    """Returns a `tf.function` from `images` to calibrated `probabilities`, with the classifier's variables as constants.

    Args:
        classifier: maps float pixels in 0..255 to logits.
        shape: `(batch, height, width, channels)` of the images; `batch` may be `None`.
        pixels: their dtype.
    """

    @tf.function(input_signature=[tf.TensorSpec(shape, pixels, name="images")], autograph=False, jit_compile=False)
    def serve(images):
        return {"probabilities": tf.nn.softmax(classifier(tf.cast(images, tf.float32), training=False))}

    with _calibrated(classifier):
        constant = convert_variables_to_constants_v2(serve.get_concrete_function())
    return tf.function(lambda images: {"probabilities": constant(images)[0]}, serve.input_signature, autograph=False)


def calibration_images(split, num_classes, seed, n=CALIBRATION_IMAGES):
    """Draws about `n` images of a `Split`, equally many per class, or all of a class that has fewer."""
    random = np.random.default_rng(seed)
    per_class = max(1, n // num_classes)
    chosen = [random.permutation(np.flatnonzero(split.labels == label))[:per_class] for label in range(num_classes)]
    return split.images[np.sort(np.concatenate(chosen))]


def _whole_range(images):
    """Puts a 0 and a 255 among the pixels: then the input's scale is 1 and its zero point 0, and it takes raw pixels."""
    images = images.copy()
    images[0].flat[:2] = 0, 255
    return images


@contextlib.contextmanager
def _calibrated(classifier):
    """Within the block, the head divides the logits by the temperature: its kernel, its bias and, if quantised, its limits.

    A division after the head would be one more operation, which an int8 file would round once more.
    """
    temperature = calibration_of(classifier).temperature
    if temperature == 1:
        yield
        return
    variables = (quantized_cvt_of(classifier) or cvt_of(classifier)).get_layer("head").weights
    before = [ops.convert_to_numpy(variable) for variable in variables]
    try:
        for variable, value in zip(variables, before):
            variable.assign(value / temperature)
        yield
    finally:
        for variable, value in zip(variables, before):
            variable.assign(value)


@contextlib.contextmanager
def _integer_layer_norm():
    """Within the block, traces Keras' LayerNormalization in a form that converts to integers throughout.

    Keras adds -mean * scale to the shift, and the converter leaves that negation in floats.
    """
    original = keras.layers.LayerNormalization.call

    def call(layer, inputs):
        centred = inputs - ops.mean(inputs, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
        return centred * ops.rsqrt(variance + layer.epsilon) * layer.gamma + layer.beta

    keras.layers.LayerNormalization.call = call
    try:
        yield
    finally:
        keras.layers.LayerNormalization.call = original


# === Metadata ===


def _with_metadata(model, class_names, preprocessing, calibration):
    """Adds what MediaPipe's ImageClassifier reads: descriptions of input and output, and `labels.txt`.

    No field says how to resize an image or when an answer is unsure, so the descriptions do. `calibration.json` has the
    `Calibration` for programs.
    """
    file = schema.ModelT.InitFromPackedBuf(model, 0)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(_metadata(preprocessing, calibration), "uint8")
    entry = schema.MetadataT()
    entry.name, entry.buffer = "TFLITE_METADATA", len(file.buffers)
    file.buffers.append(buffer)
    file.metadata = [*(file.metadata or []), entry]
    builder = flatbuffers.Builder(len(model) + 4096)
    builder.Finish(file.Pack(builder), b"TFL3")
    # The labels are appended as a zip archive, which readers find from the end of the file.
    data = io.BytesIO(bytes(builder.Output()))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr(zipfile.ZipInfo(LABELS), labels_text(class_names))
        archive.writestr(zipfile.ZipInfo(CALIBRATION), json.dumps(calibration.get_config()))
    return data.getvalue()


def labels_text(class_names):
    """The text of `labels.txt`: one class name per line, in the order of the output.

    MediaPipe requires one line per class, so line breaks in a name become spaces, and an empty name becomes its index.
    """
    return "".join(f"{' '.join(name.splitlines()) or index}\n" for index, name in enumerate(class_names))


def resizing(preprocessing):
    """How images were resized in training: name -> value. Only networks that crop have a `crop_pct`."""
    names = [name for name in RESIZING if name != "crop_pct" or preprocessing.resize == "crop"]
    return {name: getattr(preprocessing, name) for name in names}


def _metadata(preprocessing, calibration):
    """Builds the `ModelMetadata` of TFLite's metadata_schema.fbs. Slots are the numbers of its fields."""
    builder = flatbuffers.Builder(1024)

    def text(value):
        return builder.CreateString(value)

    def table(slots):
        """Builds a table from slot -> offset of a string, vector or table; or one byte."""
        builder.StartObject(max(slots) + 1)
        for slot, value in slots.items():
            if isinstance(value, bytes):
                builder.PrependUint8Slot(slot, value[0], 0)
            else:
                builder.PrependUOffsetTRelativeSlot(slot, value, 0)
        return builder.EndObject()

    def vector(offset):
        """Builds a vector with one entry."""
        builder.StartVector(4, 1, 4)
        builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()

    rgb, image_properties, feature_properties, axis_labels = b"\1", b"\2", b"\1", b"\2"  # the schema's enums
    image_content = table({0: image_properties, 1: table({0: rgb})})
    settings = ", ".join(f"{name}={value}" for name, value in resizing(preprocessing).items())
    description = f"An image of raw pixels, 0 to 255, resized as in training: {settings}."
    image = table({0: text("images"), 1: text(description), 3: image_content})
    labels = table({0: text(LABELS), 1: text("Names of the classes, in the order of the output."), 2: axis_labels})
    output_content = table({0: feature_properties, 1: table({0: 0})})
    trust = f"Calibrated probabilities. An answer is unsure if the highest is below {calibration.threshold:.4f}."
    output = table({0: text("probabilities"), 1: text(trust), 3: output_content, 6: vector(labels)})
    graph = table({2: vector(image), 3: vector(output)})
    metadata = {
        0: text("CvT"),
        1: text("A convolutional vision transformer that classifies images."),
        3: vector(graph),
        7: text("1.0.0"),
    }
    builder.Finish(table(metadata), b"M001")
    return bytes(builder.Output())
