"""SavedModel for TF Serving: three signatures, class names, and warm-up requests."""

import keras
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from cvt_keras.data.images import fit
from cvt_keras.model import calibration_of, preprocessing_of

from .decoding import decode

WARM_UP = "assets.extra/tf_serving_warmup_requests"
WARM_UP_BATCHES = (1, 8)


def write(classifier, class_names, folder):
    """Writes a SavedModel.

    Signatures:
        `serving_default(images)`: uint8 `(batch, height, width, 3)` -> `probabilities`, float32 `(batch, classes)`, calibrated;
            `classes`, strings `(batch,)`; and `unsure`, bool `(batch,)`.
        `serving_bytes(image_bytes)`: JPEG or PNG files, strings `(batch,)` -> the same. They are resized as the classifier's
            `Preprocessing` says. An image that can't be decoded as in training fails with INVALID_ARGUMENT; see `decoding`.
        `logits(images)`: as `serving_default` -> `logits`, float32 `(batch, classes)`, not calibrated.

    `WARM_UP` holds requests for each signature, which a server replays before it accepts others.

    Args:
        classifier: maps float pixels in 0..255 to logits, as `build_classifier` returns it.
        class_names: in the order of the logits.
        folder: where to write; must not exist.
    """
    shape = classifier.input_shape[1:]
    names = tf.constant(list(class_names))
    calibration = calibration_of(classifier)
    preprocessing = preprocessing_of(classifier).replace(image_size=shape[:2])  # classifiers of version 0.1 store no size

    def logits(images):
        return classifier(tf.cast(images, tf.float32), training=False)

    def answer(images):
        values = logits(images)
        probabilities = tf.nn.softmax(values / calibration.temperature)
        return {
            "probabilities": probabilities,
            "classes": tf.gather(names, tf.argmax(values, axis=-1)),  # rounding might make probabilities equal
            "unsure": tf.reduce_max(probabilities, axis=-1) < calibration.threshold,
        }

    def decode_all(image_bytes):
        spec = tf.TensorSpec(shape, tf.uint8)
        # One at a time, so that a request never needs memory for more than one decoded image.
        return tf.map_fn(
            lambda data: fit(decode(data), preprocessing), image_bytes, fn_output_signature=spec, parallel_iterations=1
        )

    images = [tf.TensorSpec((None, *shape), tf.uint8, name="images")]
    archive = keras.export.ExportArchive()  # no `track`: it finds the variables, and would save each twice
    archive.add_endpoint("serving_default", answer, images)
    archive.add_endpoint("logits", lambda images: {"logits": logits(images)}, images)
    archive.add_endpoint(
        "serving_bytes",
        lambda image_bytes: answer(decode_all(image_bytes)),
        [tf.TensorSpec((None,), tf.string, name="image_bytes")],
    )
    archive.write_out(folder, verbose=False)
    _write_requests(folder / WARM_UP, shape)


def _write_requests(path, shape):
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for batch in WARM_UP_BATCHES:
            images = np.zeros((batch, *shape), "uint8")
            encoded = np.array([tf.io.encode_png(image).numpy() for image in images], object)
            inputs = {"serving_default": ("images", images), "logits": ("images", images)}
            for signature, (name, value) in {**inputs, "serving_bytes": ("image_bytes", encoded)}.items():
                request = predict_pb2.PredictRequest()
                request.model_spec.name, request.model_spec.signature_name = "cvt", signature
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
                log = prediction_log_pb2.PredictLog(request=request)
                writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())
