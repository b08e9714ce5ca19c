"""Puts virtual-machine images into any storage, whole and verified, and gets them back.

`open_store` makes a `Store` from keyword arguments, `load_stores` makes `Stores` from configuration files. Drivers
are written against `imagestore.driver` and proved with `imagestore.testing`.

Names are imported when they are first used, so that ``import imagestore`` costs next to nothing.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as type checkers have it, without the cost of importing typing

if TYPE_CHECKING:
    from imagestore._models import (
        AbortFailed,
        AddedToMany,
        AddResult,
        BlockStored,
        CommitStarted,
        Event,
        Leftover,
        Limits,
        Location,
        Observer,
        Progress,
        Retried,
        Retry,
        Stat,
        StoredImage,
        Timeouts,
        TransferEnded,
        TransferStarted,
        Usage,
        Verifier,
        VerifyResult,
    )
    from imagestore._reader import ImageReader
    from imagestore._store import Store
    from imagestore._stores import Stores
    from imagestore.config import load_stores, open_store
    from imagestore.errors import (
        AccessError,
        AlreadyExists,
        Cancelled,
        CapacityError,
        Changed,
        ConfigurationError,
        DigestMismatch,
        DriverNotFound,
        FormatError,
        FormatMismatch,
        IllegalTransition,
        IntegrityError,
        InUse,
        InvalidImageId,
        InvalidLocation,
        InvalidOption,
        InvalidRequest,
        LimitExceeded,
        MissingDependency,
        NotFound,
        PermissionDenied,
        Protected,
        RateLimited,
        SignatureMismatch,
        SizeMismatch,
        SourceError,
        StoreError,
        StoreFull,
        StoreTimeout,
        Unauthenticated,
        Unavailable,
        UnsafeImage,
        Unsupported,
        WrongStatus,
    )

    __version__: str

__all__ = [
    "AbortFailed",
    "AccessError",
    "AddResult",
    "AddedToMany",
    "AlreadyExists",
    "BlockStored",
    "Cancelled",
    "CapacityError",
    "Changed",
    "CommitStarted",
    "ConfigurationError",
    "DigestMismatch",
    "DriverNotFound",
    "Event",
    "FormatError",
    "FormatMismatch",
    "IllegalTransition",
    "ImageReader",
    "InUse",
    "IntegrityError",
    "InvalidImageId",
    "InvalidLocation",
    "InvalidOption",
    "InvalidRequest",
    "Leftover",
    "LimitExceeded",
    "Limits",
    "Location",
    "MissingDependency",
    "NotFound",
    "Observer",
    "PermissionDenied",
    "Progress",
    "Protected",
    "RateLimited",
    "Retried",
    "Retry",
    "SignatureMismatch",
    "SizeMismatch",
    "SourceError",
    "Stat",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreTimeout",
    "StoredImage",
    "Stores",
    "Timeouts",
    "TransferEnded",
    "TransferStarted",
    "Unauthenticated",
    "Unavailable",
    "UnsafeImage",
    "Unsupported",
    "Usage",
    "Verifier",
    "VerifyResult",
    "WrongStatus",
    "__version__",
    "load_stores",
    "open_store",
]

_HOMES = {
    "imagestore._models": (
        "AbortFailed",
        "AddResult",
        "AddedToMany",
        "BlockStored",
        "CommitStarted",
        "Event",
        "Leftover",
        "Limits",
        "Location",
        "Observer",
        "Progress",
        "Retried",
        "Retry",
        "Stat",
        "StoredImage",
        "Timeouts",
        "TransferEnded",
        "TransferStarted",
        "Usage",
        "Verifier",
        "VerifyResult",
    ),
    "imagestore._reader": ("ImageReader",),
    "imagestore._store": ("Store",),
    "imagestore._stores": ("Stores",),
    "imagestore.config": ("load_stores", "open_store"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


# Type checkers must not see it: to them every name would be there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value = version("imagestore")
        elif name in __all__:
            # What has no other home is an error.
            value = getattr(importlib.import_module(_HOME.get(name, "imagestore.errors")), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
