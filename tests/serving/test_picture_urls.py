"""Pictures from the web: of public addresses, in bounds, and never from here."""

import asyncio
import socket
import threading

import pytest

from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.picture_urls import fetch_picture, is_public
from reroute_fx.serving.refusals import RequestError


class Listener:
    """Answers each connection on a port of this machine with the same bytes, and counts them."""

    def __init__(self, answer):
        self.answer, self.visits = answer, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.visits += 1
            with connection:
                connection.recv(4096)
                if self.answer is None:
                    threading.Event().wait(1)
                    continue
                connection.sendall(self.answer)


def answer(status, body=b"", headers=""):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@pytest.fixture
def listener(request):
    found = Listener(request.param)
    yield found
    found.socket.close()


def fetch(url, **options):
    bounds = Bounds(picture_bytes=1000, fetch_seconds=0.3)
    return asyncio.run(fetch_picture(url, "url", bounds, **options))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "fe80::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("listener", [answer("200 OK", b"picture")], indirect=True)
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0", "[::ffff:127.0.0.1]", "a@127.0.0.1"],
)
def test_what_listens_here_is_not_visited(listener, host):
    with pytest.raises(RequestError, match=r"not public|can't be fetched"):
        fetch(f"http://{host}:{listener.port}/")
    assert listener.visits == 0


@pytest.mark.parametrize("listener", [answer("200 OK", b"picture")], indirect=True)
def test_a_name_means_the_address_that_was_looked_at(listener, monkeypatch):
    """The second answer of its name server would lead here."""
    answers = [[(2, 1, 6, "", ("8.8.8.8", 80))], [(2, 1, 6, "", ("127.0.0.1", listener.port))]]
    looked = []

    async def look_up(self, *_, **__):
        looked.append(answers[len(looked)])
        return looked[-1]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    monkeypatch.setattr("httpcore.AnyIOBackend.connect_tcp", _unreachable)
    with pytest.raises(RequestError, match="can't be fetched"):
        fetch("http://example.org/")
    assert (len(looked), _connected, listener.visits) == (1, ["8.8.8.8"], 0)


_connected = []


async def _unreachable(self, host, *_, **__):
    _connected.append(host)
    raise OSError("unreachable")


@pytest.mark.parametrize("listener", [answer("200 OK", b"picture")], indirect=True)
def test_a_picture_is_fetched(listener):
    assert fetch(f"http://127.0.0.1:{listener.port}/a.png?b", is_allowed=lambda _: True) == b"picture"


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        (answer("302 Found", headers="Location: http://127.0.0.1/\r\n"), "status 302; expected 200 at once"),
        (answer("404 Not Found"), "status 404"),
        (answer("200 OK", bytes(1001)), "more than 1000 bytes"),
        (b"no http\r\n\r\n", "can't be fetched"),
        (None, "no picture in 0.3 s"),
    ],
    indirect=["listener"],
)
def test_what_is_no_picture_in_bounds_is_refused(listener, message):
    with pytest.raises(RequestError, match=message):
        fetch(f"http://127.0.0.1:{listener.port}/", is_allowed=lambda _: True)
    assert listener.visits == 1


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a", "file:///etc/passwd", "http://", "http:a", "https:///a", "gopher://a"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(RequestError, match="no URL of http or https"):
        fetch(url)
