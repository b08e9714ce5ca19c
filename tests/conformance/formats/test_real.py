"""Whole kernels, ramdisks and boot media out of Debian's packages: accepted under what they are.

The packages are downloaded once, some 110 MB, and unpacked, never installed: into a folder of the user's cache, which
later runs use again. Names with an architecture are those of other machines; what is downloaded runs nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from formats import oracles

from imagestore.formats import Policy, inspect_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagestore-tests" / "boot-files"
PATIENCE = 300

# Package (a release of Debian for %s), and what its files are; at least one of each pattern must be there.
PACKAGES = {
    "linux-image-cloud-amd64:amd64": {"boot/vmlinuz-*": "aki"},
    "linux-image-cloud-arm64:arm64": {"boot/vmlinuz-*": "aki"},
    "debian-installer-%s-netboot-armhf:amd64": {
        "usr/lib/debian-installer/**/vmlinuz": "aki",
        "usr/lib/debian-installer/**/initrd.gz": "ari",
    },
    "grub-rescue-pc:amd64": {
        "usr/lib/grub-rescue/grub-rescue-cdrom.iso": "iso",
        "usr/lib/grub-rescue/grub-rescue-floppy.img": "raw",
    },
    "ipxe:amd64": {"boot/ipxe.lkrn": "aki", "usr/lib/ipxe/ipxe.iso": "iso", "boot/ipxe.efi": "aki"},
    "memtest86+:amd64": {"boot/memtest86+*.bin": "aki", "boot/memtest86+*.efi": "aki", "usr/**/memtest86+*.iso": "iso"},
    "u-boot-qemu:amd64": {"usr/lib/u-boot/*/uboot.elf": "aki", "usr/lib/u-boot/*/u-boot.bin": "raw"},
    "xen-system-amd64:amd64": {"boot/xen-*.gz": "aki", "boot/xen-*.efi": "aki"},
    "systemd-boot-efi:amd64": {"usr/lib/systemd/boot/efi/*.efi": "aki", "usr/lib/systemd/boot/efi/*.elf.stub": "aki"},
}


def _apt(*command: str) -> str:
    """apt with lists of its own, of two architectures, so that the system's are neither needed nor changed."""
    for folder in ("lists/partial", "archives/partial"):
        (CACHE / folder).mkdir(parents=True, exist_ok=True)
    (CACHE / "status").touch()
    options = {
        "APT::Architecture": "amd64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Dir::State": str(CACHE),
        "Dir::State::lists": str(CACHE / "lists"),
        "Dir::State::status": str(CACHE / "status"),
        "Dir::Cache": str(CACHE),
    }
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    done = subprocess.run(
        [*command[:1], *given, *command[1:]], cwd=CACHE, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode:
        oracles.missing(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _real(packages: list[str]) -> dict[str, str]:
    """The names with the version of the system in them; of packages that only name the newest one, that one."""
    found = re.search(r'^VERSION_ID="?(\d+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    names = {package: package.replace("%s", found[1] if found else "12") for package in packages}
    naming = {package: name for package, name in names.items() if name.startswith(("linux-image", "xen-system"))}
    if naming:
        told = _apt("apt-cache", "depends", *naming.values())
        newest = re.findall(r"^ +Depends: ((?:linux-image|xen-hypervisor-\d)\S+)", told, re.MULTILINE)
        assert len(newest) == len(naming), told
        names |= zip(naming, newest, strict=True)
    return names


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of each package are, by its name here."""
    oracles.need("apt-get", "apt-cache", "dpkg-deb")
    absent = [
        package
        for package, patterns in PACKAGES.items()
        if not all(any((CACHE / package).glob(pattern)) for pattern in patterns)
    ]
    if absent:
        _apt("apt-get", "update", "-q")
        names = _real(absent)
        _apt("apt-get", "download", "-q", *names.values())
        for package, name in names.items():
            whole = tmp_path_factory.mktemp("package")
            (file,) = CACHE.glob(f"{name.partition(':')[0]}_*.deb")
            subprocess.run(["dpkg-deb", "-x", file, whole], check=True, timeout=PATIENCE)
            part = CACHE / "part"
            shutil.rmtree(part, ignore_errors=True)
            for path in (path for pattern in PACKAGES[package] for path in whole.glob(pattern)):
                if path.is_file() and not path.is_symlink():
                    (part / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, part / path.relative_to(whole))
            shutil.rmtree(CACHE / package, ignore_errors=True)
            part.rename(CACHE / package)
            shutil.rmtree(whole)
            file.unlink()
        shutil.rmtree(CACHE / "lists")
    return CACHE


@pytest.mark.parametrize("package", PACKAGES)
def test_boot_files(package: str, folder: Path) -> None:
    for pattern, disk in PACKAGES[package].items():
        paths = list((folder / package).glob(pattern))
        assert paths, pattern
        for path in paths:
            inspection = inspect_file(path, disk_format=disk)
            assert inspection.accepted, (path, inspection.findings)
            told = {each.code for each in inspection.findings}
            assert told <= {"aki.pe_only", "mbr.partition", "raw.iso"}, (path, told)
            assert inspect_file(path).accepted, path
            for other in ("qcow2", "vmdk", "vhd", "luks"):
                assert not inspect_file(path, disk_format=other).accepted, (path, other)


def test_what_is_cut_is_refused(folder: Path, tmp_path: Path) -> None:
    for package, pattern, disk, code in (
        ("linux-image-cloud-amd64:amd64", "boot/vmlinuz-*", "aki", "aki.truncated"),
        ("grub-rescue-pc:amd64", "**/*.iso", "iso", "iso.truncated"),
    ):
        whole = next((folder / package).glob(pattern)).read_bytes()
        path = tmp_path / "cut"
        path.write_bytes(whole[: len(whole) // 2])
        assert code in {each.code for each in inspect_file(path, disk_format=disk).findings}


def test_an_installers_ramdisk_unpacks(folder: Path) -> None:
    path = next((folder / "debian-installer-%s-netboot-armhf:amd64").glob("usr/lib/debian-installer/**/initrd.gz"))
    inspection = inspect_file(path, disk_format="ari", container_format="compressed", policy=Policy(max_ratio=1000))
    assert inspection.accepted, inspection.findings
    assert inspection.members[0].formats == ("cpio",)
    assert inspection.verified == "full"
