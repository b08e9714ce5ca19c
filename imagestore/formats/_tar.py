"""A strict tar reader for a stream (POSIX ustar and pax, and GNU's long names)."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from imagestore.formats._findings import Broken

__all__ = ["Member", "TarReader", "checksum_holds", "name_problem"]

_BLOCK: Final = 512
_ZERO: Final = bytes(_BLOCK)
_EXTENDED_MAX: Final = 64 << 10
_NAME_MAX: Final = 1024
_LOW: Final = bytes(range(128))


class Member(NamedTuple):
    """One entry of the archive; `offset` is that of its header, `size` of its data in bytes."""

    name: str
    size: int
    type: str
    link: str
    offset: int


class Handler(Protocol):
    """Who is told."""

    def member(self, member: Member) -> None: ...
    def data(self, chunk: bytes) -> None: ...
    def end(self) -> None: ...
    def note(self, code: str, message: str, offset: int, member: str | None = None) -> None: ...


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a member; None for a plain relative one."""
    if not name or len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX:
        return "is empty or too long"
    if name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":" and name[0].isalpha()):
        return "is not relative"
    if ".." in name.split("/"):
        return "leads upwards"
    if not name.isprintable():
        return "has signs that are no text"
    return None


def _number(field: bytes) -> int | None:
    """An octal number, or GNU's base-256; None if it is neither."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        return None if field[0] & 0x40 else value - (0x80 << 8 * (len(field) - 1))
    text = field.strip(b" \0")
    if not text:
        return 0
    return int(text, 8) if text.isdigit() and not set(text) & set(b"89") else None


def checksum_holds(block: bytes) -> bool:
    """Whether the checksum in these 512 bytes of a header is theirs; old writers summed signed bytes."""
    told = _number(block[148:156])
    sums = sum(block) - sum(block[148:156]) + 256
    if told == sums:
        return True
    return told == sums - 256 * len((block[:148] + block[156:]).translate(None, _LOW))


class TarReader:
    """Takes an archive in any chunks; raises `Broken` when it can't go on."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._header = bytearray()
        self._left = 0  # of the data of the present member
        self._padding = 0
        self._extended: bytearray | None = None
        self._extended_type = ""
        self._open = False
        self._zeros = 0
        self._overrides: dict[str, str] = {}
        self._pax = False
        self._position = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        done, size = 0, len(chunk)
        while done < size:
            if self._left:
                part = min(self._left, size - done)
                data = chunk if part == size else chunk[done : done + part]
                self._left -= part
                if self._extended is not None:
                    self._extended += data
                else:
                    self._handler.data(data)
                done += part
                if not self._left:
                    self._ended()
            elif self._padding:
                part = min(self._padding, size - done)
                self._padding -= part
                done += part
            elif self._zeros >= 2:
                if chunk.count(0, done) != size - done:
                    raise Broken("tar.trailer", "data follows the end of the archive")
                done = size
            else:
                part = min(_BLOCK - len(self._header), size - done)
                self._header += chunk[done : done + part]
                done += part
                if len(self._header) == _BLOCK:
                    block = bytes(self._header)
                    self._header.clear()
                    self._position += _BLOCK
                    self._block(block)

    def finish(self) -> None:
        """The archive has ended."""
        if self._left or self._header or self._extended is not None:
            raise Broken("tar.truncated", "the archive ends within a member")
        if self._zeros < 2:
            raise Broken("tar.trailer", "the end marks are missing")

    def _ended(self) -> None:
        if self._extended is not None:
            data, self._extended = bytes(self._extended), None
            if self._extended_type in "LK":
                self._told("path" if self._extended_type == "L" else "linkpath", data.rstrip(b"\0"))
            else:
                self._pax_records(data)
        elif self._open:
            self._open = False
            self._handler.end()

    def _pax_records(self, data: bytes) -> None:
        start = 0
        while start < len(data):
            length, _, rest = data[start : start + 24].partition(b" ")
            stop = start + (int(length) if length.isdigit() else 0)
            record = data[start + len(length) + 1 : stop]
            if not rest or stop > len(data) or not record.endswith(b"\n") or b"=" not in record:
                raise Broken("tar.header", "an extended header is damaged", self._position)
            key, _, value = record[:-1].partition(b"=")
            if key in {b"path", b"linkpath", b"size"}:
                self._told(key.decode(), value)
            elif key.startswith(b"GNU.sparse"):
                self._told("sparse", b"")
            start = stop

    def _told(self, key: str, value: bytes) -> None:
        """An extended header says that of the next member, or of all that follow."""
        text = value.decode("utf-8", "surrogateescape")
        if self._extended_type == "g" or self._overrides.setdefault(key, text) != text:
            raise Broken("tar.override", "extended headers disagree, or rename all members", self._position)

    def _block(self, block: bytes) -> None:
        offset = self._position - _BLOCK
        if block == _ZERO:
            self._zeros += 1
            if self._overrides:
                raise Broken("tar.header", "an extended header without a member", offset)
            return
        if self._zeros:
            raise Broken("tar.trailer", "a member follows an end mark", offset)
        if not checksum_holds(block):
            raise Broken("tar.checksum", "the checksum of a header is wrong", offset)
        size = _number(block[124:136])
        if size is None or size >= 1 << 60:
            raise Broken("tar.header", "the length of a member is impossible", offset)
        kind = block[156:157].decode("latin-1").replace("\0", "0")
        ustar = block[257:263] == b"ustar\0"
        if block[257:262] != b"ustar":
            self._handler.note("tar.v7", "the header has no signature", offset)
        if kind in "LKxg":
            self._begin_extended(kind, size, offset)
            return
        name = _text(block[:100])
        if ustar and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        link = _text(block[157:257])
        name, link = self._override(name, link, size, offset)
        # Links and devices have no data, whatever their size field says.
        if kind in "123456" and size:
            self._handler.note("tar.header", "a link, device or directory with data", offset, name)
            if kind != "1":
                size = 0
            else:
                raise Broken("tar.header", "a hard link with data: readers differ", offset)
        self._left, self._padding = size, -size % _BLOCK
        self._position += size + self._padding
        self._open = True
        self._handler.member(Member(name=name, size=size, type=kind, link=link, offset=offset))
        if not size:
            self._ended()

    def _begin_extended(self, kind: str, size: int, offset: int) -> None:
        if not 0 < size <= _EXTENDED_MAX:
            raise Broken("tar.header", f"an extended header of {size} bytes", offset)
        if not self._pax:
            self._pax = True
            self._handler.note("ova.pax", "the archive has extended headers", offset)
        self._left, self._padding = size, -size % _BLOCK
        self._position += size + self._padding
        self._extended, self._extended_type = bytearray(), kind

    def _override(self, name: str, link: str, size: int, offset: int) -> tuple[str, str]:
        overrides, self._overrides = self._overrides, {}
        if "sparse" in overrides:
            self._handler.note("tar.type", "a sparse member", offset, name)
        told = overrides.get("size")
        if told is not None and told != str(size):
            raise Broken("tar.override", "an extended header gives a member another length", offset)
        path, target = overrides.get("path", name), overrides.get("linkpath", link)
        # A name that does not fit the old field is cut there; that is what extended headers are for.
        cut = len(name) >= 99 and path.startswith(name[:99])
        if path != name and not cut:
            self._handler.note("tar.override", "an extended header gives a member another name", offset, path)
        if target != link and not target.startswith(link[:99]):
            self._handler.note("tar.override", "an extended header gives a link another target", offset, path)
        return path, target


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
