"""What image data is: disk formats and containers, recognised and checked while the bytes stream.

`Inspector` looks at an image as it passes and gives an `Inspection`; a `Policy` says which findings refuse it.
`FINDINGS` is the table of all that may be found. `inspect_stream` and `inspect_file` do it in one call. ::

    inspector = Inspector(disk_format="qcow2", container_format="bare")
    for chunk in source:
        inspector.feed(chunk)
        if inspector.refusal is not None:
            raise inspector.refusal  # as soon as it is certain
    inspection = inspector.finish()
    if inspector.refusal is not None:
        raise inspector.refusal
"""

from imagestore.formats._findings import FINDINGS, Finding, FindingKind, Inspection, Severity, Verified
from imagestore.formats._inspector import Inspector, inspect_file, inspect_stream
from imagestore.formats._names import CONTAINER_FORMATS, DISK_FORMATS
from imagestore.formats._policy import Policy

__all__ = [
    "CONTAINER_FORMATS",
    "DISK_FORMATS",
    "FINDINGS",
    "Finding",
    "FindingKind",
    "Inspection",
    "Inspector",
    "Policy",
    "Severity",
    "Verified",
    "inspect_file",
    "inspect_stream",
]
