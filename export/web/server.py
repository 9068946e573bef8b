"""The HTTP server of the page, for this machine only. It serves a fixed list of paths."""

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
REPORT = "export/report.json"

PAGE = ("index.html", "style.css", "icon.svg", "app.js", "files.js", "formats.js", "network.js", "pixels.js")
PACKAGES = "node_modules/@litertjs"
RUNTIME = (
    f"{PACKAGES}/core/dist/index.js",
    f"{PACKAGES}/wasm-utils/dist/index.js",
    # `compat_internal` is for browsers without relaxed SIMD.
    *(
        f"{PACKAGES}/core/wasm/litert_wasm_{name}.{ending}"
        for name in ("internal", "compat_internal")
        for ending in ("js", "wasm")
    ),
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
    """Serves the page, LiteRT, and a run's .tflite files, labels and samples. Every other path is 404.

    Args:
        run_dir: the folder of an exported run.
        port: on `HOST`; 0 picks a free one.
        resizing: how the page resizes images, a dict of the recipe's `resize`, `crop_pct` and `interpolation`; `None` means
            stretching, bilinearly.
        samples: a function without arguments -> a list of dicts, each with a `label` and a `png` of bytes; and the note that
            the page shows with them, or "". Called in the thread of a request, so it may wait.

    Raises:
        OSError: if the port is in use or not allowed.
        OverflowError: if the port is out of range.
    """

    def __init__(self, run_dir, port, resizing=None, samples=lambda: ([], "")):
        super().__init__((HOST, port), _Handler)
        self.run_dir = Path(run_dir)
        self.resizing = resizing or {}
        self.samples = samples
        # The import map is the only inline script. The policy allows it by its digest.
        [script] = re.findall(r"<script type=\"importmap\">(.*?)</script>", (WEB / "index.html").read_text(), re.DOTALL)
        self.policy = _policy(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())

    @property
    def url(self):
        return f"http://{HOST}:{self.server_port}/"

    def hosts(self):
        """The values of the Host header that are accepted."""
        names = (HOST, "localhost")
        # Browsers leave out port 80.
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == 80 else ()))

    def find(self, path):
        """Returns the bytes at a URL's path and their type, or `None`. The path is compared, never joined to a folder."""
        if path in ("/", *(f"/{name}" for name in (*PAGE, *RUNTIME))):
            return _file(WEB / (path[1:] or "index.html"))
        if path == "/run.json":
            run = {"labels": self.labels(), "artifacts": artifacts(self.run_dir), "resizing": self.resizing}
            run["threshold"] = self.threshold()
            return json.dumps(run).encode(), TYPES["json"]
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

    def threshold(self):
        """The probability below which an answer is unsure; 0 for an export of an older version."""
        try:
            return float(json.loads((self.run_dir / REPORT).read_text())["calibration"]["threshold"])
        except (OSError, ValueError, LookupError, TypeError):
            return 0.0

    def handle_error(self, request, client_address):
        """Prints nothing when a browser closes the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        # DNS rebinding: another site could point its own name at this machine and read the files.
        if self.headers.get("Host") not in self.server.hosts():
            port = self.server.server_port
            tunnel = f"ssh -L {port}:localhost:{port}"
            message = f"Open this page at {self.server.url} only. A tunnel must keep the port: {tunnel}\n"
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, message.encode())
        try:
            content = self.server.find(self.path.partition("?")[0])
        except OSError:  # deleted since the page was loaded, or unreadable
            content = None
        if content:
            return self._answer(HTTPStatus.OK, *content)
        self._answer(HTTPStatus.NOT_FOUND, f"Not found. The page is at {self.server.url}\n".encode())

    do_HEAD = do_GET

    def _answer(self, status, body=b"", kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")  # a new export has the same file names
        # An isolated page gets a clock of 5 microseconds; others get 100.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def artifacts(run_dir):
    """Lists the .tflite files of a run: a dict of `name` and `bytes` for each, in the order of `TFLITE_FORMATS`."""
    files = {kind: Path(run_dir) / "export" / "tflite" / f"{kind}.tflite" for kind in TFLITE_FORMATS}
    return [{"name": kind, "bytes": file.stat().st_size} for kind, file in files.items() if file.is_file()]


def _file(path):
    return path.read_bytes(), TYPES[path.suffix[1:]]


def _policy(digest):
    """Returns a Content-Security-Policy that lets the page send requests to this server only."""
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
