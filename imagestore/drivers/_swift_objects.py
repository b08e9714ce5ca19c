"""What is in a container: objects, large objects with their segments, and the marks of what is unfinished.

See the module ``swift`` for what marks and claims are. Protocol: https://docs.openstack.org/api-ref/object-store/ and
https://docs.openstack.org/swift/latest/overview_large_objects.html.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote, unquote

from imagestore.driver import IMAGE_ID, Leftover, Stat, http_date, retry_after
from imagestore.drivers._swift_account import Client
from imagestore.errors import (
    Changed,
    ConfigurationError,
    DigestMismatch,
    IntegrityError,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

__all__ = [
    "META",
    "NESTED",
    "Container",
    "Facts",
    "describe",
    "encode_metadata",
    "error_of",
    "etag_of",
    "is_static",
    "json_object",
    "moment_of",
    "no_container",
    "pages",
    "token_of",
]

_MIB: Final = 1024 * 1024
_PAGE: Final = 1000
_BULK: Final = 500
_DAY: Final = 86400
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
NESTED: Final = "manifest-"
META: Final = "X-Object-Meta-Imagestore-"
_META_VALUE: Final = 240
_META_TOTAL: Final = 3000

_FAILURES: Final[Mapping[int, type[StoreError]]] = {
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    405: Unsupported,
    408: StoreTimeout,
    409: Unavailable,
    412: Changed,
    413: StoreFull,
    416: Changed,
    422: DigestMismatch,
    429: RateLimited,
    498: RateLimited,
    499: Unavailable,
    501: Unsupported,
    504: StoreTimeout,
    507: StoreFull,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a server can do, as it says itself; the defaults hold for one that says nothing."""

    segments: int = 1000
    segment_min: int = _MIB
    object_max: int = 5 * 1024**3 + 2  # Swift's own default
    bulk_delete: bool = False
    digests: tuple[str, ...] = ("sha1",)  # those who know others name them
    conditional: bool = False
    """It knows ``If-None-Match: *``; so far only OpenStack's own does, which also nests manifests and copies ranges."""


class Container:
    """One container: its objects, and the marks in it.

    Attributes:
        base: the storage URL of another account than the client's; None for that.
        make: headers to create the container with where it is missing; None: it is not created.
        empty: it was listed as one without objects.
    """

    def __init__(
        self, client: Client, facts: Facts, name: str, prefix: str, base: str | None, *, own: bool = True
    ) -> None:
        self.client = client
        self.facts = facts
        self.name = name
        self.base = base
        self.make: dict[str, str] | None = None
        self.empty = False
        self._prefix = prefix
        self._own = own

    def url(self) -> str:
        return self.base or self.client.storage_url()

    def path(self, name: str | None = None) -> str:
        if name is None:
            return f"/{quote(self.name)}"
        if any(part in (".", "..") for part in name.split("/")):
            raise InvalidLocation("the name of an object has a component '.' or '..'")
        return f"/{quote(self.name)}/{quote(name)}"

    # Objects

    def head(self, name: str) -> Mapping[str, str] | None:
        missing = (404,) if self._own else (403, 404)  # who may not see others' objects is not told whether they are
        answer = self.client("HEAD", self.path(name), base=self.base, ok=missing)
        return None if answer.status in missing else answer.headers

    def get(self, name: str, headers: Mapping[str, str]) -> Any:
        try:
            return self.client("GET", self.path(name), headers, base=self.base, stream=True)
        except Exception as error:
            status = getattr(error, "http_status", None)
            if status == 404 or (status == 403 and not self._own):
                raise NotFound("there is no such image") from error
            if status == 409:
                # For a moment it is so when it is being deleted.
                raise IntegrityError("segments of the image are missing or were changed", temporary=True) from error
            raise

    def size(self, headers: Mapping[str, str]) -> int:
        """The length that an answer tells; Swift tells none of a dynamic large object with many segments."""
        if "Content-Length" in headers:
            return int(headers["Content-Length"])
        container, _, prefix = unquote(headers.get("X-Object-Manifest", "")).partition("/")
        if not prefix:
            raise StoreError("the server does not tell the length of the image")
        entries = pages(self.client, f"/{quote(container)}", prefix=prefix, base=self.base)
        return sum(int(entry.get("bytes", 0)) for entry in entries)

    def put(
        self, name: str, data: bytes, headers: Mapping[str, str], query: str = "", *, ok: tuple[int, ...] = ()
    ) -> Any:
        """Store an object. A missing container is made, or named in the error."""
        path = self.path(name) + query
        answer = self.client("PUT", path, headers, data, base=self.base, ok=(404, *ok))
        if answer.status == 404 and not query:
            if self.make is None:
                raise no_container(self.name)
            self.client("PUT", self.path(), self.make, base=self.base)
            # Another adder of the same id may just have removed it, which a later attempt will not meet again.
            answer = self.client("PUT", path, headers, data, base=self.base, ok=(404, *ok))
            if answer.status == 404:
                raise Unavailable(f"the container {self.name} was removed by somebody else")
        return answer

    def remove(self, name: str, query: str = "") -> bool:
        """False if it was not there."""
        return self.client("DELETE", self.path(name) + query, base=self.base, ok=(404,)).status != 404

    def entries(self, prefix: str = "", delimiter: str = "") -> Iterator[dict[str, Any]]:
        """A listing; nothing of a container that is not there."""
        return pages(self.client, self.path(), prefix=prefix, delimiter=delimiter, base=self.base)

    def remove_all(self, names: Sequence[str], container: str | None = None) -> None:
        """Delete many objects of this or another container; what is not there is deleted already."""
        where = container or self.name
        if not self.facts.bulk_delete:
            for name in names:
                Container(self.client, self.facts, where, self._prefix, self.base).remove(name)
            return
        headers = {"Content-Type": "text/plain", "Accept": "application/json"}
        for start in range(0, len(names), _BULK):
            part = names[start : start + _BULK]
            body = "".join(f"{quote(f'/{where}/{name}')}\n" for name in part).encode()
            # The status says nothing: it is sent before the work begins.
            _judge(self.client("POST", "?bulk-delete", headers, body, base=self.base).body)

    def remove_manifest(self, name: str) -> None:
        """Let the server delete a manifest with all that it lists: the segments first, the name last."""
        path = f"{self.path(name)}?multipart-manifest=delete"
        answer = self.client("DELETE", path, {"Accept": "application/json"}, base=self.base, ok=(404,))
        if answer.status != 404:
            _judge(answer.body)

    def copy_manifest(self, name: str, to: str, token: str) -> bool:
        """Store a manifest under a second name. False where the server does not show it."""
        query = "?multipart-manifest=get&format=raw"
        answer = self.client("GET", self.path(name) + query, base=self.base)
        if not answer.body.startswith(b"["):
            return False
        headers = {f"{META}Token": token, f"{META}Id": name, f"{META}Kind": "foreign"}
        copied = self.client(
            "PUT", f"{self.path(to)}?multipart-manifest=put", headers, answer.body, base=self.base, ok=(400, 413)
        )
        return bool(copied.status < 300)

    def listed_in(self, name: str, token: str) -> set[str]:
        """The segments of an upload that a manifest lists; none where the server does not show it."""
        query = "?multipart-manifest=get&format=raw"
        answer = self.client("GET", self.path(name) + query, base=self.base, ok=(404,))
        found: set[str] = set()
        with contextlib.suppress(ValueError):
            told = json.loads(answer.body) if answer.status == 200 else []
            paths = [str(entry.get("path", "")) for entry in told]
            found.update(path.removeprefix(f"/{self.name}/") for path in paths)
        found = {each for each in found if each.startswith(self.segment(token, ""))}
        for each in [each for each in found if each.startswith(self.segment(token, NESTED))]:
            found |= self.listed_in(each, token)
        return found

    def remove_dynamic(self, target: str, image_id: str) -> None:
        """Delete the segments of a dynamic large object, as far as they can be nobody else's.

        That is what Glance puts beside an image, ``<id>-00001``, and what swift's own command puts below the image's
        name into this container or ``<container>_segments``.
        """
        container, _, prefix = target.partition("/")
        if prefix == f"{image_id}-" and container == self.name:
            pattern = re.compile(re.escape(prefix) + "[0-9]{5,}")
        elif prefix.startswith(f"{image_id}/") and container in (self.name, f"{self.name}_segments"):
            pattern = re.compile(re.escape(prefix) + ".*")
        else:
            return
        entries = pages(self.client, f"/{quote(container)}", prefix=prefix, base=self.base)
        names = [name for entry in entries if pattern.fullmatch(name := entry.get("name", ""))]
        self.remove_all(names, container)

    def remove_container(self) -> None:
        """If nothing is in it."""
        with contextlib.suppress(Exception):
            self.client("DELETE", self.path(), base=self.base, ok=(404, 409))

    # Marks

    def mark_name(self, token: str) -> str:
        return f"{self._prefix}/marks/{token}"

    def segment(self, token: str, name: str) -> str:
        return f"{self._prefix}/{token}/{name}"

    def mark(self, token: str, image_id: str, kind: str, body: str = "") -> None:
        headers = {f"{META}Token": token, f"{META}Id": image_id, f"{META}Kind": kind}
        self.put(self.mark_name(token), body.encode(), headers)

    def unmark(self, token: str) -> None:
        # The claim goes first: one that stays alone is that of a discarded upload.
        self.remove(f"{self.mark_name(token)}.claim")
        self.remove(self.mark_name(token))

    def marks(self) -> Iterator[tuple[str, bool]]:
        """The tokens of all marks, and whether nothing but the claim is left of one."""
        prefix = self.mark_name("")
        last = ""
        for entry in self.entries(prefix=prefix):
            name = entry.get("name", "").removeprefix(prefix)
            token = name.removesuffix(".claim")
            if _TOKEN.fullmatch(token) and token != last:
                last = token
                yield token, name != token

    def segments(self, token: str) -> list[dict[str, Any]]:
        return list(self.entries(prefix=self.segment(token, "")))

    def claim(self, token: str, who: str) -> None:
        """Say that an upload shall be decided by ``who`` (commit or discard), unless somebody has said so before."""
        name = f"{self.mark_name(token)}.claim"
        headers = {f"{META}Token": token, f"{META}Claim": who}
        if who == "discard":
            headers["X-Delete-After"] = str(_DAY)
        if self.facts.conditional:
            self.put(name, b"", {**headers, "If-None-Match": "*"}, ok=(412,))
        elif self.head(name) is None:
            self.put(name, b"", headers)

    def claimed(self, token: str) -> str:
        """Who has it. To be asked one request after `claim`: of two claims in one moment the later one stays."""
        headers = self.head(f"{self.mark_name(token)}.claim")
        if headers is None:
            raise Unavailable("the claim of the upload came and went")
        return headers.get(f"{META}Claim", "")

    def stands(self, token: str, image_id: str) -> bool:
        """Whether an upload's image is there."""
        headers = self.head(image_id)
        return headers is not None and token_of(headers, image_id) == token

    def leftover(self, token: str, base: str, *, claimed: bool) -> Leftover | None:
        """What a mark of ours tells; None if it is no mark of ours, or nothing is left but its claim."""
        headers = self.head(f"{self.mark_name(token)}{'.claim' if claimed else ''}")
        if headers is None or headers.get(f"{META}Token") != token:
            return None
        held = self.segments(token)
        if claimed and not held:
            return None
        image_id = headers.get(f"{META}Id", "")
        started = http_date(headers.get("Last-Modified"))
        moments = [moment for entry in held if (moment := moment_of(entry))]
        return Leftover(
            token=token,
            image_id=image_id if IMAGE_ID.fullmatch(image_id) else None,
            bytes=sum(int(entry.get("bytes", 0)) for entry in held),
            started=started,
            last_activity=max([*moments, *([started] if started else [])], default=None),
            key=(base, self.name),
        )

    def discard(self, token: str) -> None:
        headers = self.head(self.mark_name(token))
        if headers is None:
            if self.head(f"{self.mark_name(token)}.claim") is not None:
                self.remove_segments(token)
            return
        image_id, kind = headers.get(f"{META}Id", ""), headers.get(f"{META}Kind")
        if headers.get(f"{META}Token") != token or not IMAGE_ID.fullmatch(image_id):
            return
        if kind == "foreign":
            self._discard_foreign(token, image_id)
        elif kind == "dynamic":
            target = self.client("GET", self.path(self.mark_name(token)), base=self.base).body.decode()
            there = self.head(image_id)
            if there is None or unquote(there.get("X-Object-Manifest", "")) != target:
                self.remove_dynamic(target, image_id)
            self.unmark(token)
        elif self.stands(token, image_id):
            self.unmark(token)
        else:
            self._discard_upload(token, image_id)

    def _discard_upload(self, token: str, image_id: str) -> None:
        self.claim(token, "discard")
        stands = self.stands(token, image_id)
        if self.claimed(token) == "discard":
            if stands:
                self.remove(image_id)
            self.remove_segments(token)
            # Not the claim: a commit that is late must find it.
            self.remove(self.mark_name(token))
        elif self.stands(token, image_id):
            self.unmark(token)
        else:
            # Committed, and deleted since.
            self.remove_upload(token)

    def _discard_foreign(self, token: str, image_id: str) -> None:
        """A manifest of somebody else's image whose delete was cut: the image may still stand on these segments."""
        mark = self.mark_name(token)
        ours, theirs = self.head(mark), self.head(image_id)
        if ours is not None and theirs is not None and etag_of(ours) == etag_of(theirs):
            self.remove(mark)
        else:
            self.remove_manifest(mark)

    def remove_segments(self, token: str, more: Iterable[str] = ()) -> None:
        names = {entry.get("name", "") for entry in self.segments(token)} | set(more)
        if names:
            self.remove_all(sorted(names))

    def remove_upload(self, token: str, more: Iterable[str] = ()) -> None:
        """Segments, claim and mark, in this order: until nothing is left, the mark is."""
        self.remove_segments(token, more)
        self.unmark(token)

    def made_for(self) -> str | None:
        headers = self.client("HEAD", self.path(), base=self.base, ok=(404,)).headers
        token = headers.get("X-Container-Meta-Imagestore-Token", "")
        return token if _TOKEN.fullmatch(token) else None


def pages(
    client: Client, path: str, *, prefix: str = "", delimiter: str = "", base: str | None = None
) -> Iterator[dict[str, Any]]:
    """The entries of a container, or with an empty path the containers of an account."""
    marker = ""
    while True:
        query = f"?format=json&limit={_PAGE}&prefix={quote(prefix, safe='')}&marker={quote(marker, safe='')}"
        if delimiter:
            query += f"&delimiter={quote(delimiter, safe='')}"
        answer = client("GET", path + query, base=base, ok=(404,))
        if answer.status in (204, 404):
            return
        try:
            page = json.loads(answer.body)
        except ValueError as error:
            raise Unavailable("the server sent a listing that can't be read") from error
        yield from page
        if len(page) < _PAGE:
            return
        marker = page[-1].get("name") or page[-1].get("subdir")


def _judge(body: bytes) -> None:
    """What a delete of many objects says at its end, where its status was long sent.

    What was not there counts as deleted. (https://docs.openstack.org/swift/latest/middleware.html#bulk-delete)
    """
    text = body.decode("utf-8", "replace").strip()
    told = json_object(text) or dict(line.partition(": ")[::2] for line in text.splitlines())
    errors = told.get("Errors") or []
    bad = [str(why) for _, why in errors if not str(why).startswith("404")] if isinstance(errors, list) else []
    if bad:
        raise _kind(_number(bad[0]))(f"{len(bad)} objects could not be deleted: {bad[0]}")
    status = str(told.get("Response Status", ""))
    number = _number(status)
    # Ceph says "400 Bad Request" where all that failed was not there.
    missing = number == 404 or (number == 400 and bool(errors or _number(told.get("Number Not Found"))))
    if not 200 <= number < 300 and not missing:
        why = f"{status} {told.get('Response Body', '')}".strip()[:200]
        raise _kind(number)(f"objects could not be deleted: {why or 'the server does not say how it ended'}")


def _number(text: object) -> int:
    """The number that a text begins with, such as a status; 0 if there is none."""
    found = re.match("[0-9]+", str(text))
    return int(found[0]) if found else 0


def _kind(status: int) -> type[StoreError]:
    """What a status means; none at all is a failure of the server."""
    usual = Unavailable if status >= 500 or not status else InvalidRequest if status == 400 else StoreError
    return _FAILURES.get(status, usual)


def error_of(error: Any) -> StoreError:
    """The meaning of an answer that is no success."""
    status: int = error.http_status or 0
    headers = error.http_response_headers or {}
    text = re.sub(r"(?:<[^>]*>|\s)+", " ", error.http_response_content or "").strip()[:200]
    transaction = headers.get("X-Trans-Id")
    message = (
        f"Swift answered {status}{f': {text}' if text else ''}{f' (transaction {transaction})' if transaction else ''}"
    )
    wait = retry_after(headers.get("Retry-After"), headers.get("Date"))
    if status in (413, 503) and wait is not None:
        return RateLimited(message, retry_after=wait)
    if 300 <= status < 400:
        return ConfigurationError(f"{message}: redirects are not followed, see the option endpoint")
    kind = _kind(status)
    if kind is DigestMismatch:
        return DigestMismatch(f"what arrived is not what was sent: {message}", temporary=True)
    return kind(message, retry_after=wait)


def no_container(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"the container {name} does not exist: create it (openstack container create {name}), or set the option "
        "create_container"
    )


def describe(headers: Mapping[str, str], name: str, size: int) -> Stat:
    return Stat(
        size=size,
        version=etag_of(headers) or None,
        token=token_of(headers, name),
        modified=http_date(headers.get("Last-Modified")),
        metadata=_decode_metadata(headers),
    )


def etag_of(headers: Mapping[str, str]) -> str:
    # That of a large object stands in quotes.
    return headers.get("Etag", "").strip('"')


def is_static(headers: Mapping[str, str]) -> bool:
    return headers.get("X-Static-Large-Object", "").lower() == "true"


def token_of(headers: Mapping[str, str], name: str) -> str | None:
    """The token of the upload that made an object; a copy made by others has it too, but another name."""
    token = headers.get(f"{META}Token", "")
    return token if headers.get(f"{META}Id") == name and _TOKEN.fullmatch(token) else None


def encode_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """As JSON, in as many headers as it needs: Swift gives names no case, and values 256 bytes each."""
    if not metadata:
        return {}
    text = quote(json.dumps(dict(metadata), separators=(",", ":")), safe="{}:,[] ")
    if len(text) > _META_TOTAL:
        raise InvalidRequest(f"metadata takes {len(text)} bytes in Swift's headers, of which there are {_META_TOTAL}")
    parts = [text[start : start + _META_VALUE] for start in range(0, len(text), _META_VALUE)]
    return {f"{META}Data-{number}": f"|{part}|" for number, part in enumerate(parts)}


def _decode_metadata(headers: Mapping[str, str]) -> Mapping[str, str]:
    parts: list[str] = []
    while (part := headers.get(f"{META}Data-{len(parts)}")) is not None:
        parts.append(part[1:-1])
    found = json_object(unquote("".join(parts)))
    return {name: text for name, text in found.items() if isinstance(text, str)}


def json_object(text: str | bytes) -> dict[str, Any]:
    """What a text of JSON says; nothing if it is none, or no object."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def moment_of(entry: Mapping[str, Any]) -> datetime | None:
    """When an entry of a listing was stored: ISO 8601 without a zone, which is UTC."""
    try:
        moment = datetime.fromisoformat(str(entry.get("last_modified", "")))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
