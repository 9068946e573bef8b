"""ONNX files for onnxruntime: any number of images of raw uint8 pixels in, probabilities out."""

import json

import numpy as np
import tensorflow as tf

from cvt_keras.errors import ExportError, first_line
from cvt_keras.model import calibration_of, preprocessing_of

from .tflite import frozen, resizing

# The networks need no newer operation, and a low opset is read by old runtimes too.
OPSET = 15


def convert(classifier, class_names):
    """Converts a classifier to the bytes of an ONNX file, in float32.

    Input: `images`, uint8 `(batch, height, width, 3)`.
    Output: `probabilities`, float32 `(batch, classes)`, calibrated.

    The file's `metadata_props` are texts: `class_names` and `image_size` (height and width) as JSON lists; how images were
    resized in training: `resize`, `interpolation` and, with `resize="crop"`, `crop_pct`; and `temperature` and `threshold`, as
    in `Calibration`.

    Args:
        classifier: maps float pixels in 0..255 to logits, as `build_classifier` returns it, in float32.
        class_names: in the order of the logits.

    Raises:
        ExportError: if tf2onnx can't convert it. An operation without a conversion raises no error here, but onnxruntime then
            refuses the file.
    """
    import onnx
    import tf2onnx

    shape = classifier.input_shape[1:]
    signature = frozen(classifier, (None, *shape), tf.uint8)
    handlers = {"Erfc": (_erfc, [])}
    try:
        model, _ = tf2onnx.convert.from_function(signature, signature.input_signature, opset=OPSET, custom_op_handlers=handlers)
    except ValueError as error:  # of a network over 2 GB, for instance
        raise ExportError(f"onnx can't be written: {first_line(error)}") from error
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "batch"  # tf2onnx makes up a name for each
    metadata = {"class_names": json.dumps(list(class_names), ensure_ascii=False), "image_size": json.dumps(shape[:2])}
    settings = resizing(preprocessing_of(classifier)) | calibration_of(classifier).get_config()
    metadata |= {name: str(value) for name, value in settings.items()}
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def _erfc(graph, node, name, args):
    """Converts TensorFlow's Erfc, the core of its exact GELU, which neither ONNX nor tf2onnx has, to `1 - Erf`."""
    [argument], [output] = node.input, node.output
    info = {"shapes": node.output_shapes, "dtypes": node.output_dtypes}
    one = graph.make_const(f"{name}/one", np.float32(1))
    graph.remove_node(node.name)
    erf = graph.make_node("Erf", [argument], **info)
    graph.make_node("Sub", [one.output[0], erf.output[0]], outputs=[output], name=name, **info)
