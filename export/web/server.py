"""Serves the page to this machine only: a table of paths."""

import base64
import hashlib
import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..verify import TFLITE_FORMATS

WEB = Path(__file__).parent
HOST = "127.0.0.1"
LABELS = "export/labels.txt"

PAGE = ("index.html", "style.css", "icon.svg", "app.js", "files.js", "formats.js", "network.js", "pixels.js")
PACKAGES = "node_modules/@litertjs"
RUNTIME = (
    f"{PACKAGES}/core/dist/index.js",
    f"{PACKAGES}/wasm-utils/dist/index.js",
    # The second where a browser's WebAssembly has no relaxed SIMD.
    *(f"{PACKAGES}/core/wasm/litert_wasm_{name}.{end}" for name in ("internal", "compat_internal") for end in ("js", "wasm")),
)
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "tflite": "application/octet-stream",
    "wasm": "application/wasm",
}


class Server(ThreadingHTTPServer):
    """Serves the page, LiteRT, and of a run its .tflite files, labels and samples; of all else there is nothing.

    Args:
        run_dir: of an exported run.
        port: on `HOST`; 0 is any free one.
        samples: a function without arguments -> a list of dicts, each with a `label` and a `png` of bytes; and a note that the
            page shows with them, or "". It is called when the page asks for them, in a thread that may wait.

    Raises:
        OSError: if the port can't be had.
        OverflowError: if there is no such port.
    """

    def __init__(self, run_dir, port, samples=lambda: ([], "")):
        super().__init__((HOST, port), _Handler)
        self.run_dir = Path(run_dir)
        self.samples = samples
        # The map of modules is the one script that stands in the page itself.
        [script] = re.findall(r"<script type=\"importmap\">(.*?)</script>", (WEB / "index.html").read_text(), re.DOTALL)
        self.policy = _policy(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())

    @property
    def url(self):
        return f"http://{HOST}:{self.server_port}/"

    def hosts(self):
        """What a browser that asks for this server calls it."""
        names = (HOST, "localhost")
        # Of HTTP's own port a browser says nothing.
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == 80 else ()))

    def find(self, path):
        """The bytes that lie at a URL's path and their type, or `None`. The path is looked up, never joined to a folder's."""
        if path in ("/", *(f"/{name}" for name in (*PAGE, *RUNTIME))):
            return _file(WEB / (path[1:] or "index.html"))
        if path == "/run.json":
            return json.dumps({"labels": self.labels(), "artifacts": artifacts(self.run_dir)}).encode(), TYPES["json"]
        if path in (f"/{kind}.tflite" for kind in TFLITE_FORMATS):
            return _file(self.run_dir / "export" / "tflite" / path[1:])
        if path == "/samples.json":
            samples, note = self.samples()
            return json.dumps({"labels": [sample["label"] for sample in samples], "note": note}).encode(), TYPES["json"]
        if number := re.fullmatch(r"/samples/([0-9]{1,4})\.png", path):
            for sample in self.samples()[0][int(number[1]) :][:1]:
                return sample["png"], TYPES["png"]
        return None

    def labels(self):
        return (self.run_dir / LABELS).read_text(encoding="utf-8").split("\n")[:-1]

    def handle_error(self, request, client_address):
        """A browser that hangs up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        # A name that some other site's owner points at this machine would let that site read what is served.
        if self.headers.get("Host") not in self.server.hosts():
            port = self.server.server_port
            said = f"This page answers at {self.server.url} alone; through a tunnel, as ssh -L {port}:localhost:{port}\n"
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, said.encode())
        try:
            found = self.server.find(self.path.partition("?")[0])
        except OSError:  # gone since the page was loaded, or not to be read
            found = None
        if found:
            return self._answer(HTTPStatus.OK, *found)
        self._answer(HTTPStatus.NOT_FOUND, f"There is nothing here; the page is at {self.server.url}\n".encode())

    do_HEAD = do_GET

    def _answer(self, status, body=b"", kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")  # the next export has the same names
        # A page that shares nothing with others is given a clock of 5 microseconds in place of 100.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def artifacts(run_dir):
    """The .tflite files of a run -> a list of dicts, each with its `name` and `bytes`, in the order of `TFLITE_FORMATS`."""
    files = {kind: Path(run_dir) / "export" / "tflite" / f"{kind}.tflite" for kind in TFLITE_FORMATS}
    return [{"name": kind, "bytes": file.stat().st_size} for kind, file in files.items() if file.is_file()]


def _file(path):
    return path.read_bytes(), TYPES[path.suffix[1:]]


def _policy(digest):
    """A Content-Security-Policy that lets the page ask nobody but this server for anything."""
    rules = {
        "default-src": "'none'",
        "script-src": f"'self' 'wasm-unsafe-eval' 'sha256-{digest}'",
        "style-src": "'self'",
        "img-src": "'self' blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())
