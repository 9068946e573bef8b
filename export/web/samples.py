"""A test image of each class of a run, in a process of its own, which gives back the memory that a data set takes.

python -m export.web.samples RUN [DATA_DIR] prints them as JSON: a list of `{"label": name, "png": base64}`.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from cvt_keras.export.verify import why_ended

from cvt_keras.errors import DataError, RunError

ROOT = Path(__file__).parent.parent.parent
# Of the first classes, where there are more: a page has room for so many.
MOST = 20


class Samples:
    """Starts reading, and holds what comes of it.

    Args:
        run_dir: of a run whose data set is wanted.
        data_dir: where that lies now; `None` means where it was.
        tell: called with a line that says why, if there are none.
    """

    def __init__(self, run_dir, data_dir, tell):
        self.tell = tell
        self.found = []
        self.stopped = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "export.web.samples", str(run_dir), *([data_dir] if data_dir else [])],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which stops this one
        )
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def __call__(self):
        """Waits -> a list of dicts, each with a `label` and a `png` of bytes; empty if they can't be had."""
        self.thread.join()
        return self.found

    def stop(self):
        self.stopped = True
        self.process.kill()
        self.thread.join()

    def _read(self):
        printed, said = self.process.communicate()
        if self.process.returncode == 0:
            self.found = [{**sample, "png": base64.b64decode(sample["png"])} for sample in json.loads(printed)]
        elif not self.stopped:
            self.tell(why_ended(self.process.returncode, said.decode(errors="replace")))


def first_of_each_class(source):
    """A `Source` -> the name of each of the first `MOST` classes and its first test image, where it has one."""
    for label, name in enumerate(source.class_names[:MOST]):
        for place in (source.test.labels == label).nonzero()[0][:1]:
            yield name, source.test.images[place]


def main(argv):
    run_dir, data_dir = Path(argv[0]), argv[1] if argv[1:] else None
    with contextlib.redirect_stdout(sys.stderr):  # TFDS tells there what it does
        found = _read(run_dir, data_dir)
    print(json.dumps([{"label": name, "png": base64.b64encode(png).decode()} for name, png in found]))


def _read(run_dir, data_dir):
    """-> pairs of a class's name and a PNG."""
    # Imported here: the server, which starts this process, does without TensorFlow.
    import tensorflow as tf

    from cvt_keras import runs
    from cvt_keras.data import sources
    from cvt_keras.errors import RecipeError
    from cvt_keras.training import Recipe

    try:
        recipe = Recipe.from_settings(runs.read_json(run_dir / runs.RECIPE))
        data_dir = data_dir or recipe.data_dir
        if not _on_disk(recipe.dataset, data_dir):
            # A few pictures are not worth the time that takes.
            sys.exit(f"{recipe.dataset} is not in {data_dir or 'the folder of TFDS'}, and is not downloaded: see --data-dir")
        source = sources.load(recipe.dataset, data_dir, recipe.image_size)
    except (OSError, RecipeError, TypeError, RunError, DataError) as error:
        sys.exit(str(error))
    return [(name, tf.io.encode_png(image).numpy()) for name, image in first_of_each_class(source)]


def _on_disk(dataset, data_dir):
    if dataset in ("digits", "folder"):
        return True
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset.removeprefix("tfds:"), data_dir=data_dir)
    except Exception:
        return True  # not for sure; but what is wrong is told by who reads it
    return Path(builder.data_path).exists()


if __name__ == "__main__":
    main(sys.argv[1:])
