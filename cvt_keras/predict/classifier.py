"""Loads a run or an exported file as a `Classifier` of images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvt_keras import runs
from cvt_keras.data import image_files, images, packages
from cvt_keras.errors import ArgumentError, DivergedError, ImageError, NoRunError
from cvt_keras.predict import networks

if TYPE_CHECKING:
    import keras

    from cvt_keras.preprocessing import Calibration, Preprocessing

_SAVED_MODEL = "saved_model.pb"
# A batch ends with the image that exceeds this, even if it has fewer images than the network takes.
_BATCH_BYTES = 64_000_000
_KINDS = "paths, uint8 arrays (height, width, 3), a batch of these, or Pillow images"
# An int8 file rounds probabilities to 0, which would add an infinite loss. As in Keras' cross-entropy.
_LEAST_PROBABILITY = 1e-7


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for an image.

    Args:
        label: the most probable class.
        probability: its probability, in 0..1.
        top: pairs of a class and its probability, the most probable first. Its first is `label`.
        path: the image's file, or `None` if it had none.
        unsure: whether `probability` is below the threshold of the network's `Calibration`.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    path: Path | None = None
    unsure: bool = False


class Classifier:
    """A classifier of images; `load_run` makes one.

    Attributes:
        path: the run folder or file that was loaded.
        run_dir: the folder of the run that it belongs to, or `None`.
        report: the dict in the run's report.json, or `None`.
        class_names: a tuple, in the order of the network's outputs.
        preprocessing: how images are resized, or `None` for a SavedModel, which resizes them itself.
        calibration: how logits become probabilities, and when an answer is unsure.
        model: the Keras model from float pixels in 0..255 to logits, or `None` for an exported file.
    """

    path: Path
    run_dir: Path | None
    report: dict[str, Any] | None
    class_names: tuple[str, ...]
    preprocessing: Preprocessing | None
    calibration: Calibration
    model: keras.Model | None

    def __init__(self, network: Any, path: Path, run_dir: Path | None = None) -> None:
        self._network = network
        self.path = path
        self.run_dir = run_dir
        self.report = None
        if run_dir is not None and (run_dir / runs.REPORT).exists():
            self.report = runs.read_json(run_dir / runs.REPORT)
        self.class_names = network.class_names
        self.preprocessing = network.preprocessing
        self.calibration = network.calibration
        self.model = network.model

    def predict(self, images: Any, top: int = 1) -> list[Prediction]:
        """Classifies images, decoded and resized as in training.

        Args:
            images: one image or several: paths of files, uint8 arrays `(height, width, 3)` of any size, or Pillow images; or a
                uint8 array `(n, height, width, 3)`.
            top: the number of classes in each `Prediction.top`; at most as many as there are.

        Returns:
            A `Prediction` for each image.

        Raises:
            ArgumentError: if `images` has another type, or `top` is below 1.
            ImageError: if an image can't be read; the message names its path.
        """
        predictions = []
        images = list(_several(images))
        for image, answer in zip(images, self.classify(images, top)):
            if isinstance(answer, ImageError):
                raise ImageError(f"{image}: {answer}") if isinstance(image, (str, os.PathLike)) else answer
            predictions.append(answer)
        return predictions

    def classify(self, images: Iterable[Any], top: int = 1) -> Iterator[Prediction | ImageError]:
        """Classifies any number of images one after the other, in constant memory, and goes on after a bad one.

        Args:
            images: an iterable of paths, uint8 arrays `(height, width, 3)` and Pillow images; or one of them.
            top: as in `predict`.

        Yields:
            For each image a `Prediction`, or the `ImageError` that says why there is none.

        Raises:
            ArgumentError: as `predict`.
        """
        require_top(top)
        for image, answer in self.answers(_several(images), _pixels):
            if isinstance(answer, ImageError):
                yield answer
                continue
            logits, probabilities = answer
            # Rounding can make probabilities equal. Among equal logits too, the lowest index wins, as in `argmax`.
            order = np.lexsort((-logits, -probabilities))[:top]
            best = tuple((self.class_names[index], float(probabilities[index])) for index in order)
            path = Path(image) if isinstance(image, (str, os.PathLike)) else None
            yield Prediction(*best[0], best, path, bool(self.calibration.unsure(probabilities)))

    def answers(self, items: Iterable[Any], read: Any) -> Iterator[tuple[Any, Any]]:
        """Runs the network on images that are read in several threads.

        Args:
            items: any values.
            read: a function of an item and of the argument `reserve` of `images.decode`, called in a thread. Returns pixels,
                uint8 `(height, width, 3)`, or anything else for an item without an answer.

        Yields:
            In the order of `items` pairs of an item and its logits and probabilities, two arrays `(classes,)`; or of an item
            and what `read` returned, if that is not an array.
        """
        room = images.Room()

        def prepare(item):
            with room.place() as reserve:
                content = read(item, reserve)
                if isinstance(content, np.ndarray):
                    return item, self._network.prepare(content), None
                return item, None, content

        group, images_in_group, size = [], 0, 0
        for entry in images.in_threads(prepare, items, ahead=self._network.batch_size):
            group.append(entry)
            if entry[1] is not None:
                images_in_group += 1
                size += len(entry[1]) if isinstance(entry[1], bytes) else entry[1].nbytes
            if images_in_group == self._network.batch_size or size > _BATCH_BYTES:
                yield from self._answered(group)
                group, images_in_group, size = [], 0, 0
        yield from self._answered(group)

    def _answered(self, group):
        batch = [prepared for _, prepared, _ in group if prepared is not None]
        rows = zip(*self._logits_and_probabilities(batch)) if batch else iter(())
        for item, prepared, content in group:
            yield item, content if prepared is None else next(rows)

    def _logits_and_probabilities(self, batch):
        """Runs the network on a list of prepared images. The only place where logits become probabilities.

        Returns:
            Two float32 arrays `(n, classes)`.
        """
        outputs = self._network(batch)
        if not np.isfinite(outputs).all():
            raise DivergedError(f"the outputs of {self.path} are NaN or infinite")
        if self._network.gives_probabilities:  # an exported file has its softmax inside
            return np.log(np.maximum(outputs, np.float32(_LEAST_PROBABILITY))), outputs
        return outputs, self.calibration.probabilities(outputs)


def load_run(run: str | os.PathLike[str]) -> Classifier:
    """Loads a trained or exported network, to classify images with.

    Args:
        run: the folder of a finished run; a `.keras` file; a `.tflite` file of an export; or its SavedModel, which is a folder
            with a number for its name, or the folder of these, of which the newest is loaded.

    Returns:
        A `Classifier`.

    Raises:
        NoRunError: if `run` is none of these.
        RunError: if the run is not finished, a file is damaged, or it is not of this project.
        MissingPackageError: if a package that the file needs is not installed.
    """
    network, file = locate(run)
    packages.require("tensorflow")  # resizes images, on every backend
    path = Path(run).expanduser()
    return Classifier(network(file), path, _run_of(path))


def locate(run: str | os.PathLike[str]) -> tuple[type, Path]:
    """Finds the file to load, without importing Keras or TensorFlow.

    Returns:
        A class of `networks`, and the path that it loads.

    Raises:
        NoRunError, RunError: as `load_run`.
    """
    path = Path(run).expanduser()
    if path.is_dir():
        if (path / runs.RECIPE).exists():
            runs.require_finished(path, argument="run")
            return networks.KerasNetwork, path / runs.MODEL
        for folder in (path, *_versions(path)):
            if (folder / _SAVED_MODEL).exists():
                return networks.SavedModelNetwork, folder
    elif path.exists():
        if path.suffix == ".keras":
            return networks.KerasNetwork, path
        if path.suffix == ".tflite":
            return networks.TFLiteNetwork, path
    if path.suffix == ".onnx":
        raise NoRunError(
            f"`run` can't be an ONNX file. Received: {run}",
            argument="run",
            hint="Use the run, or ONNX Runtime: see the guide on export",
        )
    fault = "is none of these" if path.exists() else "does not exist"
    raise NoRunError(
        f"`run` must be a run folder, a .keras or .tflite file, or a SavedModel. Received: {run}, which {fault}",
        argument="run",
        hint="Use a folder that cvt-keras train, prune, cluster or qat wrote, or a file that cvt-keras export wrote",
    )


def _versions(folder):
    """The versions of an exported SavedModel, the newest first."""
    return sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name), reverse=True)


def _run_of(path):
    """The folder of the run that a path is or lies in, such as RUN/export/tflite/int8.tflite; or `None`."""
    return next((folder for folder in (path, *path.resolve().parents[:3]) if (folder / runs.RECIPE).exists()), None)


def require_top(top: int) -> None:
    """Raises ArgumentError unless `top` is at least 1."""
    if top < 1:
        raise ArgumentError(f"`top` must be at least 1. Received: top={top}", argument="top")


def _several(images):
    """One image or several, as an iterable."""
    from PIL import Image

    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    if not isinstance(images, Iterable):
        raise ArgumentError(f"`images` must be {_KINDS}. Received: {type(images).__name__}", argument="images")
    return images


def _pixels(image, reserve):
    """Returns the pixels of a path, an array or a Pillow image, or an `ImageError`."""
    from PIL import Image

    try:
        if isinstance(image, (str, os.PathLike)):
            return images.decode(image_files.read(image), reserve)
        if isinstance(image, Image.Image):
            return images.pixels_of(image)
    except ImageError as error:
        return error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return image
    received = f"an array of {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ArgumentError(f"`images` must be {_KINDS}. Received: {received}", argument="images")
