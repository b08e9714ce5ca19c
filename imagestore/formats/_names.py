"""Names of formats: what a host may declare, and what contents are found to be."""

from __future__ import annotations

from typing import Final

__all__ = ["COMPRESSED", "CONTAINER_FORMATS", "DISK_FORMATS", "FILESYSTEMS", "PROBED"]

DISK_FORMATS: Final = (
    "aki", "ami", "ari", "gpt", "iso", "luks", "ploop", "qcow2", "qed", "raw", "vdi", "vhd", "vhdx", "vmdk",
)  # fmt: skip
"""What a disk format may be declared as."""

CONTAINER_FORMATS: Final = ("aki", "ami", "ari", "bare", "compressed", "docker", "ova", "ovf")
"""What a container format may be declared as."""

PROBED: Final = frozenset(
    {"qcow2", "qcow", "vmdk", "vhd", "vhdx", "vdi", "qed", "ploop", "luks", "bochs", "cloop", "dmg"}
)
"""What a hypervisor may take for something else than a raw disk when nobody tells it the format."""

FILESYSTEMS: Final = frozenset(
    {"ext", "fat", "ntfs", "exfat", "xfs", "btrfs", "squashfs", "swap", "lvm2", "cramfs", "romfs"}
)

COMPRESSED: Final = frozenset({"gzip", "bzip2", "xz", "lzma", "zstd", "lz4", "lzop", "zip", "7z", "lha", "compress"})
