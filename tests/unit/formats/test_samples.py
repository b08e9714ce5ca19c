"""Every sample gets its verdict, for the right reason, however the stream is cut."""

from __future__ import annotations

import pytest
from formats.samples import Sample, fatal, run, samples

from imagestore.formats import FINDINGS

SAMPLES = samples()
BARE = frozenset({"bare", "aki", "ari", "ami"})

# Samples whose verdict is "policy": what the default policy says.
POLICY = {
    "good/docker-export-rootfs.tar": None,
    "good/docker-layer-gz.tar": None,
    "good/luks1.luks": None,
    "good/ova-chunked.ova": None,
    "good/ova-gzip-disk.ova": None,
    "good/ova-pax.ova": None,
    "good/qcow1.qcow": "qcow.version1",
    "good/qcow2-aes.qcow2": "qcow2.aes",
    "good/qcow2-extl2.qcow2": None,
    "good/qcow2-luks.qcow2": None,
    "good/qcow2-snapshot.qcow2": None,
    "good/qed.qed": "qed.found",
    "good/raw-gpt-hybrid-mbr.img": None,
    "hostile/q30-dirty-bit.qcow2": "qcow2.dirty",
    "hostile/x04-log-guid.vhdx": "vhdx.log",
}

# A code that must be among the reasons.
REASONS = {
    "e01": "qed.backing_file",
    "d03": "vdi.parent",
    "d04": "vdi.size",
    "d05": "vdi.blocks",
    "d06": "vdi.size",
    "d08": "vdi.blocks",
    "g01": "gpt.header",
    "g03": "gpt.entries",
    "g05": "format.polyglot",
    "i02": "format.polyglot",
    "i06": "iso.descriptor",
    "i07": "format.polyglot",
    "k01": "docker.path",
    "k03": "docker.digest",
    "k04": "tar.name",
    "k05": "docker.urls",
    "k09": "ova.polyglot",
    "l01": "luks.iterations",
    "l03": "luks.keyslot",
    "l04": "luks.version",
    "m02": "vmdk.text_descriptor",
    "m03": "vmdk.capacity_zero",
    "m15": "vmdk.cowd",
    "m16": "vmdk.version",
    "m18": "vmdk.header",
    "m20": "vmdk.capacity",
    "m21": "vmdk.capacity",
    "m23": "vmdk.create_type",
    "m24": "vmdk.create_type",
    "m25": "vmdk.create_type",
    "m26": "vmdk.create_type",
    "m27": "vmdk.create_type",
    "m28": "vmdk.create_type",
    "m30": "vmdk.capacity",
    "m33": "vmdk.footer",
    "m34": "vmdk.footer_differs",
    "m35": "vmdk.footer",
    "m37": "vmdk.embedded_text",
    "o01": "ova.order",
    "o03": "tar.name",
    "o04": "tar.link",
    "o05": "tar.link",
    "o07": "ova.digest",
    "o09": "tar.duplicate",
    "o10": "ovf.doctype",
    "o11": "ovf.doctype",
    "o13": "ova.href",
    "o14": "ova.href",
    "o15": "ova.href",
    "o17": "qcow2.backing_file",
    "o18": "ova.capacity",
    "o19": "ova.parent",
    "o20": "tar.header",
    "o21": "tar.header",
    "o23": "tar.override",
    "o25": "tar.truncated",
    "o26": "tar.too_many",
    "o27": "ovf.too_large",
    "p01": "ploop.header",
    "p02": "ploop.tables",
    "p04": "ploop.descriptor",
    "q02": "qcow2.backing_file",
    "q03": "qcow2.backing_file",
    "q04": "qcow2.backing_file",
    "q07": "qcow2.data_file",
    "q08": "qcow2.data_file",
    "q12": "qcow2.cluster_size",
    "q13": "qcow2.cluster_size",
    "q14": "qcow2.tables",
    "q15": "qcow2.tables",
    "q17": "qcow2.tables",
    "q18": "qcow2.size",
    "q19": "qcow2.size",
    "q21": "qcow2.tables",
    "q23": "qcow2.header",
    "q24": "qcow2.header",
    "q25": "qcow2.extension",
    "q26": "qcow2.header",
    "q27": "qcow2.compression",
    "q28": "qcow2.compression",
    "q32": "qcow2.version",
    "q35": "qcow2.header",
    "q36": "qcow2.tables",
    "q37": "qcow.backing_file",
    "q38": "guest.image",
    "r01": "format.disguised",
    "r02": "format.disguised",
    "v01": "vhd.parent",
    "v02": "vhd.parent",
    "v03": "format.polyglot",
    "v04": "vhd.checksum",
    "v07": "vhd.dynamic_header",
    "v08": "vhd.original_size",
    "v09": "vhd.geometry",
    "v10": "vhd.dynamic_header",
    "v12": "vhd.footer_not_last",
    "x01": "vhdx.parent",
    "x02": "vhdx.parent",
    "x03": "vhdx.header",
    "x05": "vhdx.tables_differ",
    "x06": "vhdx.metadata",
    "x08": "vhdx.size",
    "x09": "vhdx.size",
    "x10": "vhdx.regions",
    "x12": "vhdx.metadata",
    "z01": "qcow2.backing_file",
    "z02": "compressed.bomb",
    "z03": "compressed.bomb",
    "z04": "compressed.nested",
    "z05": "compressed.trailing",
    "z08": "compressed.memory",
    "z09": "compressed.truncated",
    "z10": "compressed.corrupt",
    "z11": "raw.compressed",
}


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_verdict(sample: Sample) -> None:
    inspection, refusal = run(sample.data, sample.disk, sample.container)
    reasons = fatal(inspection)
    assert "parser.failed" not in reasons
    if sample.verdict == "safe":
        assert inspection.accepted, (sample.why, inspection.findings)
    elif sample.verdict == "policy":
        wanted = POLICY[sample.name]
        assert inspection.accepted == (wanted is None)
        assert wanted is None or wanted in reasons
    else:
        assert not inspection.accepted, sample.why
        assert REASONS.get(sample.name.partition("/")[2][:3], next(iter(reasons))) in reasons
    assert (refusal == "None") == inspection.accepted
    assert all(each.code in FINDINGS for each in inspection.findings)


@pytest.mark.parametrize(
    "sample",
    [
        each
        for each in SAMPLES
        if each.verdict in {"safe", "policy"} and each.container in BARE and each.virtual_size is not None
    ],
    ids=str,
)
def test_virtual_size_is_what_qemu_shows(sample: Sample) -> None:
    inspection, _ = run(sample.data, sample.disk, sample.container)
    assert inspection.virtual_size == sample.virtual_size
    assert inspection.size == len(sample.data)


def test_every_hostile_sample_has_its_reason() -> None:
    hostile = {each.name.partition("/")[2][:3] for each in SAMPLES if each.name.startswith("hostile/")}
    told = REASONS.keys() | {name.partition("/")[2][:3] for name in POLICY} | {"r03"}
    assert hostile <= told
    assert REASONS.keys() <= hostile


@pytest.mark.parametrize("size", [1, 7, 511, 512, 4096, 65536, 1 << 20])
def test_chunks_make_no_difference(size: int) -> None:
    # A call for every few bytes costs: the smallest sizes take the smaller samples, and two large ones stand for all.
    largest = {1: 20_000, 7: 100_000, 511: 1_100_000, 512: 1_100_000}.get(size, 5_000_000)
    also = {"good/vhdx-dynamic.vhdx", "hostile/x02-locator-no-flag.vhdx"} if size > 7 else set()
    for sample in SAMPLES:
        if sample.size <= largest or sample.name in also:
            data = sample.data
            for disk, container in ((sample.disk, sample.container), (None, None)):
                whole = run(data, disk, container)
                assert run(data, disk, container, size) == whole, sample.name
