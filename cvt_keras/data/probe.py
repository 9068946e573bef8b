"""Whether a host can be downloaded from, found out within seconds: tensorflow-datasets would try again for minutes."""

import queue
import re
import socket
import threading
import time
import urllib.parse

SECONDS = 5
# A proxy's own answers to a request for http://, when it lets nobody through or can't reach the host. 403 is not among them: it
# may be the host's, and TFDS gives up on it at once.
_REFUSALS = (407, 502, 503, 504)


def require_reachable(urls):
    """Raises unless one of the hosts answers within `SECONDS`, whatever it answers.

    One is enough: TFDS lists the files of all configs of a data set. Proxies are those of the environment, which
    tensorflow-datasets also uses.

    Args:
        urls: of the files; one is asked for from each host. Without any, nothing is checked.

    Raises:
        ConnectionError: naming the hosts, and their proxies without passwords.
    """
    # One file of each host. What has another scheme TFDS copies from a file system.
    files = {address: url for url in sorted(urls) if (address := _address(url))[0] in ("http", "https", "ftp")}
    answers = queue.SimpleQueue()

    def ask(url):
        try:
            _ask(url)
            answers.put(None)
        except Exception as error:  # of any kind: what a thread raises nobody hears of
            answers.put(error)

    deadline = time.monotonic() + SECONDS
    for url in files.values():
        # Threads that nobody waits for: looking up the address of a host has no timeout.
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
    """A file's URL -> scheme, host and port, which is `None` if it is the usual one."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _ask(url):
    """Asks for the head of a file.

    Raises:
        OSError: if the host can't be reached, or the proxy lets nobody through to it.
    """
    import requests

    scheme, host, port = _address(url)
    if scheme == "ftp":  # requests does not speak it
        socket.create_connection((host, port or 21), timeout=SECONDS).close()
        return
    try:
        response = requests.head(url, timeout=SECONDS)
    except requests.exceptions.InvalidURL:
        # TFDS' URLs are valid, so it is the proxy's. The error is dropped, as it may quote the password.
        raise ConnectionError("the proxy's URL is not valid") from None
    if scheme == "http" and _proxy(url) and response.status_code in _REFUSALS:
        raise ConnectionError(f"{response.status_code} {response.reason}")


def _proxy(url):
    """The proxy between here and a file, as HOST:PORT, or `None`."""
    import requests

    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    return re.sub(r".*(://|@)|/$", "", proxy) if proxy else None


def _cause(error):
    """What the innermost error says: requests and urllib3 wrap it three to four times."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return str(error).strip() or type(error).__name__
