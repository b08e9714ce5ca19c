"""Every failure of imagestore, in one tree.

::

    StoreError                      .store .driver .operation .location .temporary .retry_after .attempts
    ├─ ConfigurationError           the configuration is wrong
    │  ├─ InvalidOption             an option is unknown, missing or has a value that it can't have
    │  ├─ DriverNotFound            no driver of that name, or two
    │  └─ MissingDependency         the driver's library is not installed
    ├─ InvalidRequest               the call is wrong
    │  ├─ InvalidLocation           not a location that this store serves
    │  ├─ InvalidImageId            not an id that this store can keep
    │  ├─ Unsupported               this store can't do that
    │  ├─ WrongStatus               the image's status does not allow that
    │  │  └─ IllegalTransition      no image goes from this status to that one
    │  └─ Protected                 the image is protected from deletion
    ├─ NotFound                     no such image
    ├─ AlreadyExists                the id is taken
    ├─ InUse                        something else still needs the image
    ├─ Changed                      the image was replaced while it was read
    ├─ Cancelled                    the caller cancelled
    ├─ AccessError                  the backend refused us
    │  ├─ Unauthenticated           it does not know who we are
    │  └─ PermissionDenied          it knows, and says no
    ├─ CapacityError
    │  ├─ StoreFull                 the backend has no room
    │  └─ LimitExceeded             the image is larger than a configured or a technical limit
    ├─ Unavailable                  (temporary) the backend can't be reached or fails
    │  ├─ RateLimited               (temporary) it asks us to slow down
    │  └─ StoreTimeout              (temporary) it stopped answering
    ├─ IntegrityError               the bytes are not what they should be
    │  ├─ SizeMismatch
    │  ├─ DigestMismatch
    │  └─ SignatureMismatch
    ├─ FormatError                  the image is not what it was declared to be
    │  ├─ FormatMismatch
    │  └─ UnsafeImage
    └─ SourceError                  the stream you gave failed, the store did not

The error of the backend's own library, if there is one, is the ``__cause__``.
"""

from __future__ import annotations

import re
from typing import ClassVar

__all__ = [
    "AccessError",
    "AlreadyExists",
    "Cancelled",
    "CapacityError",
    "Changed",
    "ConfigurationError",
    "DigestMismatch",
    "DriverNotFound",
    "FormatError",
    "FormatMismatch",
    "IllegalTransition",
    "InUse",
    "IntegrityError",
    "InvalidImageId",
    "InvalidLocation",
    "InvalidOption",
    "InvalidRequest",
    "LimitExceeded",
    "MissingDependency",
    "NotFound",
    "PermissionDenied",
    "Protected",
    "RateLimited",
    "SignatureMismatch",
    "SizeMismatch",
    "SourceError",
    "StoreError",
    "StoreFull",
    "StoreTimeout",
    "Unauthenticated",
    "Unavailable",
    "UnsafeImage",
    "Unsupported",
    "WrongStatus",
    "redact",
]

_AUTHORITY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s\"'<>]*@")
_WEB_QUERY = re.compile(r"(https?://[^\s\"'<>?]*\?)[^\s\"'<>#]+", re.IGNORECASE)
_SECRET_PARAMETER = re.compile(
    r"([?&][^=&\s\"'<>]*(?:signature|token|secret|password|credential|sig|key)[^=&\s\"'<>]*=)[^&\s\"'<>]*",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Take the credentials out of every URI in ``text``.

    Cuts all that stands between ``://`` and the last ``@`` before a blank or a quote (an old S3 secret may
    hold ``/`` and ``@``), the query of a web address (that of a signed one is a key), and elsewhere the values of
    query parameters whose name says that they are secret.
    """
    text = _WEB_QUERY.sub(r"\1***", text)
    return _SECRET_PARAMETER.sub(r"\1***", _AUTHORITY.sub(r"\1***@", text))


class StoreError(Exception):
    """The root of all errors that imagestore raises.

    A driver raises it (or a subclass) with a message; the store adds where it happened. All attributes may
    be None but `temporary`.

    Attributes:
        message: what was wrong and what to do, without credentials.
        store: name of the store.
        driver: type name of the driver, such as ``"s3"``.
        operation: the verb that failed, such as ``"write"``.
        location: the location, without credentials.
        image_id: the id of the image, for operations that are given one.
        temporary: True if the same call may succeed later.
        retry_after: seconds that the backend asks us to wait.
        attempts: how often it was tried before it was given up.
    """

    default_temporary: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        store: str | None = None,
        driver: str | None = None,
        operation: str | None = None,
        location: str | None = None,
        image_id: str | None = None,
        temporary: bool | None = None,
        retry_after: float | None = None,
        attempts: int | None = None,
    ) -> None:
        self.message = redact(message)
        super().__init__(self.message)
        self.store = store
        self.driver = driver
        self.operation = operation
        self.location = None if location is None else redact(location)
        self.image_id = image_id
        self.temporary = self.default_temporary if temporary is None else temporary
        self.retry_after = retry_after
        self.attempts = attempts

    def __str__(self) -> str:
        where = [
            f"{name} {value}"
            for name, value in (
                ("store", self.store),
                ("operation", self.operation),
                ("image", self.image_id),
                ("location", self.location),
                ("attempts", self.attempts if (self.attempts or 0) > 1 else None),
            )
            if value is not None
        ]
        text = self.message or type(self).__name__
        return f"{text} ({', '.join(where)})" if where else text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.message, self.__dict__.copy())


def _restore(cls: type[StoreError], message: str, state: dict[str, object]) -> StoreError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigurationError(StoreError):
    """The configuration is wrong; the message names file, section and option."""


class InvalidOption(ConfigurationError):
    """An option is unknown, missing, or has a value that it can't have."""


class DriverNotFound(ConfigurationError):
    """No driver of that name is installed, or two packages install one each."""


class MissingDependency(ConfigurationError):
    """The library that a driver needs is not installed; the message says how to install it."""


class InvalidRequest(StoreError):
    """The call itself is wrong; repeating it can't help."""


class InvalidLocation(InvalidRequest):
    """Not a location, or one that this store is not configured to reach."""


class InvalidImageId(InvalidRequest):
    """Not an image id, or one that this backend can't keep."""


class Unsupported(InvalidRequest):
    """The store can't do that."""


class WrongStatus(InvalidRequest):
    """The image's status does not allow that; the message names it (see `imagestore.image`)."""


class IllegalTransition(WrongStatus):
    """No image goes from its status to that one; the message names those that it may go to."""


class Protected(InvalidRequest):
    """The image is protected from deletion."""


class NotFound(StoreError):
    """There is no such image."""


class AlreadyExists(StoreError):
    """There is an image of that id already. It was not touched."""


class InUse(StoreError):
    """The image can't be deleted: a clone, a snapshot or an attachment still needs it."""


class Changed(StoreError):
    """The image was replaced or modified while it was read."""


class Cancelled(StoreError):
    """The caller cancelled the transfer. Nothing of it was kept."""


class AccessError(StoreError):
    """The backend refused us."""


class Unauthenticated(AccessError):
    """The backend does not accept our credentials, or none were given where the store needs them."""


class PermissionDenied(AccessError):
    """The credentials are good, but they don't allow this."""


class CapacityError(StoreError):
    """There is no room for the image."""


class StoreFull(CapacityError):
    """The backend has no space left, or its quota is used up."""


class LimitExceeded(CapacityError):
    """The image is larger than a configured limit, or than the backend can hold."""


class Unavailable(StoreError):
    """The backend can't be reached or fails; trying again later may help."""

    default_temporary = True


class RateLimited(Unavailable):
    """The backend asks us to slow down; `retry_after` has its seconds where it named them."""


class StoreTimeout(Unavailable):
    """The backend stopped answering."""


class IntegrityError(StoreError):
    """The bytes are not what they should be."""


class SizeMismatch(IntegrityError):
    """There are more or fewer bytes than declared."""


class DigestMismatch(IntegrityError):
    """A digest differs from the expected one."""


class SignatureMismatch(IntegrityError):
    """The host's verifier refused the bytes."""


class FormatError(StoreError):
    """The image is not what it was declared to be."""


class FormatMismatch(FormatError):
    """The contents are of another format than the declared one."""


class UnsafeImage(FormatError):
    """The image would make its user read or write something that it must not."""


class SourceError(StoreError):
    """The stream that the caller gave failed. The store did not, and keeps nothing of it."""
