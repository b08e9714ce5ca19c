"""What the HTTP driver may reach: URLs taken apart strictly, rules for hosts, and a check of every address.

A URL comes from a stranger, and so does every redirect. Its text decides little, because a name may stand for any
address and for another one a moment later. So a name is resolved once, each address of the answer is judged, and a
socket is connected to exactly the address that was judged, with no second look-up in between.

Only globally routable unicast passes. What carries an IPv4 address in an IPv6 one (mapped, 6to4, NAT64, Teredo,
ISATAP) passes only if both do. The lists follow the IANA registries of special-purpose addresses (RFC 6890 and its
updates), and are written out because `ipaddress` judges some of them otherwise, and differently in each release.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import quote

from imagestore.errors import InvalidLocation

__all__ = ["Address", "Guard", "Rule", "Target", "is_public", "parse_rule", "parse_target"]

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_DENIED_4: Final = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers; a cloud's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's agent and metadata, on a public address
        "169.254.0.0/16",  # link-local; metadata of nearly every cloud
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; a cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4, withdrawn
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
# Everything else that is no unicast, such as loopback, link-local, site-local, unique local and IPv4-compatible
# addresses, lies outside; so does the NAT64 prefix for local use (RFC 8215), whose translator may go anywhere.
_GLOBAL_6: Final = ipaddress.IPv6Network("2000::/3")
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_DENIED_6: Final = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)
_ISATAP: Final = frozenset({0x00005EFE, 0x02005EFE})

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.DOTALL)
_AUTHORITY_6: Final = re.compile(r"\[([0-9A-Fa-f:.]{2,45})\](?::([0-9]{0,5}))?")
_AUTHORITY: Final = re.compile(r"([A-Za-z0-9._-]{1,254})(?::([0-9]{0,5}))?")
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
# A last label of this kind makes the whole name an IPv4 address to many programs, in one of a dozen spellings.
_NUMERIC: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL: Final = re.compile(r"%(?:[01][0-9A-Fa-f]|7[Ff])")
_ENCODED: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# What may stand in a path as it is (RFC 3986, 3.3); a query may have "?" besides (3.4).
_PATH: Final = "/%:@!$&'()*+,;=~"


def is_public(address: Address) -> bool:
    """Whether ``address`` is globally routable unicast, and any address that it carries inside too."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_4)
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(_last(address))
    if address not in _GLOBAL_6 or (address not in _TEREDO and any(address in network for network in _DENIED_6)):
        return False
    return all(is_public(inner) for inner in _carried(address))


def _carried(address: ipaddress.IPv6Address) -> Iterable[ipaddress.IPv4Address]:
    """The IPv4 addresses that packets to ``address`` may be sent on to."""
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        yield _last(address)


def _last(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A URL taken apart: what to connect to, and what to ask for there.

    Attributes:
        scheme: ``http`` or ``https``.
        host: a name in lower case or an address in its canonical form, without brackets.
        port: the scheme's own where the URL names none.
        path: path and query as they are sent.
        address: the host, if it is an address.
    """

    scheme: str
    host: str
    port: int
    path: str
    address: Address | None

    @property
    def origin(self) -> str:
        """``scheme://host[:port]``, without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def uri(self) -> str:
        return self.origin + self.path

    def join(self, reference: str) -> Target:
        """Where a redirect leads (RFC 3986, 5.2; RFC 9110, 10.2.2). Raises `InvalidLocation`."""
        if reference.startswith("//"):
            reference = f"{self.scheme}:{reference}"
        elif reference.startswith("/"):
            reference = self.origin + reference
        elif not _SCHEME.match(reference):
            path = self.path.partition("?")[0]
            if not reference or reference.startswith("#"):
                reference = self.uri
            elif reference.startswith("?"):
                reference = f"{self.origin}{path}{reference}"
            else:
                reference = f"{self.origin}{path[: path.rindex('/') + 1]}{reference}"
        return parse_target(reference)


def parse_target(uri: str) -> Target:
    """Take a URL apart and bring it into its canonical form; credentials and fragment are dropped.

    Texts that RFC 3986 (6.2.2) calls equivalent become equal. A query is left as it is, but for characters that no
    URL can have, because it may be signed.

    Raises:
        InvalidLocation: not http or https, or a host that two programs could understand differently.
    """
    match = _URL.fullmatch(uri)
    if match is None or match[1].lower() not in DEFAULT_PORTS:
        raise InvalidLocation("not an http:// or https:// location")
    scheme = match[1].lower()
    host, port, address = _authority(match[2].rpartition("@")[2])
    path = _dotless(_ENCODED.sub(_decoded, _quoted(match[3], _PATH)) or "/")
    query = "" if match[4] is None else "?" + _ENCODED.sub(_upper, _quoted(match[4], _PATH + "?"))
    return Target(scheme=scheme, host=host, port=port or DEFAULT_PORTS[scheme], path=path + query, address=address)


def _authority(text: str) -> tuple[str, int | None, Address | None]:
    match = _AUTHORITY_6.fullmatch(text) or _AUTHORITY.fullmatch(text)
    if match is None:
        raise InvalidLocation(
            "the host is neither an address nor a name of ASCII letters, digits, dots and dashes (others are written "
            "in their ASCII form, xn--…)"
        )
    port = int(match[2]) if match[2] else None
    if port is not None and not 0 < port < 65536:
        raise InvalidLocation("there is no such port")
    if text.startswith("["):
        try:
            address = ipaddress.IPv6Address(match[1])
        except ValueError:
            raise InvalidLocation("the host is not an IPv6 address") from None
        plain = address.ipv4_mapped or address
        return str(plain), port, plain
    host = match[1].lower().removesuffix(".")
    labels = host.split(".")
    if _NUMERIC.fullmatch(labels[-1]):
        try:
            return host, port, ipaddress.IPv4Address(host)
        except ValueError:
            raise InvalidLocation("an IPv4 address is written as four decimal numbers with dots") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidLocation("the host is not a name that can be looked up")
    return host, port, None


def _quoted(text: str, safe: str) -> str:
    if _BAD_PERCENT.search(text):
        raise InvalidLocation("a percent sign in a location is followed by two hexadecimal digits (write %25)")
    try:
        quoted = quote(text, safe=safe)
    except UnicodeEncodeError:
        raise InvalidLocation("the location has characters that can't be encoded") from None
    if _CONTROL.search(quoted):
        raise InvalidLocation("the location has control characters")
    return quoted


def _upper(match: re.Match[str]) -> str:
    return match[0].upper()


def _decoded(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in _UNRESERVED else match[0].upper()


def _dotless(path: str) -> str:
    """``path`` without ``.`` and ``..`` segments (RFC 3986, 5.2.4)."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for number, segment in enumerate(segments, 1):
        if segment not in (".", ".."):
            kept.append(segment)
            continue
        if segment == "..":
            del kept[-1:]
        if number == len(segments):
            kept.append("")
    return "/" + "/".join(kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """An entry of the options ``hosts`` and ``allow``: a name, all names below it, or a network; and its ports."""

    name: str = ""
    below: bool = False
    network: Network | None = None
    ports: frozenset[int] | None = frozenset(DEFAULT_PORTS.values())

    def admits(self, host: str, port: int, address: Address | None) -> bool:
        """Whether it names that host (or, if known, its address) and port."""
        if self.ports is not None and port not in self.ports:
            return False
        if self.network is not None:
            return address is not None and address in self.network
        return host.endswith("." + self.name) if self.below else host == self.name


def parse_rule(text: str) -> Rule:
    """Read ``host``, ``*.domain``, ``address`` or ``network/length``, each with ``:port`` or ``:*`` after it.

    Without a port it means 80 and 443. IPv6 stands in brackets where a port follows. Raises ValueError.
    """
    text = text.strip().lower()
    host, colon, port = text, "", ""
    if text.startswith("["):
        host, bracket, tail = text[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise ValueError("has a bracket too few")
        colon, port = tail[:1], tail[1:]
    elif text.count(":") == 1:
        host, colon, port = text.partition(":")
    ports: frozenset[int] | None = frozenset(DEFAULT_PORTS.values())
    if colon:
        if port != "*" and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
            raise ValueError("has no port from 1 to 65535, or *, after its colon")
        ports = None if port == "*" else frozenset({int(port)})
    if ":" in host or _NUMERIC.fullmatch(host.partition("/")[0].rpartition(".")[2]):
        try:
            return Rule(network=ipaddress.ip_network(host), ports=ports)
        except ValueError:
            raise ValueError("is not an address, nor a network without host bits such as 10.1.0.0/16") from None
    name = host.removeprefix("*.").removesuffix(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError("is not a host name, *.domain, address or network")
    return Rule(name=name, below=host.startswith("*."), ports=ports)


class Guard:
    """Decides what may be reached.

    Args:
        hosts: what locations and redirects may name; empty for any host.
        allow: hosts and networks whose addresses need not be public.
        proxied: schemes that go through a proxy. It resolves names where nobody can judge the answer, so that only
            what ``allow`` names may be asked of it.
    """

    def __init__(self, hosts: Sequence[Rule], allow: Sequence[Rule], proxied: Iterable[str]) -> None:
        self._hosts = tuple(hosts)
        self._allow = tuple(allow)
        self._proxied = frozenset(proxied)

    def check(self, target: Target) -> None:
        """Judge what the text alone tells. Raises `InvalidLocation`."""
        host, port, address = target.host, target.port, target.address
        if self._hosts and not any(rule.admits(host, port, address) for rule in self._hosts):
            raise InvalidLocation(f"{host} port {port} is none of the hosts that this store serves (option hosts)")
        if target.scheme in self._proxied:
            if not self._exempt(host, port, address):
                raise InvalidLocation(
                    f"{host} port {port} is not named by the option allow, which is needed where a proxy resolves names"
                )
        elif address is not None:
            self._require(host, port, [address])

    def connect(
        self, host: str, port: int, timeout: float | None, options: Iterable[tuple[int, int, int | bytes]] | None
    ) -> socket.socket:
        """Resolve ``host`` once and connect to an address that passes, within ``timeout`` seconds for all of them.

        Raises `InvalidLocation` if none passes, OSError otherwise.
        """
        found = [
            (family, kind, protocol, place)
            for family, kind, protocol, _, place in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        ]
        public = self._require(host, port, [ipaddress.ip_address(str(place[0])) for *_, place in found])
        found = [each for each, passes in zip(found, public, strict=True) if passes]
        end = None if timeout is None else time.monotonic() + timeout
        failure: OSError | None = None
        for number, (family, kind, protocol, place) in enumerate(found):
            made = socket.socket(family, kind, protocol)
            try:
                for option in options or ():
                    made.setsockopt(*option)
                # An address that never answers leaves some time for the others.
                share = None if end is None else max(0.05, (end - time.monotonic()) / (len(found) - number))
                made.settimeout(share)
                made.connect(place)
                made.settimeout(timeout)
            except OSError as error:
                made.close()
                failure = error
            else:
                return made
        raise failure or OSError("the name has no address")

    def _require(self, host: str, port: int, addresses: Sequence[Address]) -> list[bool]:
        """For each address whether it passes. Raises `InvalidLocation` if none does, without naming them."""
        passes = [is_public(address) or self._exempt(host, port, address) for address in addresses]
        if addresses and not any(passes):
            raise InvalidLocation(
                f"{host} has no public address; if it is to be reached all the same, the option allow must name it "
                f"with its port {port}"
            )
        return passes

    def _exempt(self, host: str, port: int, address: Address | None) -> bool:
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(rule.admits(host, port, address) for rule in self._allow)
