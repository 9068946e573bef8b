"""Checks within seconds whether a host can be reached. tensorflow-datasets would retry for minutes."""

import queue
import re
import socket
import threading
import time
import urllib.parse

SECONDS = 5
# Status codes by which a proxy says that it refuses a request for http://, or can't reach the host. 403 is not among them: it
# may come from the host, and TFDS does not retry it.
_PROXY_ERRORS = (407, 502, 503, 504)


def require_reachable(urls):
    """Raises unless one of the hosts answers within `SECONDS`, with any status.

    One host is enough, because TFDS lists the files of all configs of a data set. Uses the proxies of the environment, as
    tensorflow-datasets does.

    Args:
        urls: URLs of the files; one per host is requested. If empty, nothing is checked.

    Raises:
        ConnectionError: names the hosts, and the proxies without passwords.
    """
    # One file per host. URLs with other schemes are files that TFDS copies.
    files = {address: url for url in sorted(urls) if (address := _address(url))[0] in ("http", "https", "ftp")}
    answers = queue.SimpleQueue()

    def ask(url):
        try:
            _ask(url)
            answers.put(None)
        except Exception as error:  # every type: an exception in a thread would be lost
            answers.put(error)

    deadline = time.monotonic() + SECONDS
    for url in files.values():
        # Daemon threads, as a DNS lookup has no timeout.
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    error = None
    for _ in files:
        try:
            error = answers.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            error = error or TimeoutError(f"no answer within {SECONDS} seconds")
            break
        if error is None:
            return
    if files:
        hosts = ", ".join(sorted({host for _, host, _ in files}))
        proxies = ", ".join(sorted({proxy for url in files.values() if (proxy := _proxy(url))}))
        through = f" through the proxy {proxies}" if proxies else ""
        raise ConnectionError(f"no connection to {hosts}{through} ({_cause(error)})") from error


def _address(url):
    """A URL's scheme, host and port; `None` stands for the default port."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _ask(url):
    """Sends a HEAD request for a file.

    Raises:
        OSError: if the host can't be reached, or the proxy refuses.
    """
    import requests

    scheme, host, port = _address(url)
    if scheme == "ftp":  # not supported by requests
        socket.create_connection((host, port or 21), timeout=SECONDS).close()
        return
    try:
        response = requests.head(url, timeout=SECONDS)
    except requests.exceptions.InvalidURL:
        # TFDS' URLs are valid, so the proxy's is not. The error is not chained, as it may quote the password.
        raise ConnectionError("the proxy's URL is not valid") from None
    if scheme == "http" and _proxy(url) and response.status_code in _PROXY_ERRORS:
        raise ConnectionError(f"{response.status_code} {response.reason}")


def _proxy(url):
    """The proxy for a URL as HOST:PORT, without its password, or `None`."""
    import requests

    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    return re.sub(r".*(://|@)|/$", "", proxy) if proxy else None


def _cause(error):
    """The message of the innermost error: requests and urllib3 wrap it three to four times."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return str(error).strip() or type(error).__name__
