"""Pictures from the web, where a server is told to fetch them: public addresses only."""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any

import httpcore

from .bounds import Bounds
from .refusals import RequestError

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PROVIDERS = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))
"""Where clouds answer their own machines, of what counts as global otherwise."""


def is_public(address: str) -> bool:
    """Whether an IP address is anyone's, and not of this machine, its networks or its provider.

    Addresses that carry another one (mapped, 6to4, Teredo, NAT64) are as public as that.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        carried = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            carried.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        inner = [str(other) for other in carried if other is not None]
        if inner:
            return all(map(is_public, inner))
    is_providers = any(ip in network for network in _PROVIDERS if network.version == ip.version)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not is_providers


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to the very address that was looked at: a name can't mean another one the second time."""

    def __init__(self, is_allowed: Callable[[str], bool]) -> None:
        self.is_allowed = is_allowed
        self.inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # An address of IPv6 may come with its zone.
        addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
        if not addresses or not all(map(self.is_allowed, addresses)):
            raise _NotPublic
        return await self.inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


class _NotPublic(Exception):
    pass


async def fetch_picture(
    url: str, field: str, bounds: Bounds, is_allowed: Callable[[str], bool] = is_public
) -> bytes:
    """The bytes of a picture at an http(s) URL. Redirects are not followed.

    Args:
        url: of the picture.
        field: for messages.
        bounds: of bytes and seconds.
        is_allowed: which IP addresses are connected to.

    Raises:
        RequestError: it is no such URL, its name means an address that is not allowed, or no picture came in time.
    """
    try:
        target = httpcore.URL(url)
        if target.scheme not in (b"http", b"https") or not target.host:
            raise ValueError
    except (ValueError, TypeError, UnicodeError):
        raise RequestError(field, "is no URL of http or https; expected one with a host.") from None
    try:
        async with asyncio.timeout(bounds.fetch_seconds):
            return await _get(target, field, bounds, is_allowed)
    except TimeoutError:
        raise RequestError(field, f"gave no picture in {bounds.fetch_seconds:g} s.") from None
    except _NotPublic:
        raise RequestError(field, "is at an address that is not public; expected a public one.") from None
    except (OSError, UnicodeError, ssl.SSLError, httpcore.NetworkError, httpcore.ProtocolError):
        # One answer for all of them, which tells nothing of the network here.
        raise RequestError(field, "can't be fetched; expected a picture there.") from None


async def _get(target: httpcore.URL, field: str, bounds: Bounds, is_allowed: Callable[[str], bool]) -> bytes:
    pool = httpcore.AsyncConnectionPool(network_backend=_Guarded(is_allowed), max_connections=1)
    headers = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "reroute-fx")]
    async with pool, pool.stream("GET", target, headers=headers) as response:
        if response.status != 200:
            raise RequestError(field, f"answered with status {response.status}; expected 200 at once.")
        data = b""
        async for chunk in response.aiter_stream():
            data += chunk
            if len(data) > bounds.picture_bytes:
                raise RequestError(field, f"has more than {bounds.picture_bytes} bytes; expected fewer.")
        return data
