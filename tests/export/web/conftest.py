import contextlib
import socket
import threading

import pytest
import tensorflow as tf
from tools import require_browser

from cvt_keras.export.web.samples import first_of_each_class
from cvt_keras.export.web.server import Server


@pytest.fixture(scope="module")  # no longer: while it is open, nothing else can start an event loop
def chromium():
    with require_browser().chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def samples(cifar10_dir):
    from cvt_keras.data import sources

    found = first_of_each_class(sources.load("cifar10", str(cifar10_dir)))
    return [{"label": name, "png": tf.io.encode_png(image).numpy()} for name, image in found]


class _Server(Server):
    """One that can be stopped as the end of its process would."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.connections = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

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
    """A function: a run folder and more arguments of `Server` -> a server at work in a thread; `stop` stops it."""
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


@pytest.fixture
def open_page(chromium):
    """A function: a server and options of the browser's context -> a page of it, once its status has `status` in it.

    A `script` runs in the page before its own.

    At the end it must have asked no other host for anything and have written no error to the console, but for those in which
    one of `page.expected` occurs.
    """
    from playwright.sync_api import expect

    opened = []

    def start(server, status="is ready", script="", **options):
        context = chromium.new_context(**options)
        context.add_init_script(script)
        page = context.new_page()
        page.expected = []
        errors, requests = [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        context.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url))
        opened.append((context, page, server.url, errors, requests))
        page.goto(server.url)
        expect(page.get_by_role("status")).to_contain_text(status, timeout=60_000)
        return page

    yield start
    for context, page, url, errors, requests in opened:
        context.close()
        assert requests
        elsewhere = [request for request in requests if not request.startswith((url, f"blob:{url}"))]
        assert not [text for text in (*errors, *elsewhere) if not any(part in text for part in page.expected)]


@pytest.fixture
def page(open_page, server):
    return open_page(server)
