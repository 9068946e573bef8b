"""Reads a checkpoint and checks that it is complete."""

import dataclasses
import zipfile
from dataclasses import dataclass

import keras
import numpy as np

from cvt_keras.conversion import configs, layouts, state_dicts
from cvt_keras.conversion.layouts import LAYOUTS, Weight
from cvt_keras.errors import ArgumentError, CheckpointError, CheckpointFileError, first_line
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.variants import VARIANTS, Variant, different_fields, get_variant

_FLOATS = ("float16", "bfloat16", "float32", "float64")


# === Loading ===


def load_state_dict(model, state_dict, weights):
    """Loads a PyTorch state dict into `model`. Each key is used exactly once, and every weight is set.

    Only `num_batches_tracked`, BatchNorm's counter, is ignored.

    Args:
        model: a `CvT`.
        state_dict: key -> array or tensor of float16, bfloat16, float32 or float64.
        weights: the map, such as `microsoft_weights(model.variant, model.num_classes)`.

    Raises:
        CheckpointError: naming every key that is missing, unused, mis-shaped, or not of finite floats. The model is unchanged.
        ValueError: if `weights` is the map of another network.
    """
    _require_fit(state_dict, weights)
    _assign(model, state_dict, weights)


def _require_fit(state_dict, weights, network="the network"):
    """Raises CheckpointError unless `state_dict` has exactly the keys and shapes of `weights`. Needs no model."""
    keys = {weight.key for weight in weights}
    missing = [f"missing: {key}" for key in sorted(keys - set(state_dict))]
    unused = [f"unused: {key}" for key in sorted(set(state_dict) - keys - layouts.counters(weights), key=str)]
    wrong = [
        f"{key}: {fault}"
        for key, _, shape, _ in weights
        if key in state_dict and (fault := _fault(key, state_dict[key], shape))
    ]
    if faults := missing + unused + wrong:
        counts = f"{len(missing)} missing, {len(unused)} unused, {len(wrong)} of wrong shape or type"
        raise CheckpointError(f"the weights do not fit {network}; {counts}", details=faults)


def _fault(key, value, shape):
    """Returns what is wrong with an array, or `None`."""
    dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    if dtype not in _FLOATS:
        return f"its dtype must be one of {', '.join(_FLOATS)}. Received: {dtype}"
    if tuple(value.shape) != shape:
        return f"its shape must be {shape}. Received: {tuple(value.shape)}"
    try:
        with np.errstate(over="ignore"):
            array = _array(value).astype("float32", copy=False)
    except (TypeError, RuntimeError) as error:
        return f"it must be a plain, dense tensor. Received: {str(error).splitlines()[0]}"
    if not np.isfinite(array).all():
        return "it holds a NaN, an infinity or a value too large for float32"
    if key.endswith(("running_var", "moving_variance")) and (array < 0).any():
        return "it holds a negative variance"
    return None


def _array(value):
    """Returns a tensor as a NumPy array: half precision as float32, other types without a copy."""
    if hasattr(value, "detach"):  # a PyTorch tensor, recognised without importing torch
        value = value.detach().cpu()
        value = (value.float() if value.element_size() == 2 else value).numpy()
    return value.astype("float32") if value.dtype.itemsize == 2 else value


def _assign(model, state_dict, weights, skipped=()):
    """Assigns the arrays to the variables of `model`, except to those whose paths are in `skipped`."""
    variables = {variable.path: variable for variable in model.weights if variable.path not in skipped}
    weights = [weight for weight in weights if weight.path not in skipped]
    ours = {path: tuple(variable.shape) for path, variable in variables.items()}
    theirs = {path: _transposed(shape, axes) for _, path, shape, axes in weights}
    if different := sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path)):
        raise ValueError(f"`weights` and the model disagree on: {', '.join(different)}")
    for key, path, _, axes in weights:
        array = _array(state_dict[key])
        # A copy: JAX keeps a reference to the array, which may be a mapped file or the caller's own.
        variables[path].assign(np.array(np.transpose(array, axes) if axes else array, dtype="float32", order="C"))


def _transposed(shape, axes):
    return tuple(shape[axis] for axis in axes) if axes else shape


# === Reading a checkpoint ===


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: it has every array that `weights` names, and no other.

    Args:
        state_dict: key -> array or tensor.
        weights: its weight map.
        variant: the network.
        num_classes: outputs of its head.
        channels: channels of its images.
        preprocessing: a `Preprocessing`.
    """

    state_dict: dict
    weights: list[Weight]
    variant: Variant
    num_classes: int
    channels: int
    preprocessing: Preprocessing

    def load_into(self, model, head=True):
        """Loads the weights into `model` and releases them. With `head=False`, the model keeps the weights of its head."""
        _assign(model, self.state_dict, self.weights, () if head else ("head/kernel", "head/bias"))
        self.state_dict.clear()


def read(source, variant=None, which=None, argument="source"):
    """Reads and checks a checkpoint without building a network.

    Args:
        source, variant, which: as in `CvT.from_pretrained`.
        argument: the name of the caller's argument for `source`, for the error.

    Returns:
        A `Checkpoint`.

    Raises:
        CheckpointError: for a file that is damaged or holds something else.
        ArgumentError: if `source` does not exist, if `variant` is unknown or another network, or if the file does not hold
            `which`.
        MissingPackageError: if the package that reads the file is not installed.
    """
    try:
        variant = None if variant is None else get_variant(variant)
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error), argument="variant") from error
    try:
        file = state_dicts.locate(source, argument)
        if file.suffix.lower() == ".keras":
            if which is not None:
                raise ArgumentError(
                    f"`which` must not be passed with a .keras file, which holds one network. Received: which={which!r}",
                    argument="which",
                )
            return _read_keras(file, variant)
        return _read_pytorch(file, variant, which)
    except CheckpointError as error:
        raise state_dicts.about(source, error) from error


def _read_pytorch(file, variant, which):
    """Reads a state dict and the configs beside it."""
    state_dict = state_dicts.read(file, which)
    name = layouts.layout_name(state_dict)
    layout = LAYOUTS[name]
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    num_classes, channels = layouts.sizes(shapes, layout)
    config = file.with_name(state_dicts.CONFIG)
    if name == "transformers" and (config.exists() or variant is None):
        network = config.name
        stored_variant, preprocessing = configs.read(config, channels)
    else:
        paper = layouts.paper_network(shapes) if name == "microsoft" else None
        if variant is None:
            network = f"the paper's {paper}, which has the same widths, kernels and depths (for another network give `variant`)"
        else:
            network = "`variant`" + (f" (they have the widths, kernels and depths of {paper})" if paper else "")
        if variant is None and paper is None:
            raise CheckpointError(layouts.why_no_paper_network(shapes))
        stored_variant = variant or VARIANTS[paper]
        preprocessing = configs.published_preprocessing(stored_variant, channels, file.stem)
    stored_variant = dataclasses.replace(stored_variant, activation=layout.activation)
    resolved_variant = _resolve_variant(stored_variant, variant)
    try:
        weights = layout.weights(resolved_variant, num_classes, channels)
    except ValueError as error:
        if variant is not None:
            raise ArgumentError(f"`variant` can't be the network of {file}: {error}", argument="variant") from error
        raise CheckpointError(f"{network} does not describe a network of this layout: {error}") from error
    _require_fit(state_dict, weights, network)
    try:
        resolved_variant.grids(*preprocessing.image_size)
    except ValueError as error:
        place = state_dicts.PROCESSOR if name == "transformers" else "its name"
        raise CheckpointError(f"the image size in {place} does not fit the network: {error}") from error
    names = preprocessing.class_names
    if names and len(names) != num_classes:
        raise CheckpointError(f"{network} names {len(names)} classes, but the weights have {num_classes}")
    return Checkpoint(state_dict, weights, resolved_variant, num_classes, channels, preprocessing)


def _read_keras(file, variant):
    """Reads a `.keras` file that holds a `CvT` or a classifier around one. The keys are Keras' variable paths."""
    if not zipfile.is_zipfile(file):
        advice = state_dicts.advice(file, otherwise="download or write it again")
        raise CheckpointFileError(f"is damaged or not a .keras file: {advice}")
    try:
        model = keras.saving.load_model(file, compile=False)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise CheckpointFileError(f"holds no CvT ({first_line(error)})") from error
    network = network_in(model)
    if network is None:
        raise CheckpointFileError("holds no CvT")
    if hasattr(network, "quantized"):
        raise CheckpointFileError("was trained for quantisation, which must come last: start from the run before it")
    if is_quantized(network):
        raise CheckpointError(
            "Keras' `quantize` made its kernels integers, which must come last: start from the model before it"
        )
    preprocessing = preprocessing_in(model)
    arrays = {weight.path: keras.ops.convert_to_numpy(weight) for weight in network.weights}
    if None not in network.input_shape[1:3]:
        preprocessing = preprocessing.replace(image_size=network.input_shape[1:3])
    return Checkpoint(
        arrays,
        [Weight(path, path, array.shape) for path, array in arrays.items()],
        _resolve_variant(network.variant, variant),
        network.num_classes,
        network.input_shape[-1],
        preprocessing,
    )


def network_in(model):
    """Returns the part of a model that has a `Variant`: the model itself, a layer of a classifier, or `None`."""
    parts = (model, *getattr(model, "layers", ()))
    return next((part for part in parts if isinstance(getattr(part, "variant", None), Variant)), None)


def is_quantized(network):
    """Whether Keras' `quantize` changed any layer."""
    return any(getattr(layer, "quantization_mode", None) for layer in network._flatten_layers())


def preprocessing_in(model):
    """Returns the `Preprocessing` of a model, or `None`.

    A classifier's first layer holds it. In quantised classifiers and files of version 0.1, the network does.
    """
    candidates = (getattr(part, "preprocessing", None) for part in (*getattr(model, "layers", ()), model))
    return next((preprocessing for preprocessing in candidates if isinstance(preprocessing, Preprocessing)), None)


def _resolve_variant(stored, requested):
    """Returns the variant to build: the checkpoint's, or `requested` if the same weights fit it.

    Such a variant may differ in activation, drop path and initial weights. The activation is always the checkpoint's, because
    its weights were trained with it.

    Raises:
        ArgumentError: if `requested` is another network.
    """
    if requested is None:
        return stored
    if different := different_fields(_without_training(stored), _without_training(requested)):
        described = "; ".join(f"{name} is {ours}, not {theirs}" for name, (ours, theirs) in different.items())
        raise ArgumentError(f"`variant` is not the checkpoint's network: {described}", argument="variant")
    return dataclasses.replace(requested, activation=stored.activation)


def _without_training(variant):
    """The variant with defaults for the fields that no stored weight depends on: activation, drop path and initial weights."""
    stages = tuple(dataclasses.replace(stage, drop_path=0.0) for stage in variant.stages)
    return dataclasses.replace(variant, stages=stages, activation="gelu", identity_init=False)
