"""Reads a test image of each class of a run. A process of its own does this, so that the data set's memory is freed.

python -m cvt_keras.export.web.samples RUN [DATA_DIR] prints JSON: `samples`, a list of `{"label": name, "png": base64}`;
`note`, which the page shows with them; and `warnings`, a list of lines for the terminal.
"""

import base64
import contextlib
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

from cvt_keras import cli, runs
from cvt_keras.errors import DataError, UserError

from ..verify import why_ended

MAX_CLASSES = 20  # the page has room for so many


class Samples:
    """Starts the process, and holds the samples once it has read them.

    Args:
        run_dir: the run folder.
        data_dir: the folder of the run's data set; `None` means the one that the run read.
        warn: called with each warning: how the images differ from those of the run, or why there are no samples.
    """

    def __init__(self, run_dir, data_dir, warn):
        self.warn = warn
        self.samples = []
        self.note = ""
        self.stopped = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cvt_keras.export.web.samples", str(run_dir), *([data_dir] if data_dir else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C reaches the server only, which stops this process
        )
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def __call__(self):
        """Waits for the samples.

        Returns:
            A list of dicts, each with a `label` and a `png` of bytes; and the note that the page shows with them. Both may be
            empty.
        """
        self.thread.join()
        return self.samples, self.note

    def stop(self):
        self.stopped = True
        self.process.kill()
        self.thread.join()

    def _read(self):
        output, errors = self.process.communicate()
        if self.process.returncode == 0:
            answer = json.loads(output)
            self.samples = [{**sample, "png": base64.b64decode(sample["png"])} for sample in answer["samples"]]
            self.note = answer["note"]
            for line in answer["warnings"]:
                self.warn(line)
        elif not self.stopped:
            self.warn(f"the page has no test images: {why_ended(self.process.returncode, errors.decode(errors='replace'))}")


def first_of_each_class(source):
    """Yields the name and the first test image of each of the first `MAX_CLASSES` classes of a `Source`, if they have one."""
    for label, name in enumerate(source.class_names[:MAX_CLASSES]):
        for index in (source.test.labels == label).nonzero()[0][:1]:
            yield name, source.test.images[index]


def main(argv):
    run_dir, data_dir = Path(argv[0]), argv[1] if argv[1:] else None
    with contextlib.redirect_stdout(sys.stderr):  # TFDS prints its progress
        images = _load(run_dir, data_dir)
        samples = [
            {"label": name, "png": base64.b64encode(_png(image)).decode()} for name, image in first_of_each_class(images.source)
        ]
    note = f"{images.held_out.capitalize()}. {images.unverified}" if images.unverified else ""
    print(json.dumps({"samples": samples, "note": note, "warnings": images.notes}))


def _png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _load(run_dir, data_dir):
    # Imported here: the server imports this module and needs no TensorFlow.
    from cvt_keras.data import verified
    from cvt_keras.training.recipes import read_recipe

    recipe = read_recipe(run_dir)
    data_dir = data_dir or recipe.data_dir
    if not _on_disk(recipe.dataset, data_dir):
        # A few pictures are not worth a download.
        raise DataError(
            f"{recipe.dataset} is not in {data_dir or 'the folder of TFDS'}, and this command does not download it",
            argument="data_dir",
            hint="Give its folder with --data-dir",
        )
    return verified.load(run_dir / runs.IMAGES, recipe.dataset, data_dir, recipe.preprocessing, recipe.pixel_cache)


def _on_disk(dataset, data_dir):
    if dataset in ("digits", "folder"):
        return True
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset.removeprefix("tfds:"), data_dir=data_dir)
    except Exception:
        return True  # unknown; `sources.load` raises if it is not there
    return Path(builder.data_path).exists()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(" ".join(cli.message(error).splitlines()))  # the server prints the last line
    except OSError as error:
        sys.exit(str(error))
