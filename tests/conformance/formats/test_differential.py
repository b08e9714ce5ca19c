"""Other readers as oracles: where they and we differ, the difference is in `KNOWN`, with its reason.

Compared are: what is found; whether we accept what another reader refuses; and the virtual size of what we accept.
That we refuse what another reader opens is no disagreement: we are asked for more than to open it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from formats import oracles
from formats.samples import Sample, run, samples

PROBED = {"qcow2", "qcow", "vmdk", "vhd", "vhdx", "vdi", "qed", "ploop", "luks"}
BARE = {"bare", "aki", "ari", "ami"}

_ONE_TABLE = "refuses gpt: it takes every boot signature for a table of partitions; to us a file system is one"
_GUEST_TABLE = "finds gpt: it looks at the guest's table at the start, we also at the footer at the end"

KNOWN: dict[str, dict[str, str]] = {
    "qemu": {
        "hostile/l04-version-7.luks": "finds raw: it goes by magic and version together, we by the magic",
    },
    "oslo": {
        "good/fat12-floppy.img": _ONE_TABLE,
        "good/fat16-onefat.img": _ONE_TABLE,
        "good/ntfs.img": _ONE_TABLE,
        "good/raw-exfat-vbr.img": _ONE_TABLE,
        "good/raw-mbr-empty.img": _ONE_TABLE,
        "good/raw-ntfs-vbr.img": _ONE_TABLE,
        "good/qcow2-extl2.qcow2": "refuses qcow2: it allows fewer feature bits; subclusters are a policy of ours",
        "good/qcow2-v2-ext-at-72.qcow2": "refuses qcow2: it reads version 3 fields; version 2 has extensions there",
        "good/raw-gpt-chs-000100.img": "refuses gpt: it demands one address of the protective entry; writers differ",
        "good/raw-gpt-chs-ffffff.img": "refuses gpt: it demands one address of the protective entry; writers differ",
        "good/raw-gpt-hybrid-mbr.img": "refuses gpt: it allows no hybrid table; to us that is a policy",
        "good/raw-utf8.txt": "refuses None: it expects a descriptor to be ASCII; to us this is text without a keyword",
        "good/vhd-fixed-511.vhd": _GUEST_TABLE,
        "good/vhd-fixed-force.vhd": _GUEST_TABLE,
        "good/vhd-fixed-handmade.vhd": _GUEST_TABLE,
        "good/vhd-fixed.vhd": _GUEST_TABLE,
    },
}


def against_qemu(sample: Sample, path: Path) -> str | None:
    told = oracles.qemu(path)
    inspection, _ = run(sample.data, sample.disk, sample.container)
    ours = set(inspection.formats) & PROBED
    if not sample.data.startswith(b"conectix"):
        ours.discard("vhd")  # not probed: only its end tells a fixed disk
    if told.format is None:
        return "refuses" if inspection.accepted and sample.container in BARE else None
    if told.format not in (ours or {"raw"}):
        return f"finds {told.format}"
    if inspection.accepted and sample.container in BARE and sample.disk != "vhd":
        return None if told.virtual_size == inspection.virtual_size else f"shows {told.virtual_size} bytes"
    return None


def against_oslo(sample: Sample, path: Path) -> str | None:
    if sample.container not in BARE:
        return None
    told = oracles.oslo(path)
    inspection, _ = run(sample.data, sample.disk, sample.container)
    # It has one name for both kinds of partition table, and none for most that we know.
    ours = {"gpt" if name == "mbr" else name for name in inspection.formats}
    ours &= {"qcow2", "vmdk", "vhd", "vhdx", "vdi", "qed", "luks", "iso", "gpt"}
    if told.refused is not None:
        return f"refuses {told.format}" if inspection.accepted else None
    if not inspection.accepted:
        return None
    if told.format != ("+".join(sorted(ours)) or "raw"):
        return f"finds {told.format}"
    if inspection.disk_format in PROBED - {"ploop"} and told.virtual_size != inspection.virtual_size:
        return f"shows {told.virtual_size} bytes"
    return None


ORACLES: dict[str, Callable[[Sample, Path], str | None]] = {"qemu": against_qemu, "oslo": against_oslo}


@pytest.mark.parametrize("oracle", ORACLES)
def test_samples(oracle: str, tmp_path: Path) -> None:
    if oracle == "qemu":
        oracles.need("qemu-img")
    else:
        try:
            importlib.import_module("oslo_utils.imageutils.format_inspector")
        except ImportError:
            oracles.missing("oslo.utils[image-inspection]")
    path = tmp_path / "image"
    found = {}
    for sample in samples():
        path.write_bytes(sample.data)
        difference = ORACLES[oracle](sample, path)
        if difference is not None:
            found[sample.name] = difference
    known = {name: text.partition(": ")[0] for name, text in KNOWN[oracle].items()}
    assert found == known, "a new disagreement, or one that is gone"
