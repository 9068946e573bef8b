"""A checkpoint, read and checked: it is whole, or refused."""

import dataclasses
import zipfile
from dataclasses import dataclass

import keras
import numpy as np

from cvt_keras.conversion import configs, layouts, state_dicts
from cvt_keras.conversion.layouts import LAYOUTS, Weight
from cvt_keras.errors import ArgumentError, CheckpointError, first_line
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.variants import VARIANTS, Variant, get_variant

_FLOATS = ("float16", "bfloat16", "float32", "float64")


# === Loading ===


def load_state_dict(model, state_dict, weights):
    """Gives `model` the arrays of a PyTorch state dict: each key is used exactly once, and no weight keeps its old value.

    `num_batches_tracked`, BatchNorm's counter, is the one thing dropped.

    Args:
        model: a `CvT`.
        state_dict: key -> array or tensor of float16, bfloat16, float32 or float64.
        weights: the map, such as `microsoft_weights(model.variant, model.num_classes)`.

    Raises:
        CheckpointError: with every missing, unused and mis-shaped key, and every one that holds no finite floats. The model is
            then as it was.
        ValueError: if `weights` is of another network.
    """
    _require_fit(state_dict, weights)
    _assign(model, state_dict, weights)


def _require_fit(state_dict, weights, network="the network"):
    """Raises CheckpointError unless `state_dict` holds what `weights` names and nothing else; no model is needed for that."""
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
    """What is wrong with an array, if anything."""
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
        return "it holds a NaN, an infinity or what float32 can't hold"
    if key.endswith(("running_var", "moving_variance")) and (array < 0).any():
        return "it holds a negative variance"
    return None


def _array(value):
    """A tensor as a NumPy array, halves in float32; else without a copy."""
    if hasattr(value, "detach"):  # PyTorch's, told without importing it
        value = value.detach().cpu()
        value = (value.float() if value.element_size() == 2 else value).numpy()
    return value.astype("float32") if value.dtype.itemsize == 2 else value


def _assign(model, state_dict, weights, kept=()):
    """Gives `model` the arrays, but for the variables whose paths are in `kept`."""
    variables = {variable.path: variable for variable in model.weights if variable.path not in kept}
    weights = [weight for weight in weights if weight.path not in kept]
    ours = {path: tuple(variable.shape) for path, variable in variables.items()}
    theirs = {path: _transposed(shape, axes) for _, path, shape, axes in weights}
    if odd := sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path)):
        raise ValueError(f"`weights` and the model disagree on: {', '.join(odd)}")
    for key, path, _, axes in weights:
        array = _array(state_dict[key])
        # A copy: JAX keeps the array that it is given, which may be a mapped file or the caller's own.
        variables[path].assign(np.array(np.transpose(array, axes) if axes else array, dtype="float32", order="C"))


def _transposed(shape, axes):
    return tuple(shape[axis] for axis in axes) if axes else shape


# === Reading a checkpoint ===


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: every array that `weights` names is there, and no other.

    Args:
        state_dict: key -> array or tensor.
        weights: the map for it.
        variant: the network.
        num_classes: outputs of its head.
        channels: of its images.
        preprocessing: a `Preprocessing`.
    """

    state_dict: dict
    weights: list[Weight]
    variant: Variant
    num_classes: int
    channels: int
    preprocessing: Preprocessing

    def load_into(self, model, head=True):
        """Gives `model` the weights and lets go of them; without `head` those of the model's head stay as they are."""
        _assign(model, self.state_dict, self.weights, () if head else ("head/kernel", "head/bias"))
        self.state_dict.clear()


def read(source, variant=None, which=None):
    """Reads and checks a checkpoint; no network is built.

    Args:
        source, variant, which: as in `CvT.from_pretrained`.

    Returns:
        A `Checkpoint`.

    Raises:
        CheckpointError: for a file that is damaged or holds something else.
        ArgumentError: for a `source` that does not exist, a `variant` that is unknown or another network, or a `which` that
            the file does not hold.
        MissingPackageError: if the package that reads the file is not installed.
    """
    try:
        variant = None if variant is None else get_variant(variant)
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error), argument="variant") from error
    try:
        file = state_dicts.locate(source)
        if file.suffix.lower() == ".keras":
            if which is not None:
                raise ArgumentError(
                    f"`which` chooses among the weights of a PyTorch file, and a .keras file holds one network. "
                    f"Received: which={which!r}",
                    argument="which",
                )
            return _read_keras(file, variant)
        return _read_pytorch(file, variant, which)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error.summary}", hint=error.hint, details=error.details) from error


def _read_pytorch(file, variant, which):
    """A state dict, and the configs beside it, as a checkpoint."""
    state_dict = state_dicts.read(file, which)
    name = layouts.layout_name(state_dict)
    layout = LAYOUTS[name]
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    num_classes, channels = layouts.sizes(shapes, layout)
    config = file.with_name(state_dicts.CONFIG)
    if name == "transformers" and (config.exists() or variant is None):
        network = config.name
        found, preprocessing = configs.read(config, channels)
    else:
        paper = layouts.paper_network(shapes) if name == "microsoft" else None
        if variant is None:
            network = f"the paper's {paper}, whose widths, kernels and depths they have (another network needs `variant`)"
        else:
            network = "`variant`" + (f" (their widths, kernels and depths are those of {paper})" if paper else "")
        if variant is None and paper is None:
            raise CheckpointError(layouts.why_no_paper_network(shapes))
        found = variant or VARIANTS[paper]
        preprocessing = configs.published_preprocessing(found, channels, file.stem)
    found = _settled(dataclasses.replace(found, activation=layout.activation), variant)
    try:
        weights = layout.weights(found, num_classes, channels)
    except ValueError as error:
        if variant is not None:
            raise ArgumentError(f"`variant` can't be the network of {file}: {error}", argument="variant") from error
        raise CheckpointError(f"{network} is of no such network: {error}") from error
    _require_fit(state_dict, weights, network)
    try:
        found.grids(*preprocessing.image_size)
    except ValueError as error:
        said = state_dicts.PROCESSOR if name == "transformers" else "its name"
        raise CheckpointError(f"the image size that {said} gives does not fit its network: {error}") from error
    names = preprocessing.class_names
    if names and len(names) != num_classes:
        raise CheckpointError(f"{network} names {len(names)} classes, and the weights are of {num_classes}")
    return Checkpoint(state_dict, weights, found, num_classes, channels, preprocessing)


def _read_keras(file, variant):
    """A `CvT` saved by Keras, or a classifier around one, as a checkpoint of Keras' own paths."""
    if not zipfile.is_zipfile(file):
        advice = state_dicts.advice(file, otherwise="download or write it again")
        raise CheckpointError(f"it is damaged or no .keras file: {advice}")
    try:
        model = keras.saving.load_model(file, compile=False)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise CheckpointError(f"it holds no CvT ({first_line(error)})") from error
    network = network_in(model)
    if network is None:
        raise CheckpointError("it holds no CvT")
    if hasattr(network, "quantized"):
        raise CheckpointError("it was trained for quantisation, which is a last step: start from the run before it")
    if is_quantized(network):
        raise CheckpointError(
            "Keras' `quantize` made its kernels integers, which is a last step: start from the model before it"
        )
    preprocessing = preprocessing_in(model)
    arrays = {weight.path: keras.ops.convert_to_numpy(weight) for weight in network.weights}
    if None not in network.input_shape[1:3]:
        preprocessing = preprocessing.replace(image_size=network.input_shape[1:3])
    return Checkpoint(
        arrays,
        [Weight(path, path, array.shape) for path, array in arrays.items()],
        _settled(network.variant, variant),
        network.num_classes,
        network.input_shape[-1],
        preprocessing,
    )


def network_in(model):
    """The part of a model that holds a `Variant`: the model itself, or a layer of a classifier. `None` if no part does."""
    parts = (model, *getattr(model, "layers", ()))
    return next((part for part in parts if isinstance(getattr(part, "variant", None), Variant)), None)


def is_quantized(network):
    """Whether Keras' `quantize` changed some of its layers."""
    return any(getattr(layer, "quantization_mode", None) for layer in network._flatten_layers())


def preprocessing_in(model):
    """The `Preprocessing` that a model holds, or `None`.

    It is that of a classifier's first layer, or of the network itself, as in quantised classifiers and files of version 0.1.
    """
    held = (getattr(part, "preprocessing", None) for part in (*getattr(model, "layers", ()), model))
    return next((preprocessing for preprocessing in held if isinstance(preprocessing, Preprocessing)), None)


def _settled(found, variant):
    """The variant to build: the found one, or the given one, if it is the same network but for activation and drop path.

    The activation is that of the weights whatever is given: with another they are of no use.

    Raises:
        ValueError: if it is another network.
    """
    if variant is None:
        return found
    if _shape_of(variant) != _shape_of(found):
        pairs = zip(_shape_of(found).stages, _shape_of(variant).stages)
        differences = [
            f"{field} of stage {i} is {getattr(theirs, field)}, not {getattr(given, field)}"
            for i, (theirs, given) in enumerate(pairs)
            for field in vars(theirs)
            if getattr(theirs, field) != getattr(given, field)
        ]
        raise ArgumentError(
            f"`variant` is not the checkpoint's network: {'; '.join(differences) or 'stages or stem differ'}",
            argument="variant",
        )
    return dataclasses.replace(variant, activation=found.activation)


def _shape_of(variant):
    """The variant without what no shape and no stride shows."""
    return Variant(tuple(dataclasses.replace(stage, drop_path=0.0) for stage in variant.stages), stem=variant.stem)
