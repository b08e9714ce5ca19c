"""Images made here and now by the tools that people use: all accepted under their right declaration."""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path

import pytest
from formats import oracles

from imagestore.formats import Policy, inspect_file

SIZE = 8 << 20


def run(*command: str | Path, cwd: Path | None = None, input: bytes | None = None) -> None:
    tool = oracles.which(str(command[0]))
    assert tool is not None
    done = subprocess.run([tool, *map(str, command[1:])], cwd=cwd, input=input, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def accepted(path: Path, disk: str, container: str | None = None, size: int | None = None) -> None:
    inspection = inspect_file(path, disk_format=disk, container_format=container)
    assert inspection.accepted, inspection.findings
    assert not [each for each in inspection.findings if each.severity in {"unsafe", "malformed", "mismatch"}]
    if size is not None:
        assert inspection.virtual_size == size
    # Without a declaration nothing of it is refused either.
    assert inspect_file(path).accepted, inspect_file(path).findings


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk with a partition table and some data, as a guest's is."""
    path = tmp_path / "guest.raw"
    data = bytearray(SIZE)
    data[446:462] = bytes.fromhex("80010100830f3f0f3f000000c13f0000")
    data[510:512] = b"\x55\xaa"
    for start in range(0, SIZE, 1 << 20):
        data[start + 4096 : start + 8192] = os.urandom(4096)
    path.write_bytes(data)
    return path


QEMU = {
    "qcow2": ("qcow2", "qcow2", ""),
    "qcow2-v2": ("qcow2", "qcow2", "compat=0.10"),
    "qcow2-512": ("qcow2", "qcow2", "cluster_size=512"),
    "qcow2-2M": ("qcow2", "qcow2", "cluster_size=2M"),
    "qcow2-zstd": ("qcow2", "qcow2", "compression_type=zstd"),
    "qcow2-lazy": ("qcow2", "qcow2", "lazy_refcounts=on"),
    "qcow2-extended-l2": ("qcow2", "qcow2", "extended_l2=on,cluster_size=128k"),
    "qcow2-refcount-1": ("qcow2", "qcow2", "refcount_bits=1"),
    "qcow2-refcount-64": ("qcow2", "qcow2", "refcount_bits=64"),
    "qcow2-metadata": ("qcow2", "qcow2", "preallocation=metadata"),
    "vmdk-sparse": ("vmdk", "vmdk", "subformat=monolithicSparse"),
    "vmdk-stream": ("vmdk", "vmdk", "subformat=streamOptimized"),
    "vmdk-lsilogic": ("vmdk", "vmdk", "adapter_type=lsilogic,hwversion=13"),
    "vmdk-zeroed-grain": ("vmdk", "vmdk", "zeroed_grain=on"),
    "vdi": ("vdi", "vdi", ""),
    "vdi-static": ("vdi", "vdi", "static=on"),
    "vhd-dynamic": ("vpc", "vhd", "subformat=dynamic"),
    "vhd-dynamic-force": ("vpc", "vhd", "subformat=dynamic,force_size=on"),
    "vhd-fixed": ("vpc", "vhd", "subformat=fixed"),
    "vhd-fixed-force": ("vpc", "vhd", "subformat=fixed,force_size=on"),
    "vhdx-dynamic": ("vhdx", "vhdx", "subformat=dynamic"),
    "vhdx-fixed": ("vhdx", "vhdx", "subformat=fixed"),
    "vhdx-block": ("vhdx", "vhdx", "block_size=32M,log_size=2M"),
    "parallels": ("parallels", "ploop", ""),
    "raw": ("raw", "raw", ""),
}
REFUSED = {
    "vmdk-flat": ("vmdk", "vmdk", "subformat=monolithicFlat"),
    "vmdk-split-flat": ("vmdk", "vmdk", "subformat=twoGbMaxExtentFlat"),
    "vmdk-split-sparse": ("vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
    "qcow2-data-file": ("qcow2", "qcow2", "data_file=elsewhere.raw"),
    "qed": ("qed", "qed", ""),
    "qcow1": ("qcow", "qcow2", ""),
}


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "full"])
@pytest.mark.parametrize("name", QEMU)
def test_qemu_img(name: str, empty: bool, disk: Path) -> None:
    oracles.need("qemu-img")
    kind, declared, options = QEMU[name]
    path = disk.with_name("image")
    extra = ["-o", options] if options else []
    if empty:
        run("qemu-img", "create", "-f", kind, *extra, path, str(SIZE))
    else:
        run("qemu-img", "convert", "-f", "raw", "-O", kind, *extra, disk, path)
    told = oracles.qemu(path, kind)
    accepted(path, declared, size=told.virtual_size)
    if declared != "raw":
        for other in ("raw", "iso", "qcow2", "vmdk"):
            if other != declared:
                assert not inspect_file(path, disk_format=other).accepted, other


@pytest.mark.parametrize("name", ["zlib", "zstd", "vmdk"])
def test_compressed_clusters(name: str, disk: Path) -> None:
    oracles.need("qemu-img")
    path = disk.with_name("image")
    kind = "vmdk" if name == "vmdk" else "qcow2"
    options = ["-o", "subformat=streamOptimized" if name == "vmdk" else f"compression_type={name}"]
    run("qemu-img", "convert", *(["-c"] if kind == "qcow2" else []), "-O", kind, *options, disk, path)
    accepted(path, kind, size=SIZE)


@pytest.mark.parametrize("name", REFUSED)
def test_qemu_img_kinds_that_are_refused(name: str, tmp_path: Path) -> None:
    oracles.need("qemu-img")
    kind, declared, options = REFUSED[name]
    path = tmp_path / "image"
    run("qemu-img", "create", "-f", kind, *(["-o", options] if options else []), path, str(SIZE), cwd=tmp_path)
    assert not inspect_file(path, disk_format=declared).accepted
    assert not inspect_file(path, disk_format="raw").accepted


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "qed"])
def test_an_overlay_is_refused(format: str, tmp_path: Path) -> None:
    oracles.need("qemu-img")
    base, path = tmp_path / "base", tmp_path / "image"
    run("qemu-img", "create", "-f", format, base, str(SIZE))
    run("qemu-img", "create", "-f", format, "-b", base, "-F", format, path)
    inspection = inspect_file(path, disk_format=format)
    assert any(each.severity == "unsafe" for each in inspection.findings)


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vpc", "vmdk"])
def test_an_image_inside_an_image_is_refused(format: str, tmp_path: Path) -> None:
    oracles.need("qemu-img")
    inner, path = tmp_path / "inner", tmp_path / "image"
    run("qemu-img", "create", "-f", "qcow2", inner, "64M")
    run("qemu-img", "convert", "-f", "raw", "-O", format, inner, path)
    inspection = inspect_file(path, disk_format={"vpc": "vhd"}.get(format, format))
    assert "guest.image" in {each.code for each in inspection.findings}


def test_encrypted_by_qemu(tmp_path: Path) -> None:
    oracles.need("qemu-img")
    for kind, options in (("luks", ""), ("qcow2", "encrypt.format=luks,encrypt.")):
        path = tmp_path / kind
        secret = ("--object", "secret,id=s,data=secret")
        fast = f"{options}key-secret=s,{options}iter-time=10"
        run("qemu-img", "create", *secret, "-f", kind, "-o", fast, path, str(SIZE))
        accepted(path, kind, size=SIZE)
        strict = Policy(overrides={f"{kind}.encrypted": "refuse"})
        assert not inspect_file(path, disk_format=kind, policy=strict).accepted


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_cryptsetup(version: str, tmp_path: Path) -> None:
    oracles.need("cryptsetup")
    path = tmp_path / "image"
    path.write_bytes(bytes(32 << 20))
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    run("cryptsetup", "luksFormat", "-q", "--type", version, *fast, path, "-", input=b"secret")
    accepted(path, "luks")
    inspection = inspect_file(path, disk_format="luks")
    assert inspection.virtual_size is not None
    assert 0 < inspection.virtual_size < 32 << 20
    # To readers that probe, LUKS 2 is raw.
    assert inspect_file(path, disk_format="raw").accepted == (version == "luks2")


FILESYSTEMS = {
    "ext2": ("mkfs.ext2", "-q", "-F"),
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "fat12": ("mkfs.fat", "-F", "12"),
    "fat16": ("mkfs.fat", "-F", "16"),
    "fat32": ("mkfs.fat", "-F", "32"),
    "ntfs": ("mkfs.ntfs", "-q", "-F", "-f"),
    "exfat": ("mkfs.exfat",),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
    "swap": ("mkswap",),
}


@pytest.mark.parametrize("name", FILESYSTEMS)
def test_filesystems(name: str, tmp_path: Path) -> None:
    tool, *options = FILESYSTEMS[name]
    oracles.need(tool)
    path = tmp_path / "image"
    size = 320 << 20 if name in {"xfs", "btrfs"} else 48 << 20 if name in {"fat16", "fat32"} else SIZE
    with path.open("wb") as file:
        file.truncate(size)
    run(tool, *options, path)
    for declared in ("raw", "ami"):
        accepted(path, declared, size=size)
    found = inspect_file(path).formats
    assert {"ext2": "ext", "ext4": "ext"}.get(name, name.rstrip("1236")) in found


def test_squashfs(tmp_path: Path) -> None:
    oracles.need("mksquashfs")
    (tmp_path / "tree").mkdir()
    run("mksquashfs", tmp_path / "tree", tmp_path / "image", "-quiet")
    accepted(tmp_path / "image", "raw")
    accepted(tmp_path / "image", "ari")


TABLES = {
    "sgdisk": ("sgdisk", "-n", "1:2048:4095", "-n", "2:4096:0"),
    "sgdisk-hybrid": ("sgdisk", "-n", "1:2048:4095", "-h", "1"),
    "parted": ("parted", "-s", "IMAGE", "mklabel", "gpt", "mkpart", "a", "1MiB", "3MiB"),
    "parted-msdos": ("parted", "-s", "IMAGE", "mklabel", "msdos", "mkpart", "primary", "1MiB", "3MiB"),
}


@pytest.mark.parametrize("name", TABLES)
def test_partition_tables(name: str, tmp_path: Path) -> None:
    command = TABLES[name]
    oracles.need(command[0])
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    if "IMAGE" in command:
        run(*(str(path) if each == "IMAGE" else each for each in command))
    else:
        run(*command, path)
    accepted(path, "raw", size=SIZE)
    assert inspect_file(path, disk_format="gpt").accepted == (name != "parted-msdos")


@pytest.mark.parametrize("script", ["label: gpt\n,2M\n,\n", "label: dos\n,2M\n,\n"], ids=["gpt", "dos"])
def test_sfdisk(script: str, tmp_path: Path) -> None:
    oracles.need("sfdisk")
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    run("sfdisk", "-q", path, input=script.encode())
    accepted(path, "gpt" if "gpt" in script else "raw", size=SIZE)


ISOS = {
    "genisoimage": ("genisoimage", "-quiet"),
    "genisoimage-rock-joliet": ("genisoimage", "-quiet", "-R", "-J"),
    "genisoimage-udf": ("genisoimage", "-quiet", "-udf"),
    "xorriso": ("xorriso", "-as", "mkisofs", "-quiet", "-R", "-J"),
    "xorriso-level3": ("xorriso", "-as", "mkisofs", "-quiet", "-iso-level", "4"),
    "xorriso-gpt": ("xorriso", "-as", "mkisofs", "-quiet", "-append_partition", "2", "0xef", "TREE/a"),
    "xorriso-gpt-appended": (
        "xorriso", "-as", "mkisofs", "-quiet", "-append_partition", "2", "0xef", "TREE/a", "-appended_part_as_gpt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ISOS)
def test_isos(name: str, tmp_path: Path) -> None:
    oracles.need(ISOS[name][0])
    tree, path = tmp_path / "tree", tmp_path / "image"
    tree.mkdir()
    (tree / "a").write_bytes(os.urandom(1 << 20))
    run(*(each.replace("TREE", str(tree)) for each in ISOS[name]), "-o", path, tree)
    inspection = inspect_file(path, disk_format="iso")
    assert inspection.accepted, inspection.findings
    assert inspection.disk_format == "iso"
    assert not inspect_file(path, disk_format="qcow2").accepted


@pytest.mark.parametrize("block", ["512", "2048"])
def test_mkudffs(block: str, tmp_path: Path) -> None:
    oracles.need("mkudffs")
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    media = "hd" if block == "512" else "dvdram"
    run("mkudffs", f"--media-type={media}", f"--blocksize={block}", path)
    accepted(path, "iso")


PACKERS = {
    "gzip": ("gzip", "-c"),
    "gzip-fast": ("gzip", "-1", "-c"),
    "bzip2": ("bzip2", "-c"),
    "xz": ("xz", "-c"),
    "xz-9e": ("xz", "-9e", "-c"),
    "lzma": ("lzma", "-c"),
    "zstd": ("zstd", "-q", "-c"),
    "lz4": ("lz4", "-q", "-c"),
    "lzop": ("lzop", "-c"),
}


@pytest.mark.parametrize("name", PACKERS)
def test_packers(name: str, disk: Path) -> None:
    oracles.need(PACKERS[name][0], "qemu-img")
    image = disk.with_name("image.qcow2")
    run("qemu-img", "convert", "-O", "qcow2", disk, image)
    packed = disk.with_name("packed")
    done = subprocess.run([*PACKERS[name], str(image)], capture_output=True, check=True)
    packed.write_bytes(done.stdout)
    inspection = inspect_file(packed, disk_format="qcow2", container_format="compressed")
    assert inspection.accepted, inspection.findings
    looked = inspection.verified != "opaque"
    assert looked or name in {"zstd", "lz4", "lzop"}
    if looked:
        assert inspection.virtual_size == SIZE
        assert not inspect_file(packed, disk_format="vmdk", container_format="compressed").accepted
    assert not inspect_file(packed, disk_format="raw").accepted
    accepted(packed, "ari")


def test_cpio(tmp_path: Path) -> None:
    oracles.need("cpio")
    (tmp_path / "init").write_bytes(b"#!/bin/sh\n")
    for kind in ("newc", "crc", "odc"):
        done = subprocess.run(["cpio", "-o", "-H", kind, "--quiet"], input=b"init\n", cwd=tmp_path, capture_output=True)
        path = tmp_path / kind
        path.write_bytes(done.stdout)
        accepted(path, "ari")
        path.write_bytes(done.stdout + gzip.compress(done.stdout))
        accepted(path, "ari")


# Whole kernels and boot media, where a system has them.
REAL = {
    "/usr/lib/ipxe/ipxe.lkrn": "aki",
    "/usr/lib/ipxe/ipxe.iso": "iso",
    "/boot/memtest86+x64.bin": "aki",
    "/boot/memtest86+x64.efi": "aki",
    "/boot/memtest86+ia32.bin": "aki",
    **{str(kernel): "aki" for kernel in Path("/boot").glob("vmlinuz*")},
}


@pytest.mark.parametrize("path", REAL)
def test_real_boot_files(path: str) -> None:
    if not Path(path).exists():
        oracles.missing(path)
    inspection = inspect_file(path, disk_format=REAL[path])
    assert inspection.accepted, inspection.findings
