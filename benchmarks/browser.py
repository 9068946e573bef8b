"""Time per image in the browser: python benchmarks/browser.py RUN

Runs each .tflite file of a run in headless Chromium (LiteRT in WebAssembly) and in Python (LiteRT), each on one thread. The two
take turns, so that other load on the machine affects both alike. Needs `npm ci --prefix export/web` and Chromium.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from ai_edge_litert.interpreter import Interpreter
from playwright.sync_api import sync_playwright

from cvt_keras import environment
from cvt_keras.export.web.__main__ import installation
from cvt_keras.export.web.server import RUNTIME, WEB, Server, artifacts
from measuring import require_at_least_one

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# The last flags keep Chromium from contacting Google's hosts.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# Times from pixels to probabilities, as `_milliseconds` does. The input is noise: the time does not depend on it.
IN_THE_BROWSER = """async ({ name, pixels, runs }) => {
  const { Network, readFile } = await import("/network.js");
  const network = await Network.load(await readFile(name));
  const times = [];
  for (let i = 0; i < runs; i++) times.push((await network.run(Uint8Array.from(pixels))).milliseconds);
  network.delete();
  return times;
}"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Median milliseconds per image, for each .tflite file of a run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of an exported run."""
    runs: int = 200
    """Timed runs per file and turn. A tenth as many warm up before them."""
    turns: int = 5
    """Turns per file. The result is the median of the turns' medians."""

    def __post_init__(self):
        require_at_least_one(self, "runs", "turns")
        if not artifacts(self.run):
            raise ValueError(
                f"`run` must be an exported run. Received: run={self.run}. Export it first: cvt-keras export {self.run}"
            )


def main(arguments):
    warm_up = max(1, arguments.runs // 10)
    names = [artifact["name"] for artifact in artifacts(arguments.run)]
    interpreters = {}
    for name in names:
        interpreters[name] = Interpreter(str(arguments.run / "export" / "tflite" / f"{name}.tflite"), num_threads=1)
        interpreters[name].allocate_tensors()
    shape = interpreters[names[0]].get_input_details()[0]["shape"]
    pixels = np.random.default_rng(0).integers(0, 256, shape, "uint8")

    medians = {name: {"browser": [], "python": []} for name in names}
    with _page(arguments.run) as (browser, page):
        for _ in range(arguments.turns):
            for name in names:
                arguments_of_page = {"name": name, "pixels": pixels.ravel().tolist(), "runs": warm_up + arguments.runs}
                times = page.evaluate(IN_THE_BROWSER, arguments_of_page)
                medians[name]["browser"].append(statistics.median(times[warm_up:]))
                times = [_milliseconds(interpreters[name], pixels) for _ in range(warm_up + arguments.runs)]
                medians[name]["python"].append(statistics.median(times[warm_up:]))
        chromium = f"Chromium {browser.version}"
    core = json.loads((WEB / "node_modules/@litertjs/core/package.json").read_text())["version"]
    python = importlib.metadata.version("ai-edge-litert")
    print(f"{environment.cpu()}; median of {arguments.turns} turns of {arguments.runs} runs (minimum to maximum)\n")
    print(
        f"| file | MB | ms, {chromium}, @litertjs/core {core}, WASM, one thread | ms, LiteRT {python} in Python, one thread |"
    )
    print("| --- | --- | --- | --- |")
    for artifact in artifacts(arguments.run):
        cells = [f"`{artifact['name']}`", f"{artifact['bytes'] / 1e6:.2f}"]
        for values in medians[artifact["name"]].values():
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"| {' | '.join(cells)} |")


def missing():
    """Lists the commands that install what is missing: LiteRT.js and Chromium."""
    lines = [] if all((WEB / name).exists() for name in RUNTIME) else [installation()]
    return lines if CHROMIUM else [*lines, "apt-get install chromium"]


@contextlib.contextmanager
def chromium():
    """Runs headless Chromium in the block."""
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser:
        yield browser


@contextlib.contextmanager
def _page(run_dir):
    """Serves and opens the page of a run in the block. Yields `(browser, page)`."""
    if lines := missing():
        raise SystemExit(f"to run this benchmark: {lines[0]}")
    with Server(run_dir, 0) as server, chromium() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            page = browser.new_page()
            page.goto(server.url)
            page.get_by_text("is ready").wait_for()
            yield browser, page
        finally:
            server.shutdown()


def _milliseconds(interpreter, pixels):
    [network_input], [output] = interpreter.get_input_details(), interpreter.get_output_details()
    started = time.perf_counter()
    interpreter.set_tensor(network_input["index"], pixels)
    interpreter.invoke()
    interpreter.get_tensor(output["index"])
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
