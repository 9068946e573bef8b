"""The command blocks of the README and the guides: test_docs.py parses them, and as a program this runs them in order.

    python tests/docs_blocks.py [PAGE ...]

runs them in a new folder with the checkout's files and some photos. A double takes the place of TF Serving.
`--epochs` and `--train-limit` are replaced, so that each training takes seconds, and `python -m pytest` runs one file. A
block runs unless the line above it is `<!-- not run in CI: REASON -->`. What it prints is compared with the page.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
GUIDES = (
    *("your-photos", "predict", "training", "python", "pretrained", "search", "many-machines", "compression"),
    *("export", "serving", "mobile", "browser", "what-it-sees"),
)
# Each list runs in a folder of its own, in this order: later guides use the runs of earlier ones.
FOLDERS = (("README.md",), tuple(f"docs/guides/{name}.md" for name in GUIDES))
PAGES = tuple(page for pages in FOLDERS for page in pages)
OUTPUT = re.compile(r"(?:(?!^```).)*?^```text\n(?P<output>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"(?:^<!-- not run in CI: (?P<reason>.+?) -->\n)?^```bash\n(?P<script>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\s*(?:[A-Z_]+=\S+ )*(?:cvt-keras|python) ")
# From a checkout, each command has a second name.
PROGRAMS = {
    ("cvt-keras",): (),
    ("python", "train.py"): ("train",),
    ("python", "-m", "export"): ("export",),
    ("python", "-m", "cvt_keras.search"): ("search",),
    ("python", "-m", "cvt_keras.compression"): (),
    ("python", "-m", "cvt_keras.pretrained"): ("convert",),
}
# CI has installed everything, and runs the rest of a line that installs.
INSTALLATION = re.compile(r"python3\.11 -m venv \.venv && \.venv/bin/pip install -r \S+ && \.venv/bin/")
# What the trainings are cut to: enough for every command after them, and the README's enough to learn something.
TRAINING = ("train", "search", "prune", "cluster", "qat")
EPOCHS, LIMIT, README_LIMIT = "1", "256", "12800"
README_RUN = "runs/cifar10-cifar10-cvt_cifar"
LEAST_TOP1 = 0.25  # after one epoch of 12,800 images
# A block that starts a server names the run that it serves. The double takes its place.
SERVER = re.compile(r'^RUN="\$PWD/(\S+)" docker compose', re.MULTILINE)
# Not compared with the pages: the device's line, and the classes that a network sees after one epoch.
DEVICE = re.compile(r", (?:float32|mixed_\w+), XLA (?:on|off)$")
ANSWER = re.compile(r"^(?:cvt-keras (?:classify|predict)|.*curl)", re.MULTILINE)


class Block(NamedTuple):
    page: str
    line: int
    script: str
    reason: str | None  # why CI does not run it
    output: str  # what the page shows of its output: the text block after it


def blocks(page):
    """The bash blocks of a page, given by its path from the top of the repository."""
    text = (ROOT / page).read_text()
    result = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("script")) + 1
        output = OUTPUT.match(text, match.end())
        result.append(Block(page, line, match["script"], match["reason"], output["output"] if output else ""))
    return result


def missing_lines(shown, printed):
    """Returns the lines of a page's output block that a command did not print.

    Numbers may differ, and so may the device. `...` and progress bars stand for anything, and Keras prints no `Epoch 1/1`.
    """
    printed = re.sub(r"[\r\x08]+", "\n", re.sub(r"\x1b\[[0-9;]*m", "", printed))
    number = r"\d(?:[\d.,]*\d)?(?:e[-+]\d+)?"
    result = []
    for line in shown.splitlines():
        if line.startswith("Epoch ") or DEVICE.search(line):
            continue
        pattern = ""
        for literal, open_part, varying in re.findall(rf"(.*?)(?:(\.\.\.|━+)|({number})|$)", line.strip()):
            pattern += re.escape(literal) + (".*" if open_part else number if varying else "")
        if not re.search(rf"^\s*{pattern}\s*$", printed, re.MULTILINE):
            result.append(line)
    return result


def lines(script):
    """The lines of a script without its installation, those that a backslash continues joined."""
    return INSTALLATION.sub("", script).replace("\\\n", " ").splitlines()


def commands(script):
    """Yields the `cvt-keras` command lines in a script as lists of words after `cvt-keras`."""
    for line in lines(script):
        if not COMMAND.match(line):
            continue
        words = shlex.split(line, comments=True)
        while "=" in words[0]:  # a variable for this command
            words = words[1:]
        for program, name in PROGRAMS.items():
            if tuple(words[: len(program)]) == program:
                yield [*name, *words[len(program) :]]


def shortened(script, limit=LIMIT):
    """The script with each training cut short, by other values of its own flags or by added ones."""
    result = []
    for line in lines(script):
        for words in commands(line):
            if words[0] not in TRAINING or "--help" in words:
                continue
            code, comment = (*re.split(r"(?=\s+#)", line, maxsplit=1), "")[:2]
            for flag, value in (("--epochs", EPOCHS), ("--train-limit", limit)):
                code = re.sub(rf"{flag}[ =]\S+", "", code) + f" {flag} {value}"
            line = code + comment
        result.append(line)
    return "\n".join(result).replace("python -m pytest", "python -m pytest -n 0 tests/test_docs.py")


def write_photos(folder):
    """Writes `photos/apples` and `photos/pears`, 150 made photos each, cat.jpg and apple.jpg."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name, colour in (("apples", (190, 40, 40)), ("pears", (110, 180, 60))):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(150):
            pixels = np.clip(np.array(colour) + random.normal(0, 40, (60, 80, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.jpg")
    for name in ("cat", "apple"):
        Image.fromarray(pixels).save(folder / f"{name}.jpg")


def start_server(folder, run):
    """Starts the double of TF Serving for a run's SavedModel, on the ports of the real one."""
    double = str(ROOT / "tests" / "export" / "double.py")
    output = folder / "server.txt"
    with output.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, double, f"{run}/export/saved_model", "8500", "8501"], cwd=folder, stdout=file
        )
    while not output.read_text():  # its first line says that it answers
        if server.poll() is not None:
            raise SystemExit(f"the double of TF Serving for {run} ended at its start")
        time.sleep(0.2)
    return server


def stop_server(server):
    if server:
        server.kill()
        server.wait()


# `cvt-keras web` serves until it is stopped: once the page has come, by SIGTERM, which ends it with 143.
WEB = """
cvt-keras() {
  if [ "$1" != web ]; then command cvt-keras "$@"; return; fi
  : > web.txt  # not what an earlier page left
  "$(type -P cvt-keras)" "$@" > web.txt 2>&1 &
  trap 'kill $! 2> /dev/null || true' EXIT
  until grep -q http:// web.txt; do kill -0 $!; sleep 1; done
  cat web.txt
  curl --fail --silent --show-error --output web.html "$(grep -o 'http://[^ ]*' web.txt)"
  kill $!
  wait $! || [ $? = 143 ]
}
"""


def run(pages, folder):
    """Runs the blocks of `pages` in `folder`. Returns the blocks that were not run, and the stale lines of the pages."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for path in ROOT.iterdir():
        if path.name not in (".git", "runs", "photos"):
            (folder / path.name).symlink_to(path)
    write_photos(folder)
    not_run, stale, server = [], [], None
    try:
        for block in (block for page in pages for block in blocks(page)):
            if block.reason:
                not_run.append(block)
                if served := SERVER.search(block.script):
                    stop_server(server)
                    server = start_server(folder, served[1])
                continue
            script = shortened(block.script, README_LIMIT if block.page == "README.md" else LIMIT)
            print(f"=== {block.page}:{block.line}\n{script.strip()}", flush=True)
            start = time.monotonic()
            command = ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{WEB}{script}"]
            printed = ""
            with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, errors="replace") as process:
                for line in process.stdout:
                    printed += line
                    print(line, end="", flush=True)
            print(f"=== {time.monotonic() - start:.0f} s", flush=True)
            if process.returncode:
                raise SystemExit(f"{block.page}:{block.line} ended with {process.returncode}")
            # Which class a network sees after one epoch is open.
            if not ANSWER.search(block.script) and (missing := missing_lines(block.output, printed)):
                stale += [f"{block.page}:{block.line}: {line}" for line in missing]
    finally:
        stop_server(server)
    return not_run, stale


def main(chosen):
    if unknown := set(chosen) - set(PAGES):
        raise SystemExit(f"no pages to run: {', '.join(sorted(unknown))}. Choose from {', '.join(PAGES)}")
    not_run, stale = [], []
    for pages in FOLDERS:
        if pages := [page for page in pages if page in (chosen or PAGES)]:
            with tempfile.TemporaryDirectory() as folder:
                more_not_run, more_stale = run(pages, Path(folder))
                not_run += more_not_run
                stale += more_stale
                if "README.md" in pages:
                    top1 = json.loads((Path(folder) / README_RUN / "report.json").read_text())["test"]["top1"]
                    assert top1 >= LEAST_TOP1, f"the README's run ended at {top1:.2%}; {LEAST_TOP1:.0%} is the least"
    print("Not run:", *(f"{block.page}:{block.line}: {block.reason}" for block in not_run), sep="\n  ")
    if stale:
        raise SystemExit("\n  ".join(["Lines that the pages show and the commands did not print:", *stale]))


if __name__ == "__main__":
    main(sys.argv[1:])
