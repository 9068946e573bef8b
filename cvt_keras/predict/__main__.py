"""The command `cvt-keras predict`: classifies images with a run or an exported file, or evaluates it on labelled ones."""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.cells import cell_len

from cvt_keras import cli, environment, greetings, runs, terminal
from cvt_keras.data import image_files, images, packages
from cvt_keras.errors import ArgumentError, ImageError
from cvt_keras.predict.classifier import load_run, locate, require_top
from cvt_keras.predict.evaluation import evaluate
from cvt_keras.predict.networks import KerasNetwork

_MIN_IMAGES_FOR_PROGRESS = 50


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, a .keras file, or a .tflite file or SavedModel folder that cvt-keras export wrote."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")] = ()
    """Image files; folders, which are searched at any depth; patterns such as 'photos/*.jpg'; or - for a list of paths on
    standard input.
    Formats: JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF, and HEIC with pillow-heif.
    A file that is not an image or can't be read is reported on stderr, with exit code 1.
    Hidden files and system files in folders (Thumbs.db, desktop.ini, @eaDir, __MACOSX and the like) are skipped."""
    top: int | None = None
    """Classes to print per image, most probable first; defaults to 1. With --explain, also those to draw; defaults to 3."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a line of JSON per image; with --evaluate, one line with all results."""
    csv: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a table of comma-separated values; with --evaluate, a row per class."""
    evaluate: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Instead of IMAGE...: a folder with a folder of images for each class. Prints the accuracy and writes a page.
    Images that the run was trained on are left out."""
    explain: Annotated[Path | None, tyro.conf.arg(metavar="OUT.png")] = None
    """Draw the evidence for the most probable classes of the image (Grad-CAM): for --top classes, by default three.
    For one image, and a run or .keras file."""
    page: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The page to write with --evaluate; an existing one is replaced. Defaults to evaluation/DIR.html in the run folder, and to
    evaluation/DIR-FILE.html for an exported file; without a run, in the current folder. With --json or --csv, no page is
    written by default."""


def parse(argv):
    """Reads the command line. Raises an `ArgumentError` for flags that contradict each other, or an invalid value."""
    arguments = cli.parse_images(
        Arguments, argv, prog="cvt-keras predict", description="Classify images, or evaluate a network on labelled ones."
    )
    if arguments.top is not None:
        require_top(arguments.top)
        if arguments.evaluate:
            raise ArgumentError(
                f"`top` can't be combined with `evaluate`. Received: top={arguments.top}",
                argument="top",
                hint="Leave out --top",
            )
    if arguments.json and arguments.csv:
        raise ArgumentError("`csv` can't be combined with `json`", argument="csv", hint="Use --csv or --json")
    if arguments.evaluate and arguments.images:
        raise ArgumentError(
            f"`evaluate` takes no images beside its folder. Received: {arguments.images[0]}",
            argument="evaluate",
            hint="Leave out IMAGE... or --evaluate",
        )
    if arguments.explain and arguments.evaluate:
        raise ArgumentError(
            f"`explain` can't be combined with `evaluate`. Received: explain={arguments.explain}",
            argument="explain",
            hint="Leave out --evaluate",
        )
    if arguments.explain and arguments.explain.suffix.lower() != ".png":
        raise ArgumentError(
            f"`explain` must be a .png file. Received: explain={arguments.explain}",
            argument="explain",
            hint=f"Use --explain {arguments.explain.with_suffix('.png')}" if arguments.explain.name else "",
        )
    if arguments.page and not arguments.evaluate:
        raise ArgumentError(
            f"`page` needs `evaluate`. Received: page={arguments.page}", argument="page", hint="Add --evaluate DIR"
        )
    return arguments


def main(argv):
    arguments = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may have characters that stdout can't encode
    locate(arguments.run)
    files = [] if arguments.evaluate else list(image_files.listed(arguments.images))
    if arguments.explain:
        _require_explainable(arguments.run, files)
        runs.require_writable_file(arguments.explain, argument="explain")
    if arguments.evaluate and not arguments.evaluate.expanduser().is_dir():
        raise ArgumentError(
            f"`evaluate` must be a folder. Received: evaluate={arguments.evaluate}",
            argument="evaluate",
            hint="Use --evaluate DIR, with one folder of images per class",
        )
    environment.start()
    environment.keep_tensorflow_on_cpu()
    with greetings.held_back():
        classifier = load_run(arguments.run)
        packages.require("tensorflow").config.list_physical_devices()  # beside JAX, it starts only here
    try:
        if arguments.evaluate:
            return _evaluate(classifier, arguments)
        if arguments.explain:
            _require_gradients(classifier)
        code = _classify(classifier, files, arguments)
        if arguments.explain and code == 0:
            _explain(classifier, files[0][0], arguments)
        return code
    except BrokenPipeError:  # the reader of stdout has closed it, as head does
        terminal.discard_output()
        return 1


# === Images ===


def _classify(classifier, files, arguments):
    """Prints a line for each image that can be read. Returns the exit code."""
    style = _json if arguments.json else _csv if arguments.csv else _table
    top = arguments.top or 1
    write = style(classifier, [path for path, _ in files], min(top, len(classifier.class_names)))
    refused = 0
    # On a terminal the lines show progress themselves, also through a pipe such as tee.
    shown = terminal.is_file(sys.stdout) and len(files) >= _MIN_IMAGES_FOR_PROGRESS
    with terminal.progress(len(files), stream=sys.stderr, shown=shown) as bar:
        for path, answer in _answers(classifier, files, top):
            if isinstance(answer, ImageError):
                refused += 1
                bar.clear()
                _warn(f"{terminal.one_line(path)}: {answer}")
            else:
                write(answer)
            bar.update()
    sys.stdout.flush()
    return 1 if refused else 0


def _answers(classifier, files, top):
    """Yields each path with its `Prediction` or `ImageError`, in the order of the files."""
    answers = classifier.classify((path for path, error in files if error is None), top)
    for path, error in files:
        yield path, next(answers) if error is None else error


def _json(classifier, paths, top):
    def write(answer):
        top = [{"label": label, "probability": round(probability, 6)} for label, probability in answer.top]
        print(json.dumps({"path": str(answer.path), **top[0], "unsure": answer.unsure, "top": top}))

    return write


def _csv(classifier, paths, top):
    rows = csv.writer(sys.stdout, lineterminator="\n")
    numbers = ["", *(f"_{number}" for number in range(2, top + 1))]
    rows.writerow(["path", "unsure", *(f"{name}{number}" for number in numbers for name in ("label", "probability"))])

    def write(answer):
        fields = (field for label, value in answer.top for field in (label, f"{value:.6g}"))
        rows.writerow([answer.path, "yes" if answer.unsure else "no", *fields])

    return write


def _table(classifier, paths, top):
    file_width = max((cell_len(terminal.one_line(path)) for path in paths), default=0)
    class_width = max(map(cell_len, map(terminal.one_line, classifier.class_names)))

    def padded(text, width):
        text = terminal.one_line(text)
        return text + " " * (width - cell_len(text))

    def write(answer):
        classes = (f"{padded(label, class_width)}  {probability:6.1%}" for label, probability in answer.top)
        print(padded(answer.path, file_width), *classes, *(["unsure"] if answer.unsure else []), sep="  ")

    return write


# === Explanation ===


def _require_explainable(run, files):
    """Raises an `ArgumentError` unless Grad-CAM can be drawn: of one image, by a Keras model."""
    if len(files) != 1:
        raise ArgumentError(f"`explain` needs one image. Received: {len(files):,} images", argument="explain")
    network, file = locate(run)
    if network is not KerasNetwork:
        raise ArgumentError(
            f"`explain` needs a Keras model, as an exported file has no gradients. Received: run={file}",
            argument="explain",
            hint="Use the run folder or its model.keras",
        )


def _require_gradients(classifier):
    """Raises an `ArgumentError` for a network with int8 rounding."""
    from cvt_keras.quantized.model import quantized_cvt_of

    if quantized_cvt_of(classifier.model) is not None:
        raise ArgumentError(
            f"`explain` needs a network without int8 rounding, which has no gradients. Received: run={classifier.path}",
            argument="explain",
            hint="Explain the run that it started from",
        )


def _explain(classifier, path, arguments):
    """Draws the image with the Grad-CAM of its most probable classes."""
    from cvt_keras import attention
    from cvt_keras.report import figures

    pixels = images.fit(images.decode(image_files.read(path)), classifier.preprocessing).numpy()
    [answer] = classifier.predict(path, top=arguments.top or 3)
    classes = [classifier.class_names.index(label) for label, _ in answer.top]
    maps = attention.grad_cam(classifier.model, np.repeat(pixels[None], len(classes), axis=0), classes)
    probabilities = [probability for _, probability in answer.top]
    names = figures.picture_names(classifier.class_names)
    arguments.explain.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figures.explanation(pixels, maps, classes, probabilities, names), arguments.explain)
    print(f"the picture is {arguments.explain}", file=sys.stderr)


# === Evaluation ===


def _evaluate(classifier, arguments):
    """Evaluates, prints the results, and writes the page. Returns the exit code."""
    page = arguments.page
    if page is None and not (arguments.json or arguments.csv):
        page = _default_page(classifier, arguments.evaluate)
    if page is not None:
        runs.require_writable_file(page, argument="page")

    def progress(answers, n):
        with terminal.progress(n, stream=sys.stderr, shown=n >= _MIN_IMAGES_FOR_PROGRESS) as bar:
            for answer in answers:
                yield answer
                bar.update()

    result = evaluate(classifier, arguments.evaluate, page, progress)
    for path, reason in result.unreadable:
        _warn(f"{terminal.one_line(path)}: {reason}")
    for warning in result.warnings:
        _warn(warning)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "page": page and str(page)}))
    elif arguments.csv:
        columns = ["name", "top1", "top1_low", "top1_high", "precision", "f1", "images"]
        rows = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        for row in result.per_class:
            low, high = row["top1_interval"] or (None, None)
            rows.writerow({**row, "top1_low": low, "top1_high": high})
        print(_summary(result), file=sys.stderr)
    else:
        _print_results(result)
        print(f"the page is {page}")
    return 1 if result.unreadable else 0


def _default_page(classifier, folder):
    name, path = folder.resolve().name or "images", classifier.path.resolve()
    run_dir = classifier.run_dir or Path()
    if path not in (run_dir.resolve(), run_dir.resolve() / runs.MODEL):
        name += f"-{path.stem}"
    return run_dir / "evaluation" / f"{name}.html"


def _print_results(result):
    measured = [row for row in result.per_class if row["images"]]
    width = max(cell_len(row["name"]) for row in measured)
    for row in measured:
        print(f"{row['name']}{' ' * (width - cell_len(row['name']))}  {row['top1']:6.1%} of {row['images']:,}")
    if missing := [row["name"] for row in result.per_class if not row["images"]]:
        print(f"no images of {', '.join(missing[:10])}" + (f" and {len(missing) - 10} more" if len(missing) > 10 else ""))
    for reason, n in result.left_out.items():
        print(f"left out: {n:,} ({reason})")
    print(_summary(result))


def _summary(result):
    low, high = result.scores["top1_interval"]
    return f"{result.scores['top1']:.2%} top-1 (95% interval: {low:.2%} to {high:.2%}) on {result.scores['images']:,} images"


def _warn(text):
    print(f"cvt-keras predict: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli.run("predict", sys.argv[1:]))
