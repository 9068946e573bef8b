"""Reads a test image of each class of a run, in a process of its own, which gives back the memory that a data set takes.

python -m cvt_keras.export.web.samples RUN [DATA_DIR] prints JSON: `samples`, a list of `{"label": name, "png": base64}`;
`note`, what the page says about them; and `warnings`, a list of lines for the terminal.
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

MOST = 20  # the page has room for so many classes


class Samples:
    """Starts the process, and holds the samples once it has read them.

    Args:
        run_dir: the run folder.
        data_dir: where the run's data set lies now; `None` means where it was.
        tell: called with each line that the user must see: how the images differ from those of the run, or why there are no
            samples.
    """

    def __init__(self, run_dir, data_dir, tell):
        self.tell = tell
        self.found = []
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
            A list of dicts, each with a `label` and a `png` of bytes, empty if there are none; and what the page must say about
            them, which may be empty.
        """
        self.thread.join()
        return self.found, self.note

    def stop(self):
        self.stopped = True
        self.process.kill()
        self.thread.join()

    def _read(self):
        printed, errors = self.process.communicate()
        if self.process.returncode == 0:
            answer = json.loads(printed)
            self.found = [{**sample, "png": base64.b64decode(sample["png"])} for sample in answer["samples"]]
            self.note = answer["note"]
            for line in answer["warnings"]:
                self.tell(line)
        elif not self.stopped:
            self.tell(f"the page has no samples: {why_ended(self.process.returncode, errors.decode(errors='replace'))}")


def first_of_each_class(source):
    """Yields the name and the first test image of each of the first `MOST` classes of a `Source` that have one."""
    for label, name in enumerate(source.class_names[:MOST]):
        for place in (source.test.labels == label).nonzero()[0][:1]:
            yield name, source.test.images[place]


def main(argv):
    run_dir, data_dir = Path(argv[0]), argv[1] if argv[1:] else None
    with contextlib.redirect_stdout(sys.stderr):  # TFDS prints its progress
        images = _load(run_dir, data_dir)
        samples = [
            {"label": name, "png": base64.b64encode(_png(image)).decode()} for name, image in first_of_each_class(images.source)
        ]
    note = f"{images.held_out.capitalize()}. {images.unverified}" if images.unverified else ""  # the page shows it
    print(json.dumps({"samples": samples, "note": note, "warnings": images.notes}))


def _png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _load(run_dir, data_dir):
    # Here, as the server, which starts this process, does without TensorFlow.
    from cvt_keras.data import verified
    from cvt_keras.training.recipes import read_recipe

    recipe = read_recipe(run_dir)
    data_dir = data_dir or recipe.data_dir
    if not _on_disk(recipe.dataset, data_dir):
        # A few pictures are not worth a download.
        raise DataError(
            f"{recipe.dataset} is not in {data_dir or 'the folder of TFDS'}, and is not downloaded",
            argument="data_dir",
            hint="Name its folder with --data-dir",
        )
    return verified.load(run_dir / runs.IMAGES, recipe.dataset, data_dir, recipe.image_size)


def _on_disk(dataset, data_dir):
    if dataset in ("digits", "folder"):
        return True
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset.removeprefix("tfds:"), data_dir=data_dir)
    except Exception:
        return True  # perhaps; if not, `sources.load` says what is wrong
    return Path(builder.data_path).exists()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(" ".join(cli.message(error).splitlines()))  # the server shows the last line
    except OSError as error:
        sys.exit(str(error))
