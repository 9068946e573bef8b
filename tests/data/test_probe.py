import http.server
import threading
import time

import pytest
import urllib3

from cvt_keras.data import probe

CREATE_CONNECTION = urllib3.util.connection.create_connection  # before the network is cut off
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


@pytest.fixture
def server(monkeypatch):
    """A host and proxy that answers with the status `answer`, or not with HTTP if that is `None`.

    Records the requests in `asked`, and the proxy's credentials in `accounts`.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            server.asked.append(self.path)
            server.accounts.append(self.headers["Proxy-Authorization"])
            if server.answer is None:
                self.wfile.write(b"no proxy\r\n\r\n")
            else:
                self.send_response(server.answer)
                self.end_headers()

        do_HEAD = do_CONNECT = answer

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(urllib3.util.connection, "create_connection", CREATE_CONNECTION)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.accounts, server.answer = [], [], 200
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.as_proxy = f"http://user:p%40ss@127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it sees a shutdown
        yield server
        server.shutdown()


def refusal(*urls):
    """The message of the probe. Checks that it names no password."""
    with pytest.raises(ConnectionError) as error:
        probe.require_reachable(urls)
    for secret in ("word", "p@ss", "p%40ss"):
        assert secret not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("urls", [[], ["gs://bucket/mnist.gz", "mnist.gz"]])
def test_urls_without_a_host_need_no_connection(reached, urls):
    probe.require_reachable(urls)
    assert not reached


def test_each_host_is_tried_once_and_named(reached):
    assert refusal(CIFAR, CIFAR.replace("-10-", "-100-"), "http://a.invalid:8080/x") == (
        "no connection to a.invalid, www.cs.toronto.edu (no network)"
    )
    assert sorted(reached) == [("a.invalid", 8080), ("www.cs.toronto.edu", 443)]


@pytest.mark.parametrize("answer", [200, 302, 403, 404, 405, 503])
def test_any_status_counts_as_reachable(server, answer):
    server.answer = answer
    probe.require_reachable([f"{server.url}/mnist.gz"])
    assert server.asked == ["/mnist.gz"]


def test_one_of_several_hosts_is_enough(server):
    probe.require_reachable([f"{server.url}/mnist.gz", "http://127.0.0.1:9/other.gz"])


def test_a_host_without_http_is_not_reachable(server):
    server.answer = None
    assert "no proxy" in refusal(server.url)


def test_ftp_hosts_are_tried(reached):
    assert refusal("ftp://user:word@ftp.invalid/photos.zip") == "no connection to ftp.invalid (no network)"
    assert reached == [("ftp.invalid", 21)]


def test_a_host_that_hangs_times_out(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    monkeypatch.setattr(urllib3.util.connection, "create_connection", lambda *args, **kwargs: threading.Event().wait())
    started = time.monotonic()
    assert refusal(CIFAR) == "no connection to www.cs.toronto.edu (no answer within 0.2 seconds)"
    assert time.monotonic() - started < 5


def test_a_refusal_is_reported_rather_than_the_host_that_hangs(monkeypatch):
    def connect(address, *args, **kwargs):
        if address[0] == "a.invalid":
            raise OSError("no network")
        threading.Event().wait()

    monkeypatch.setattr(probe, "SECONDS", 1)
    monkeypatch.setattr(urllib3.util.connection, "create_connection", connect)
    assert refusal(CIFAR, "http://a.invalid/x").endswith("(no network)")


# === Proxies ===


@pytest.mark.parametrize(
    ("variables", "tried"),
    [
        ({"no_proxy": "localhost"}, ("www.cs.toronto.edu", 443)),  # names no proxy
        ({"http_proxy": "http://proxy.invalid"}, ("www.cs.toronto.edu", 443)),  # for http:// only
        ({"https_proxy": "http://proxy.invalid:3128"}, ("proxy.invalid", 3128)),
        ({"HTTPS_PROXY": "http://proxy.invalid:3128/"}, ("proxy.invalid", 3128)),
        ({"https_proxy": "proxy.invalid:3128"}, ("proxy.invalid", 3128)),
        ({"https_proxy": "http://user:word@proxy.invalid:3128"}, ("proxy.invalid", 3128)),
        ({"all_proxy": "https://user:word@proxy.invalid"}, ("proxy.invalid", 443)),
        ({"https_proxy": "http://proxy.invalid:3128", "no_proxy": "toronto.edu"}, ("www.cs.toronto.edu", 443)),
    ],
)
def test_the_proxy_is_tried_instead_of_the_host(monkeypatch, reached, variables, tried):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = refusal(CIFAR)
    assert reached == [tried]
    host, port = tried
    through = f" through the proxy {host}{'' if port == 443 else f':{port}'}" if host == "proxy.invalid" else ""
    assert text == f"no connection to www.cs.toronto.edu{through} (no network)"


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5h://user:word@proxy.invalid:1080",  # without PySocks
        "http://user:pass/word@proxy.invalid:1080",
        "http://user:word@:1080",
        "user:word@proxy.invalid:1080",
    ],
)
def test_an_unusable_proxy_is_named_without_its_password(monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    assert f"no connection to www.cs.toronto.edu through the proxy {proxy.rpartition('@')[2]} (" in refusal(CIFAR)


@pytest.mark.parametrize(("answer", "reason"), [(403, "403"), (407, "407"), (503, "503"), (None, "no proxy")])
def test_a_proxy_that_refuses_the_host_is_named(monkeypatch, server, answer, reason):
    monkeypatch.setenv("https_proxy", server.as_proxy)
    server.answer = answer
    text = refusal(CIFAR)
    assert text.startswith(f"no connection to www.cs.toronto.edu through the proxy 127.0.0.1:{server.server_port} (")
    assert reason in text
    assert server.asked == ["www.cs.toronto.edu:443"]
    assert server.accounts == ["Basic dXNlcjpwQHNz"]  # user:p@ss


@pytest.mark.parametrize("answer", [407, 502, 503, 504])
def test_the_status_of_a_proxy_does_not_count_as_the_hosts(monkeypatch, server, answer):
    monkeypatch.setenv("http_proxy", server.as_proxy)
    server.answer = answer
    text = refusal("http://a.invalid/mnist.gz")
    assert text.startswith(f"no connection to a.invalid through the proxy 127.0.0.1:{server.server_port} ({answer}")


@pytest.mark.parametrize("answer", [200, 404])
def test_a_host_is_reachable_through_a_proxy(monkeypatch, server, answer):
    monkeypatch.setenv("http_proxy", server.as_proxy)
    server.answer = answer
    probe.require_reachable(["http://a.invalid/mnist.gz"])
    assert server.asked == ["http://a.invalid/mnist.gz"]
    assert server.accounts == ["Basic dXNlcjpwQHNz"]
