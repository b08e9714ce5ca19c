"""The door: declarations, policy, early refusal, bounded memory, and rules that no sample shows."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import resource
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from formats.samples import fatal, run, sample

from imagestore.errors import FormatMismatch, InvalidOption, InvalidRequest, UnsafeImage
from imagestore.formats import (
    CONTAINER_FORMATS,
    DISK_FORMATS,
    FINDINGS,
    Inspector,
    Policy,
    inspect_file,
    inspect_stream,
)
from imagestore.formats._crc32c import crc32c
from imagestore.formats._findings import Broken
from imagestore.formats._json import JsonError, load
from imagestore.formats._ovf import parse_ovf

MIB = 1 << 20
QCOW2 = "good/qcow2-handmade-minimal.qcow2"


def codes(data: bytes, disk: str | None, container: str | None = None, policy: Policy | None = None) -> set[str]:
    return {each.code for each in run(data, disk, container, policy=policy)[0].findings}


def patched(name: str, offset: int, data: bytes) -> bytes:
    whole = bytearray(sample(name).data)
    whole[offset : offset + len(data)] = data
    return bytes(whole)


def archive(*members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def blob(data: bytes) -> tuple[str, bytes]:
    return f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", data


def descriptor(data: bytes, media: str = "") -> dict[str, object]:
    return {"mediaType": media, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


LAYER = archive(("a", b"b"))
LAYOUT = ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')


def oci(manifest: bytes | None = None, *more: tuple[str, bytes], layer: bytes = LAYER, **extra: object) -> bytes:
    config = b'{"os":"linux"}'
    media = "application/vnd.oci.image.layer.v1.tar"
    document = {"schemaVersion": 2, "config": descriptor(config), "layers": [descriptor(layer, media) | extra]}
    manifest = manifest or json.dumps(document).encode()
    index = {"schemaVersion": 2, "manifests": [descriptor(manifest, "application/vnd.oci.image.manifest.v1+json")]}
    parts = (LAYOUT, ("index.json", json.dumps(index).encode()), blob(manifest), blob(config), blob(layer), *more)
    return archive(*parts)


# Declarations and policy


def test_unknown_names_are_errors() -> None:
    for options in (
        {"mode": "loud"},
        {"compressed": "half"},
        {"disk_formats": ("qcow3",)},
        {"container_formats": ("zip",)},
        {"ova_disk_formats": ("x",)},
        {"overrides": {"qcow2.nothing": "allow"}},
        {"overrides": {"nothing.*": "allow"}},
        {"overrides": {"qcow2.dirty": "maybe"}},
        {"max_ratio": 0},
    ):
        with pytest.raises(InvalidOption):
            Policy(**options)  # type: ignore[arg-type]
    for disk, container in (("qcow3", None), (None, "zip")):
        with pytest.raises(InvalidRequest):
            Inspector(disk_format=disk, container_format=container)
    with pytest.raises(InvalidRequest):
        Inspector(disk_format="iso", policy=Policy(disk_formats=("raw", "qcow2")))


def test_overrides_go_by_code_then_by_family() -> None:
    dirty = sample("hostile/q30-dirty-bit.qcow2").data
    assert not run(dirty, "qcow2", None)[0].accepted
    assert run(dirty, "qcow2", None, policy=Policy(overrides={"qcow2.dirty": "allow"}))[0].accepted
    assert run(dirty, "qcow2", None, policy=Policy(overrides={"qcow2.*": "allow"}))[0].accepted
    both = Policy(overrides={"qcow2.*": "allow", "qcow2.dirty": "refuse"})
    assert not run(dirty, "qcow2", None, policy=both)[0].accepted
    encrypted = sample("good/luks1.luks").data
    assert not run(encrypted, "luks", None, policy=Policy(overrides={"luks.encrypted": "refuse"}))[0].accepted


@pytest.mark.parametrize(("mode", "refused", "found"), [("off", False, 0), ("warn", False, 1), ("enforce", True, 1)])
def test_modes(mode: str, refused: bool, found: int) -> None:
    data = sample("hostile/q08-datafile-bit-no-name.qcow2").data
    inspector = Inspector(disk_format="qcow2", policy=Policy(mode=mode))  # type: ignore[arg-type]
    inspector.feed(data)
    result = inspector.finish()
    assert inspector.finish() is result
    assert (inspector.refusal is not None) == refused
    assert len(result.findings) >= found
    assert result.size == len(data)
    assert result.accepted == (mode == "off")


def test_errors_of_the_tree() -> None:
    for name, disk, kind in (
        ("hostile/q08-datafile-bit-no-name.qcow2", "qcow2", UnsafeImage),
        ("hostile/q12-cluster-bits-22.qcow2", "qcow2", FormatMismatch),
        (QCOW2, "vmdk", FormatMismatch),
        (QCOW2, "raw", UnsafeImage),
        ("good/qcow2-aes.qcow2", "qcow2", UnsafeImage),
    ):
        inspector = Inspector(disk_format=disk)
        inspector.feed(sample(name).data)
        inspector.finish()
        assert type(inspector.refusal) is kind, name
    assert "qcow2.data_file" in run(sample("hostile/q08-datafile-bit-no-name.qcow2").data, "qcow2", None)[1]


def test_names_in_an_image_are_not_repeated() -> None:
    for name in ("q02-backing-json.qcow2", "m02-flat-relative.vmdk", "o13-href-file-url.ova", "r02-raw-is-vmdk.raw"):
        each = sample(f"hostile/{name}")
        inspection, refusal = run(each.data, each.disk, each.container)
        text = refusal + "".join(str(finding) for finding in inspection.findings)
        assert not any(word in text for word in ("json:", "canary", "file://", "127.0.0.1", "passwd"))


@pytest.mark.parametrize(
    ("name", "disk", "container"),
    [
        ("hostile/q02-backing-json.qcow2", "qcow2", "bare"),
        (QCOW2, "raw", "bare"),
        (QCOW2, "vmdk", "bare"),
        (QCOW2, "qcow2", "ova"),
        (QCOW2, "qcow2", "compressed"),
        ("hostile/o03-absolute.ova", "vmdk", "ova"),
        ("hostile/z02-bomb-1G.bz2", "raw", "compressed"),
        ("hostile/i02-system-area-vmdk.iso", "iso", "bare"),
    ],
)
def test_refused_before_the_end(name: str, disk: str, container: str) -> None:
    inspector = Inspector(disk_format=disk, container_format=container)
    data = sample(name).data
    inspector.feed(data[:100])
    inspector.feed(data[100:] + bytes(2 * MIB))
    assert inspector.refusal is not None
    first = str(inspector.refusal)
    inspector.feed(bytes(MIB))
    inspector.finish()
    assert str(inspector.refusal) == first


@pytest.mark.parametrize("name", ["good/vhd-fixed-handmade.vhd", "good/raw-gpt-handmade.img", "good/iso-plain.iso"])
def test_nothing_is_refused_too_early(name: str) -> None:
    each = sample(name)
    inspector = Inspector(disk_format=each.disk)
    for start in range(0, each.size, 4096):
        assert inspector.refusal is None
        inspector.feed(each.data[start : start + 4096])
    assert inspector.finish().accepted


def test_memory_stays_bounded() -> None:
    chunk = os.urandom(MIB)
    heads = {
        ("raw", None): bytes(MIB),
        ("vhdx", None): sample("good/vhdx-dynamic.vhdx").data[: 4 * MIB],
        ("raw", "docker"): tarfile.TarInfo("blobs/sha256/" + "0" * 64).tobuf(tarfile.USTAR_FORMAT),
        ("raw", "compressed"): gzip.compress(chunk)[:MIB],
    }
    for (disk, container), head in heads.items():
        inspector = Inspector(disk_format=disk, container_format=container, policy=Policy(mode="warn"))
        tracemalloc.start()
        inspector.feed(head)
        for size in (MIB, 65536, 512):
            for start in range(0, 16 * size, size):
                inspector.feed(chunk[start % MIB :][:size])
        for _ in range(16):
            inspector.feed(chunk)
        inspector.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * MIB, (disk, container, peak)


def test_chunks_may_be_any_buffer() -> None:
    data = sample(QCOW2).data
    for kind in (bytearray, memoryview):
        inspector = Inspector(disk_format="qcow2")
        inspector.feed(kind(data))  # type: ignore[arg-type]
        assert inspector.finish().accepted
    assert inspect_stream([b"", data, b""], disk_format="qcow2").accepted


def test_inspect_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(sample(QCOW2).data)
    assert inspect_file(path, disk_format="qcow2", container_format="bare").virtual_size == MIB
    with pytest.raises(FileNotFoundError):
        inspect_file(tmp_path / "none")


def test_every_declared_format_accepts_something() -> None:
    # and an image of another kind is refused under every name but its own
    for disk in DISK_FORMATS:
        accepted = run(sample(QCOW2).data, disk, None)[0].accepted
        assert accepted == (disk == "qcow2"), disk
    for container in CONTAINER_FORMATS:
        assert run(sample(QCOW2).data, "qcow2", container)[0].accepted == (container in {"bare", "aki", "ari", "ami"})


def test_the_limit_of_the_virtual_size() -> None:
    data = sample("good/qcow2-empty-1T.qcow2").data
    assert "limit.virtual_size" in codes(data, "qcow2", policy=Policy(max_virtual_size=2**40 - 1))
    assert run(data, "qcow2", None, policy=Policy(max_virtual_size=2**40))[0].accepted
    packed = gzip.compress(data)
    assert "limit.virtual_size" in codes(packed, "qcow2", "compressed", Policy(max_virtual_size=MIB))
    ova = sample("good/ova-nomf.ova").data
    assert "limit.virtual_size" in codes(ova, "vmdk", "ova", Policy(max_virtual_size=MIB))


# Rules of single formats


def qcow2(**fields: int) -> bytes:
    places = {"backing_size": 16, "incompatible": 72, "compatible": 80, "autoclear": 88, "crypt": 32, "snapshots": 60}
    data = bytearray(sample(QCOW2).data)
    for name, value in fields.items():
        size = 8 if name.endswith(("ible", "clear")) else 4
        data[places[name] : places[name] + size] = value.to_bytes(size, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"backing_size": 5}, "qcow2.backing_file"),
        ({"incompatible": 2}, "qcow2.corrupt"),
        ({"incompatible": 1 << 40}, "qcow2.features"),
        ({"compatible": 1 << 40}, "qcow2.unknown_feature"),
        ({"autoclear": 2}, "qcow2.data_file"),
        ({"crypt": 3}, "qcow2.encryption"),
        ({"crypt": 2}, "qcow2.encryption"),
        ({"snapshots": 70_000}, "qcow2.tables"),
    ],
)
def test_qcow2_fields(fields: dict[str, int], code: str) -> None:
    assert code in codes(qcow2(**fields), "qcow2")


def test_qcow2_with_endless_extensions() -> None:
    data = bytearray(sample(QCOW2).data)
    for index in range(200):
        struct.pack_into(">II", data, 104 + 8 * index, 0x11111111 + index, 0)
    assert "qcow2.extension" in codes(bytes(data), "qcow2")


VMDK = "good/vmdk-monolithicsparse.vmdk"


def descriptor_text(**changes: str) -> bytes:
    text = sample(VMDK).data[512:1536].rstrip(b"\0").decode()
    for old, new in changes.items():
        text = text.replace({"parent": "parentCID=ffffffff", "kind": "createType", "extent": "RW 8192"}[old], new)
    return patched(VMDK, 512, text.encode().ljust(2048, b"\0"))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (descriptor_text(parent="parentCID=12345678"), "vmdk.parent"),
        (descriptor_text(parent='parentFileNameHint="/x"'), "vmdk.parent"),
        (descriptor_text(parent='# createType="x"'), "vmdk.descriptor"),
        (descriptor_text(parent="parentCID=ffffffff\nparentCID=ffffffff"), "vmdk.descriptor"),
        (descriptor_text(parent='changeTrackPath="x"'), "vmdk.descriptor"),
        (descriptor_text(parent="parentCID=ffffffff\x01"), "vmdk.embedded_text"),
        (descriptor_text(parent="parentCID=ffffffff\ré"), "vmdk.embedded_text"),
        (descriptor_text(parent='ddb.uuid.parent="00000000-0000-0000-0000-000000000001"'), "vmdk.parent"),
        (descriptor_text(kind="createtype"), "vmdk.descriptor"),
        (descriptor_text(extent="RW 8193"), "vmdk.capacity"),
        (descriptor_text(extent="RW 8192\n"), "vmdk.descriptor"),
        (descriptor_text(extent="NOACCESS 8192"), "vmdk.descriptor"),
        (patched(VMDK, 72, b"\1"), "vmdk.unclean"),
        (patched(VMDK, 73, b"\n\n\n\n"), "vmdk.header"),
        (patched(VMDK, 8, b"\3\0\1\0"), "vmdk.header"),
        (patched(VMDK, 100, b"\1"), "vmdk.header"),
        (patched(VMDK, 28, bytes(16)), "vmdk.no_descriptor"),
        (b"\xbe\xba\xfe\xca" + bytes(2000), "vmdk.sesparse"),
    ],
)
def test_vmdk(data: bytes, code: str) -> None:
    inspection, _ = run(data, "vmdk", None)
    assert code in {each.code for each in inspection.findings}
    assert not inspection.accepted


@pytest.mark.parametrize(
    "text",
    [
        b"version=1\ncreateType=",
        b"# \xff\x01 anything\nversion=1\n",
        b"#\n  \r\n   \nversion=3\r\n",
        b"# Disk DescriptorFile\nversion=1\n",
        b"# a comment\n\n\nversion=2\n",
        b"any text at all, and far behind it\n" + b" \n" * 9000 + b'createType="vmfs"',
        b"#" * 400 + b"\nversion=1\n",
    ],
)
def test_a_text_descriptor_is_never_raw(text: bytes) -> None:
    for disk in ("raw", "ami", "aki", "vmdk"):
        inspection, _ = run(text, disk, None)
        assert not inspection.accepted
        assert "vmdk" in inspection.formats
    iso = bytearray(sample("good/iso-handmade.iso").data)
    iso[: len(text[:4000])] = text[:4000]
    if b"createType" not in text:
        assert "format.polyglot" in codes(bytes(iso), "iso")


@pytest.mark.parametrize("text", [b"version = 1\n" * 50, b"see version=1\n", b"# Disk\n version=1\n", b"version=4\n"])
def test_other_texts_are_raw(text: bytes) -> None:
    assert run(text, "raw", None)[0].accepted


def test_a_fixed_vhd_under_another_name() -> None:
    data = sample("good/vhd-fixed-handmade.vhd").data
    assert {"format.disguised"} == fatal(run(data, "raw", None)[0])
    iso = sample("good/iso-handmade.iso").data
    assert "format.polyglot" in codes(iso + data[-512:], "vhd")
    qcow = sample(QCOW2).data
    assert "format.polyglot" in codes(qcow + data[-512:], "qcow2")


def vhd(offset: int, value: bytes) -> bytes:
    """The dynamic sample with both copies of its footer changed, and the right checksum."""
    whole = bytearray(sample("good/vhd-dynamic.vhd").data)
    footer = bytearray(whole[:512])
    footer[offset : offset + len(value)] = value
    footer[64:68] = bytes(4)
    footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    whole[:512] = whole[-512:] = footer
    return bytes(whole)


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [
        (60, b"\0\0\0\5", "vhd.footer"),
        (60, b"\0\0\0\2", "vhd.footer"),
        (84, b"\1", "vhd.saved_state"),
        (100, b"\1", "vhd.footer"),
        (48, struct.pack(">Q", 2041 << 30), "vhd.size"),
        (56, struct.pack(">HBB", 60000, 16, 63), "vhd.geometry"),
        (16, struct.pack(">Q", 256), "vhd.dynamic_header"),
        (8, bytes(4), "vhd.footer"),
    ],
)
def test_vhd_footer(offset: int, value: bytes, code: str) -> None:
    found = codes(vhd(offset, value), "vhd")
    assert code in found
    assert "vhd.checksum" not in found


def test_vhd_footers_that_differ() -> None:
    data = bytearray(sample("good/vhd-dynamic.vhd").data)
    data[-500] ^= 1
    assert "vhd.copies_differ" in codes(bytes(data), "vhd")
    assert "vhd.footer" in codes(bytes(data[:-512]), "vhd")


def vhdx(*changes: tuple[int, bytes]) -> bytes:
    """The sample with changes, and the right checksums of its headers and region tables."""
    whole = bytearray(sample("good/vhdx-dynamic.vhdx").data)
    for offset, value in changes:
        whole[offset : offset + len(value)] = value
    for start, length in ((65536, 4096), (131072, 4096), (196608, 65536), (262144, 65536)):
        block = whole[start : start + length]
        block[4:8] = bytes(4)
        whole[start + 4 : start + 8] = struct.pack("<I", crc32c(bytes(block)))
    return bytes(whole)


def both(offset: int, value: bytes) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    return (196608 + offset, value), (262144 + offset, value)


def test_vhdx_metadata_must_lie_ahead() -> None:
    table = sample("good/vhdx-dynamic.vhdx").data[196608:196704]
    metadata = uuid_place(table)
    moved = vhdx(*both(metadata + 16, struct.pack("<Q", 200 * 1024)))
    assert "vhdx.regions" in codes(moved, "vhdx")
    assert "vhdx.regions" in codes(vhdx(*both(metadata, b"x" * 16)), "vhdx")
    assert "vhdx.regions" in codes(vhdx(*both(8, b"\xff\xff\0\0")), "vhdx")
    assert run(vhdx(), "vhdx", None)[0].accepted
    # The newest header counts, and one good one is enough.
    broken = bytearray(vhdx())
    broken[65540] ^= 1
    assert run(bytes(broken), "vhdx", None)[0].accepted


def uuid_place(table: bytes) -> int:
    return table.index(bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e"))


def test_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the catalogue of CRCs
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(b"1" + bytes(70_000)) != crc32c(b"1" + bytes(70_001))


def test_a_stale_table_hurts_only_who_declares_it() -> None:
    data = sample("hostile/g01-header-crc.img").data
    assert not run(data, "gpt", None)[0].accepted
    for disk in ("raw", "ami", None):
        inspection, _ = run(data, disk, None)
        assert inspection.accepted
        assert ("gpt.header", "info") in {(each.code, each.severity) for each in inspection.findings}


def test_luks_2_is_raw_to_who_probes() -> None:
    data = b"LUKS\xba\xbe\0\2" + bytes(8192)
    assert "luks.header" in codes(data, "luks")
    assert "raw.encrypted" in codes(data, "raw")
    assert "format.disguised" not in codes(data, "raw")
    assert "format.disguised" in codes(b"LUKS\xba\xbe\0\1" + bytes(8192), "raw")


# Containers


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (oci(), set()),
        (oci(urls=["http://x"]), {"docker.urls"}),
        (oci(layer=sample(QCOW2).data), {"docker.nested"}),
        (oci(size=1), {"docker.size"}),
        (oci(digest="md5:" + "0" * 32), {"docker.digest_algorithm"}),
        (oci(digest="sha256:" + "0" * 64), {"docker.path"}),
        (oci(b'{"manifests":[],"layers":[]}'), {"docker.two_documents"}),
        (oci(b'{"config":{},"config":{}}'), {"docker.two_documents"}),
        (oci(b"[" * 40 + b"]" * 40), {"docker.document"}),
        (oci(b'{"layers":NaN}'), {"docker.document"}),
        (oci(None, ("blobs/sha256/" + "0" * 64, b"x")), {"docker.digest"}),
        (oci(None, ("a.ovf", b"x")), {"ova.polyglot"}),
        (oci(None, ("../x", b"x")), {"tar.name"}),
        (oci(None, ("manifest.json", b"[]")), {"docker.document"}),
        (oci(None, ("manifest.json", b'[{"Config":"/etc/x","Layers":[]}]')), {"docker.path"}),
        (oci(None, ("other", b"1"), ("./other", b"2")), {"tar.duplicate"}),
    ],
)
def test_container_images(data: bytes, wanted: set[str]) -> None:
    found = fatal(run(data, "raw", "docker")[0])
    assert wanted <= found
    assert bool(wanted) == bool(found)
    assert found == fatal(run(data, None, None)[0])


def test_members_of_an_archive_are_limited() -> None:
    many = archive(LAYOUT, *((f"f{index}", b"") for index in range(40)))
    assert "tar.too_many" in codes(many, "raw", "docker", Policy(max_members=20))
    # A plain file system may have any number, and links and devices too.
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind, name in ((tarfile.CHRTYPE, "dev/null"), (tarfile.SYMTYPE, "bin"), (tarfile.LNKTYPE, "x")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/usr/bin"
            tar.addfile(info)
        for index in range(40):
            tar.addfile(tarfile.TarInfo(f"f{index}"))
    assert run(buffer.getvalue(), "raw", "docker", policy=Policy(max_members=20))[0].accepted


def test_long_names_are_no_override() -> None:
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = archive(LAYOUT, ("index.json", b'{"manifests":[]}'), ("n" * 180, b"x"), format=dialect)
        assert run(data, "raw", "docker")[0].accepted


VM = "good/ova-sha512.ova"


def ova(**changes: bytes) -> bytes:
    """The sample taken apart and put together again, with other contents; None leaves a member out."""
    with tarfile.open(fileobj=io.BytesIO(sample(VM).data)) as tar:
        members = {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]
    names = {name.rpartition(".")[2]: name for name in members}
    for suffix, data in changes.items():
        members[names[suffix]] = data
    if "mf" not in changes:
        del members[names["mf"]]
    return archive(*members.items())


def part(suffix: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(sample(VM).data)) as tar:
        name = next(name for name in tar.getnames() if name.endswith(suffix))
        return tar.extractfile(name).read()  # type: ignore[union-attr]


def test_ova_disks_are_looked_at() -> None:
    assert run(ova(), "vmdk", "ova")[0].accepted
    disk = part(".vmdk")
    flat = sample("hostile/m02-flat-relative.vmdk").data.ljust(len(disk), b"\0")
    assert "vmdk.text_descriptor" in codes(ova(vmdk=flat), "vmdk", "ova")
    assert "format.mismatch" in codes(ova(vmdk=sample(QCOW2).data), "vmdk", "ova")
    assert "ova.size" in codes(ova(vmdk=disk + bytes(512)), "vmdk", "ova")
    raw = Policy(ova_disk_formats=("raw", "vmdk"))
    assert "format.disguised" in codes(ova(vmdk=disk), "raw", "ova", raw)


def test_ova_manifests() -> None:
    manifest = part(".mf")
    assert not fatal(run(ova(mf=manifest), "vmdk", "ova")[0])
    lines = manifest.splitlines(keepends=True)
    assert "ova.manifest" in codes(ova(mf=lines[0]), "vmdk", "ova")
    assert "ova.manifest" in codes(ova(mf=manifest + b"SHA256(x)= " + b"0" * 64), "vmdk", "ova")
    assert "ova.manifest" in codes(ova(mf=manifest + lines[0]), "vmdk", "ova")
    assert "ova.manifest" in codes(ova(mf=b"MD5(x)= 00"), "vmdk", "ova")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"<Envelope", b"<!DOCTYPE a><Envelope", "ovf.doctype"),
        (b"</Envelope>", b"", "ovf.xml"),
        (b"UTF-8", b"ISO-8859-1", "ovf.xml"),
        (b"ovf:capacity=", b'ovf:parentRef="x" ovf:capacity=', "ova.parent"),
        (b"</Envelope>", b"<a>" * 70 + b"</a>" * 70 + b"</Envelope>", "ovf.too_large"),
    ],
)
def test_ovf_descriptors(old: bytes, new: bytes, code: str) -> None:
    text = part(".ovf").replace(b"<ovf:Envelope", b"<Envelope").replace(b"</ovf:Envelope", b"</Envelope")
    if old not in text:
        text = b'<?xml version="1.0" encoding="UTF-8"?>' + text
    changed = text.replace(old, new, 1)
    assert changed != text
    assert code in codes(changed, "vmdk", "ovf")
    assert code in codes(ova(ovf=changed), "vmdk", "ova")


def zipped(*names: str, method: int = zipfile.ZIP_DEFLATED, data: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name in names:
            file.writestr(name, sample(QCOW2).data if data is None else data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (gzip.compress(sample(QCOW2).data), None),
        (gzip.compress(sample(QCOW2).data[:1000]) + gzip.compress(sample(QCOW2).data[1000:]), None),
        (bz2.compress(sample(QCOW2).data), None),
        (lzma.compress(sample(QCOW2).data), None),
        (lzma.compress(sample(QCOW2).data) + bytes(8), None),
        (lzma.compress(sample(QCOW2).data, format=lzma.FORMAT_ALONE), None),
        (zipped("a"), None),
        (zipped("a", method=zipfile.ZIP_STORED), None),
        (zipped("a", "b"), "compressed.trailing"),
        (zipped("a") + b"x", "compressed.trailing"),
        (zipped("a")[:-40], "compressed.truncated"),
        (zipped("a", data=b"x"), "format.unknown"),
        (zipped(), "compressed.corrupt"),
        (gzip.compress(sample(QCOW2).data) + b"x", "compressed.trailing"),
        (bz2.compress(sample(QCOW2).data)[:-1], "compressed.truncated"),
        (gzip.compress(gzip.compress(sample(QCOW2).data)), "compressed.nested"),
        (gzip.compress(sample("hostile/q08-datafile-bit-no-name.qcow2").data), "qcow2.data_file"),
        (lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 128 * MIB}]), "compressed.memory"),
    ],
)
def test_unpacking(data: bytes, wanted: str | None) -> None:
    inspection, _ = run(data, "qcow2", "compressed")
    if wanted is None:
        assert inspection.accepted, inspection.findings
        assert (inspection.disk_format, inspection.virtual_size, inspection.verified) == ("qcow2", MIB, "full")
    else:
        assert wanted in fatal(inspection)
    for size in (1000, 32768):
        assert run(data, "qcow2", "compressed", size)[0] == inspection


def test_unpacking_less() -> None:
    unsafe = gzip.compress(sample("hostile/q08-datafile-bit-no-name.qcow2").data + os.urandom(2 * MIB))
    head = run(unsafe, "qcow2", "compressed", policy=Policy(compressed="head"))[0]
    assert "qcow2.data_file" in fatal(head)
    assert head.verified == "head"
    opaque = run(unsafe, "qcow2", "compressed", policy=Policy(compressed="opaque"))[0]
    assert opaque.accepted
    assert opaque.verified == "opaque"
    assert {each.code for each in opaque.findings} == {"compressed.opaque"}


def test_limits_of_unpacking() -> None:
    zeros = gzip.compress(bytes(20 * MIB))
    assert "compressed.bomb" in codes(zeros, "raw", "compressed")
    assert run(zeros, "raw", "compressed", policy=Policy(max_ratio=2000))[0].accepted
    assert "compressed.bomb" in codes(zeros, "raw", "compressed", Policy(max_ratio=2000, max_unpacked=MIB))
    assert run(gzip.compress(bytes(15 * MIB)), "raw", "compressed")[0].accepted


# Structures that would cost more than they are long


def spent(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def megabyte(begin: bytes, unit: bytes, end: bytes = b"") -> bytes:
    return begin + unit * ((MIB - len(begin) - len(end) - 64) // len(unit)) + end


@pytest.mark.parametrize("data", [megabyte(b'{"', b'\\"'), megabyte(b"[", b"{},"), megabyte(b"[", b'"\\')])
def test_json_is_read_once(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(JsonError):
        load(data)
    assert time.process_time() - began < 2
    assert "docker.document" in codes(archive(LAYOUT, ("index.json", data)), "raw", "docker")


def test_numbers_and_strings_of_json() -> None:
    assert load(b'{"a\\"[[[":[1,-2.5,"}"],"b":"\\\\"}') == {'a"[[[': [1, -2.5, "}"], "b": "\\"}
    for data in (b"[" + b"1" * 21 + b"]", b'"a', b'{"a":1}}', b"[Infinity]"):
        with pytest.raises(JsonError):
            load(data)


ENVELOPE = b'<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" '
BOMB = b'<!ENTITY a "' + b"x" * 1000 + b'"><!ENTITY b "' + b"&a;" * 1000 + b'"><!ENTITY c "' + b"&b;" * 1000 + b'">'


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (
            ENVELOPE
            + b'xmlns:a="'
            + b"u" * 300_000
            + b'" '
            + b" ".join(b'a:b%d=""' % n for n in range(60_000))
            + b"/>",
            "",
        ),
        (ENVELOPE + b" ".join(b'xmlns:a%d="u"' % n for n in range(40_000)) + b"/>", "ovf.too_large"),
        (megabyte(ENVELOPE + b">", b"<a>"), "ovf.too_large"),
        (megabyte(ENVELOPE + b">", b"<a/>"), "ovf.too_large"),
        (b"<!DOCTYPE a [" + BOMB + b"]>" + ENVELOPE + b">&c;</Envelope>", "ovf.doctype"),
    ],
)
def test_xml_is_read_in_bounded_memory(data: bytes, code: str) -> None:
    assert len(data) <= MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    found = fatal(run(data, "vmdk", "ovf")[0])
    assert found == ({code} if code else set())
    assert time.process_time() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"ovf:href=", b'href="other" ovf:href='),
        (b"ovf:href=", b'xmlns:o="http://schemas.dmtf.org/ovf/envelope/1" o:href="other" ovf:href='),
        (b"ovf:href=", b"href="),
    ],
)
def test_an_attribute_has_one_meaning(old: bytes, new: bytes) -> None:
    text = part(".ovf")
    assert old in text
    assert "ova.href" in codes(text.replace(old, new, 1), "vmdk", "ovf")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_of_an_ovf(encoding: str) -> None:
    text = part(".ovf").decode().replace('encoding="UTF-8"', "").removeprefix("<?xml version='1.0'?>")
    text = '<?xml version="1.0"?>' + text[text.index("<", 5) if text.startswith("<?") else 0 :]
    assert not parse_ovf(text.encode(encoding)).problems
    with pytest.raises(Broken, match="document type"):
        parse_ovf(text.replace("?>", "?><!DOCTYPE a>", 1).encode(encoding))


@pytest.mark.parametrize("capacity", [b"9" * 5000, b"0" * 20 + b"9" * 20, b"9" * 19, b"1e3", b""])
def test_capacities_that_are_none(capacity: bytes) -> None:
    text = re.sub(rb'ovf:capacity="[^"]*"', b'ovf:capacity="' + capacity + b'" ', part(".ovf"))
    assert "ova.capacity" in fatal(run(text, "vmdk", "ovf")[0])


def extended(kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def test_extended_headers_are_read_once() -> None:
    header = extended(tarfile.XHDTYPE, b"8 a=bcd\n" * 8191)
    assert spent(lambda: run(header * 60 + archive(LAYOUT), "raw", "docker")) < 3
    sparse = [
        extended(tarfile.XHDTYPE, b"".join(b"24 GNU.sparse.%07d=xx\n" % (start + n) for n in range(2500)))
        for start in range(0, 100_000, 2500)
    ]
    inspector = Inspector(disk_format="raw", container_format="docker", policy=Policy(mode="warn"))
    tracemalloc.start()
    for data in sparse:
        inspector.feed(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert inspector.finish().findings
    assert peak < 6 * MIB


@pytest.mark.parametrize(
    "headers",
    [
        extended(tarfile.XGLTYPE, b"12 path=abc\n"),
        extended(tarfile.XHDTYPE, b"12 path=abc\n") + extended(tarfile.XHDTYPE, b"12 path=abd\n"),
        extended(tarfile.XHDTYPE, b"12 path=abc\n12 path=abd\n"),
        extended(tarfile.XHDTYPE, b"12 path=abc\n") + extended(tarfile.GNUTYPE_LONGNAME, b"other\0"),
    ],
)
def test_extended_headers_that_readers_understand_differently(headers: bytes) -> None:
    member = tarfile.TarInfo("abc")
    data = archive(LAYOUT)[:1024] + headers + member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    assert "tar.override" in fatal(run(data, "raw", "docker")[0])


def test_a_global_comment_is_welcome() -> None:
    data = extended(tarfile.XGLTYPE, b"16 comment=abcd\n") + archive(LAYOUT, ("index.json", b'{"manifests":[]}'))
    assert run(data, "raw", "docker")[0].accepted


def test_names_of_members_are_bounded() -> None:
    """In a plain root file system too, which may have any number of members."""
    policy = Policy(mode="warn", max_members=500)
    inspector = Inspector(disk_format="raw", container_format="docker", policy=policy)
    info = tarfile.TarInfo()
    for number in range(60):
        info.name = f"{number:05}" + "n" * 95
        long = extended(tarfile.GNUTYPE_LONGNAME, info.name.encode() + b"n" * 60_000 + b".tar\0")
        inspector.feed(long + info.tobuf(tarfile.USTAR_FORMAT))
    info.size = 1
    for number in range(1500):
        info.name = f"{number:064x}.json" if number % 2 else f"{number}.tar"
        inspector.feed(info.tobuf(tarfile.USTAR_FORMAT) + b"{" + bytes(511))
    archive = inspector._archive
    assert archive is not None
    assert 30 < len(archive._names) <= 500
    assert sum(map(len, archive._names)) <= 2 * MIB
    assert archive._kinds.keys() | archive._texts.keys() | archive._links.keys() <= archive._names.keys()
    inspection = inspector.finish()
    assert all(len(each.member or "") <= 200 for each in inspection.findings)


def test_many_disks_are_kept_one_at_a_time() -> None:
    disk = part(".vmdk") + bytes(MIB)
    names = [f"disk{number}.vmdk" for number in range(20)]
    files = "".join(f'<File o:id="{name}" o:href="{name}"/>' for name in names)
    disks = "".join(f'<Disk o:fileRef="{name}" o:capacity="4194304"/>' for name in names)
    space = "http://schemas.dmtf.org/ovf/envelope/1"
    ovf = f'<Envelope xmlns="{space}" xmlns:o="{space}"><References>{files}</References>{disks}</Envelope>'
    inspector = Inspector(disk_format="vmdk", container_format="ova")
    tracemalloc.start()
    inspector.feed(archive(("vm.ovf", ovf.encode()))[: 512 + len(ovf) + -len(ovf) % 512])
    info = tarfile.TarInfo()
    info.size = len(disk)
    for info.name in names:
        inspector.feed(info.tobuf(tarfile.USTAR_FORMAT))
        for start in range(0, len(disk), 65536):
            inspector.feed(disk[start : start + 65536])
        inspector.feed(bytes(-len(disk) % 512))
    inspector.feed(bytes(1024))
    inspection = inspector.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(inspection.members) == 20
    assert {each.disk_format for each in inspection.members} == {"vmdk"}
    assert peak < 10 * MIB


def test_a_disk_of_an_ova_is_refused_before_its_end() -> None:
    data = sample("hostile/o17-qcow2-as-vmdk.ova").data
    inspector = Inspector(disk_format="vmdk", container_format="ova")
    inspector.feed(data[: len(data) // 2])
    inspector.feed(bytes(4 * MIB))
    assert inspector.refusal is not None


def test_names_that_are_no_text() -> None:
    data = bytearray(archive(("vm.ovf", part(".ovf")), ("d.vmdk", part(".vmdk"))))
    start = data.index(b"d.vmdk\0")
    data[start : start + 1] = b"\xff"
    data[start + 148 : start + 156] = b"%06o\0 " % (
        sum(data[start : start + 512]) - sum(data[start + 148 : start + 156]) + 256
    )
    inspection, refusal = run(bytes(data), "vmdk", "ova")
    assert "tar.name" in fatal(inspection)
    f"{refusal} {inspection}".encode()
    for each in inspection.findings:
        (each.member or "").encode()


def test_checksums_of_old_tar_writers() -> None:
    data = bytearray(archive(("\xe9" * 20, b"x"), format=tarfile.GNU_FORMAT))
    signed = sum(byte - 256 * (byte > 127) for byte in data[:512]) - sum(data[148:156]) + 256
    data[148:156] = b"%06o\0 " % signed
    assert run(bytes(data), "raw", "docker")[0].accepted


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_streams_of_nothing(pack: Callable[[bytes], bytes]) -> None:
    assert "compressed.bomb" in codes(pack(b"") * 1100, "raw", "compressed")
    assert "compressed.bomb" not in codes(pack(b"") * 900, "raw", "compressed")
    assert run(pack(bytes(65536)) * 200, "raw", "compressed", policy=Policy(max_ratio=10**6))[0].accepted


LUKS2 = {"keyslots": {"0": {"kdf": {"iterations": 1000}, "area": {"offset": "32768", "size": "4096"}}}}


@pytest.mark.parametrize("offset", ["1" * 5000, 1e999, -1, "1_6", True, None, [], "١"])
def test_numbers_of_luks2(offset: object) -> None:
    text = json.dumps(LUKS2 | {"segments": {"0": {"offset": offset}}}).replace("Infinity", "1e999").encode()
    head = bytearray(b"LUKS\xba\xbe\0\2" + struct.pack(">QQ", 16384, 1)).ljust(16384, b"\0")
    head[72:78] = b"sha256"
    head[4096 : 4096 + len(text)] = text
    head[448:480] = hashlib.sha256(head).digest()
    assert "luks.json" in codes(bytes(head) + bytes(65536), "luks")


# The table of findings


def test_findings_are_told_apart() -> None:
    assert list(FINDINGS) == sorted(FINDINGS)
    for code, kind in FINDINGS.items():
        assert code.count(".") == 1
        assert kind.meaning.endswith(".")
        assert kind.severity in {"unsafe", "malformed", "mismatch", "policy", "info"}
        assert kind.refused or kind.severity in {"policy", "info"}


def test_the_code_reports_what_the_table_has() -> None:
    folder = Path(inspect_file.__code__.co_filename).parent
    table = folder / "_findings.py"
    text = "".join(path.read_text() for path in folder.glob("*.py") if path != table)
    unused = {code for code in FINDINGS if f'"{code}"' not in text} - {"aki.unknown", "ari.unknown"}
    assert not unused
