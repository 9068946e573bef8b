import contextlib
import socket
import threading

import pytest
import tensorflow as tf
from tools import require_browser

from cvt_keras.export.web.samples import first_of_each_class
from cvt_keras.export.web.server import Server


@pytest.fixture(scope="module")  # not longer: while it is open, nothing else can start an event loop
def chromium():
    with require_browser().chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def samples(cifar10_dir):
    from cvt_keras.data import images, sources

    samples = first_of_each_class(sources.load("cifar10", str(cifar10_dir)))
    # At the size of the network, as the images of a folder are.
    return [{"label": name, "png": tf.io.encode_png(images.stretch(image, (24, 40))).numpy()} for name, image in samples]


class _Server(Server):
    """A server whose `stop` also closes its connections, as the end of its process would."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.connections = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def get_request(self):
        self.connections.append(super().get_request())
        return self.connections[-1]

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection, _ in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def serve():
    """A function that takes a run folder and `Server`'s other arguments, and starts a server in a thread."""
    servers = []

    def start(run_dir, port=0, **more):
        servers.append(_Server(run_dir, port, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(exported, samples, serve):
    return serve(exported, samples=lambda: (samples, ""))


@contextlib.contextmanager
def _open(chromium, server, status="is ready", script="", **options):
    """Opens a page in a context of its own, and waits until its status contains `status`.

    `page.errors` collects what the page writes to the console as errors, and `page.requests` the URLs that it asks for.

    Args:
        script: JavaScript that runs before the page's own.
        options: the context's.
    """
    from playwright.sync_api import expect

    with chromium.new_context(**options) as context:
        context.add_init_script(script)
        page = context.new_page()
        page.expected, page.errors, page.requests = [], [], []
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        context.on("request", lambda request: page.requests.append(request.url))
        page.on("websocket", lambda socket: page.requests.append(socket.url))
        page.goto(server.url)
        expect(page.get_by_role("status")).to_contain_text(status, timeout=60_000)
        yield page


def _check(page, url):
    """Fails if the page asked another host for anything, or had an error that contains none of `page.expected`."""
    assert page.requests
    elsewhere = [request for request in page.requests if not request.startswith((url, f"blob:{url}"))]
    assert not [text for text in (*page.errors, *elsewhere) if not any(part in text for part in page.expected)]


@pytest.fixture
def open_page(chromium):
    """A function that takes a server and the arguments of `_open`, and returns a page that no other test uses."""
    pages = []
    with contextlib.ExitStack() as stack:

        def open_(server, *arguments, **options):
            page = stack.enter_context(_open(chromium, server, *arguments, **options))
            pages.append((page, server.url))
            return page

        yield open_
    for page, url in pages:
        _check(page, url)


@pytest.fixture(scope="module")
def shared_page(chromium, server):
    with _open(chromium, server) as page:
        yield page


@pytest.fixture
def page(shared_page, server):
    """The run's page, which the module's tests share: without results, and with float32.tflite loaded.

    A test that changes the page's scripts, or needs another run, opens its own with `open_page`.
    """
    from playwright.sync_api import expect

    page = shared_page
    page.errors.clear()
    page.set_viewport_size({"width": 1280, "height": 720})
    if page.locator("#clear").is_visible():
        page.locator("#clear").click()
    expect(page.locator(".card")).to_have_count(0)
    if not page.get_by_role("radio", name="float32").is_checked():
        page.locator("label[for=float32]").click()
        expect(page.get_by_role("status")).to_have_text("float32 is ready.")
    yield page
    _check(page, server.url)
