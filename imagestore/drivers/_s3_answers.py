"""What a server's answers mean, and how the bytes and the facts of an object go to it and come back.

See `imagestore.drivers.s3` for what is made of them. Protocol: Amazon S3 API Reference, API version 2006-03-01.
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any, Final

from imagestore.driver import Block, Chunks, Hints, Stat, require, retry_after
from imagestore.errors import (
    Changed,
    ConfigurationError,
    DigestMismatch,
    IntegrityError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "TOKEN",
    "TOKEN_KEY",
    "Body",
    "BodyChunks",
    "code_of",
    "content_md5",
    "describe",
    "encode_metadata",
    "etag_of",
    "is_right",
    "meaning_of",
    "metadata_of",
    "need",
    "refuses",
    "source_changed",
    "status_of",
    "total_of",
]

TOKEN_KEY: Final = "imagestore-token"  # noqa: S105 - the name of a header
_METADATA_KEY: Final = "imagestore-metadata"
TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_CHUNK: Final = 256 * 1024
_METADATA_MAX: Final = 1800
_MD5: Final = re.compile(r"[0-9a-f]{32}")

_HINT_RIGHTS: Final = "the credentials need the rights to list the bucket and to read, write and delete its objects"
_HINT_CLOCK: Final = "the clocks of this host and of the server differ too much"
_HINT_REGION: Final = "the bucket is in another region, or behind another endpoint: check options region and endpoint"

_CODES: Final[dict[str, tuple[type[StoreError], str]]] = {
    "NoSuchKey": (NotFound, "no such object"),
    "NoSuchUpload": (NotFound, "no such upload: it was discarded, or is complete"),
    "NoSuchVersion": (NotFound, "no such version"),
    "NoSuchBucket": (ConfigurationError, "the bucket does not exist: create it, or set option create_bucket"),
    "InvalidBucketName": (ConfigurationError, "the server does not accept the bucket's name: check option bucket"),
    "PermanentRedirect": (ConfigurationError, _HINT_REGION),
    "TemporaryRedirect": (Unavailable, "the bucket is being made or moved"),
    "AuthorizationHeaderMalformed": (ConfigurationError, _HINT_REGION),
    "IllegalLocationConstraintException": (ConfigurationError, _HINT_REGION),
    "InvalidLocationConstraint": (ConfigurationError, "the server does not know this region: check option region"),
    "BucketAlreadyExists": (ConfigurationError, "the bucket belongs to somebody else: choose another name"),
    "InvalidStorageClass": (ConfigurationError, "the server does not know this storage class"),
    "KMS.NotFoundException": (ConfigurationError, "there is no such KMS key: check option kms_key"),
    "KMS.DisabledException": (ConfigurationError, "the KMS key is disabled"),
    "InvalidAccessKeyId": (Unauthenticated, "the server does not know the access key"),
    "SignatureDoesNotMatch": (Unauthenticated, "the secret key is wrong"),
    "ExpiredToken": (Unauthenticated, "the credentials have expired"),
    "InvalidToken": (Unauthenticated, "the session token is not valid"),
    "TokenRefreshRequired": (Unauthenticated, "the credentials have expired"),
    "RequestTimeTooSkewed": (Unauthenticated, _HINT_CLOCK),
    "RequestExpired": (Unauthenticated, _HINT_CLOCK),
    "AccessDenied": (PermissionDenied, f"access denied: {_HINT_RIGHTS}"),
    "AllAccessDisabled": (PermissionDenied, "all access to the bucket is disabled"),
    "UserSuspended": (PermissionDenied, "the user is suspended"),
    "QuotaExceeded": (StoreFull, "the quota is used up"),
    "XMinioAdminBucketQuotaExceeded": (StoreFull, "the bucket's quota is used up"),
    "XMinioStorageFull": (StoreFull, "the server has no space left"),
    "EntityTooLarge": (LimitExceeded, "the image is larger than the server can hold"),
    "MetadataTooLarge": (InvalidRequest, "the metadata are too long"),
    "SlowDown": (RateLimited, "the server asks to slow down"),
    "SlowDownRead": (RateLimited, "the server asks to slow down"),
    "SlowDownWrite": (RateLimited, "the server asks to slow down"),
    "TooManyRequests": (RateLimited, "the server asks to slow down"),
    "RequestLimitExceeded": (RateLimited, "the server asks to slow down"),
    "BandwidthLimitExceeded": (RateLimited, "the server asks to slow down"),
    "RequestTimeout": (StoreTimeout, "the server waited too long for the request"),
    "OperationAborted": (Unavailable, "another operation on the same object is going on"),
    "ConditionalRequestConflict": (Unavailable, "another operation on the same object is going on"),
    "IncompleteBody": (Unavailable, "the server did not get the whole request"),
    "InvalidPart": (IntegrityError, "a part is not there as it was sent"),
    "InvalidObjectState": (StoreError, "the object is archived: restore it before it can be read"),
    "NotImplemented": (Unsupported, "the server has no such operation"),
    "MethodNotAllowed": (Unsupported, "the server does not allow this operation"),
}
_STATUSES: Final[dict[int, tuple[type[StoreError], str]]] = {
    301: (ConfigurationError, _HINT_REGION),
    307: (Unavailable, "the bucket is being made or moved"),
    400: (StoreError, "the server refused the request: check options region and encryption, and that no token expired"),
    401: (Unauthenticated, "the server does not accept the credentials"),
    403: (PermissionDenied, f"access denied: {_HINT_RIGHTS}"),
    404: (NotFound, "no such object"),
    405: (Unsupported, "the server does not allow this operation"),
    408: (StoreTimeout, "the server waited too long for the request"),
    409: (Unavailable, "another operation on the same object is going on"),
    412: (Changed, "the object is not what it was"),
    413: (StoreFull, "the server has no room for so much"),
    416: (Changed, "the object is shorter than it was"),
    429: (RateLimited, "the server asks to slow down"),
    501: (Unsupported, "the server has no such operation"),
    507: (StoreFull, "the server has no space left"),
}
_DAMAGED: Final = frozenset({"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})


def meaning_of(error: Exception, bucket: str) -> StoreError | None:
    """What an error of the SDK means: by the server's code, else by the status, else by its class."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        return _refusal(error, response, bucket)
    exceptions = require("botocore.exceptions", extra="s3")
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (exceptions.ReadTimeoutError, exceptions.ConnectTimeoutError)) or _timed_out(error):
        return StoreTimeout(text)
    if isinstance(error, exceptions.SSLError):
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return ConfigurationError(f"the server's certificate is not trusted: check option cacert: {error}")
        return Unavailable(text)
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.SSOError)):
        return Unauthenticated(f"set access_key and secret_key, or give the SDK credentials: {error}")
    if isinstance(error, (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError)):
        return Unavailable(text)
    if isinstance(error, exceptions.ParamValidationError):
        return InvalidRequest(text)
    broken = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.ChecksumError,
        exceptions.FlexibleChecksumError,
        require("botocore.parsers", extra="s3").ResponseParserError,
        require("urllib3.exceptions", extra="s3").HTTPError,
    )
    if isinstance(error, (*broken, OSError)):
        return Unavailable(text)
    return None


def _refusal(error: Exception, response: dict[str, Any], bucket: str) -> StoreError:
    code, status = code_of(error), status_of(error)
    said = response["Error"].get("Message") or ""
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    wait = retry_after(headers.get("retry-after"), headers.get("date"))
    if code in _DAMAGED:
        # The bytes in memory are right, so that sending them again helps.
        return DigestMismatch(f"the bytes were damaged on their way ({code})", temporary=True)
    known = _CODES.get("SlowDown" if code.startswith("Throttl") else code) or _STATUSES.get(status)
    if known is None and (status >= 500 or code == "InternalError"):
        known = (RateLimited if wait is not None else Unavailable, "the server failed")
    kind, meaning = known or (StoreError, "the server refused the request")
    about = f" (bucket {bucket})" if issubclass(kind, (ConfigurationError, PermissionDenied)) else ""
    return kind(f"{meaning}{about}: {code} {said}".rstrip(), retry_after=wait)


def code_of(error: BaseException) -> str:
    """The server's name for an error; the status, where an answer without a body has no name; "" for other errors."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def status_of(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def need(answer: dict[str, Any], name: str) -> Any:
    """What every whole answer tells. One that was cut off between two header lines looks like a shorter one."""
    if name not in answer:
        raise Unavailable(f"the server's answer has no {name}")
    return answer[name]


def etag_of(answer: dict[str, Any]) -> str:
    """The ETag as it was told; half of one, from a connection that ended within that line, is an error."""
    etag: str = need(answer, "ETag")
    if etag.startswith('"') and not etag.endswith('"', 1):
        raise Unavailable("the server's answer has half an ETag")
    return etag


def refuses(request: Callable[[], object]) -> bool:
    """Whether the server honours the condition of a request that must fail. Some don't even allow it to be asked."""
    try:
        request()
    except Exception as error:
        status = status_of(error)
        if status not in (400, 412, 501):
            raise
        return status == 412
    return False


def _timed_out(error: BaseException | None) -> bool:
    """Whether a time-out is at the bottom of it: while a body is sent, the SDK takes one for a closed connection."""
    while error is not None and not isinstance(error, TimeoutError):
        error = error.__cause__ or error.__context__
    return error is not None


def source_changed(error: Exception) -> Exception:
    return Changed("the image was replaced while it was copied") if status_of(error) == 412 else error


def content_md5(block: Block) -> dict[str, str]:
    return {} if block.digest is None else {"ContentMD5": base64.b64encode(block.digest).decode()}


def is_right(answer: dict[str, Any], block: Block) -> bool:
    """Whether the ETag is the MD5 of the block, where it is one: under SSE-KMS and SSE-C it is not."""
    etag = str(answer.get("ETag", "")).strip('"').lower()
    other = answer.get("SSECustomerAlgorithm") or str(answer.get("ServerSideEncryption", "")).startswith("aws:")
    return bool(other) or block.digest is None or not _MD5.fullmatch(etag) or etag == block.digest.hex()


def encode_metadata(hints: Hints) -> dict[str, str]:
    """Our metadata as S3 can keep them: ASCII, and 2 KB in all."""
    kept = {TOKEN_KEY: hints.token}
    if hints.metadata:
        text = json.dumps(dict(hints.metadata), separators=(",", ":"))
        if len(text) > _METADATA_MAX:
            raise InvalidRequest(f"the metadata take {len(text)} bytes; S3 keeps {_METADATA_MAX}")
        kept[_METADATA_KEY] = text
    return kept


def metadata_of(answer: dict[str, Any]) -> dict[str, str]:
    # Header names have no case, and servers differ in what they make of it.
    return {name.lower(): value for name, value in answer.get("Metadata", {}).items()}


def describe(answer: dict[str, Any], size: int) -> Stat:
    kept = metadata_of(answer)
    token = kept.get(TOKEN_KEY, "")
    try:
        told = json.loads(kept.get(_METADATA_KEY, "{}"))
    except ValueError:
        told = {}
    return Stat(
        size=size,
        version=etag_of(answer).strip('"'),
        token=token if TOKEN.fullmatch(token) else None,
        modified=need(answer, "LastModified"),
        metadata=told if isinstance(told, dict) and all(isinstance(text, str) for text in told.values()) else {},
    )


def total_of(content_range: str | None, start: int) -> int:
    """The size of an object from the answer for a part of it (RFC 9110, 14.4)."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range or "")
    if told is None or int(told[1]) != start:
        raise Unavailable("the server's answer is not the range that was asked for")
    return int(told[2])


class Body:
    """The bytes of a part as a file, given away in larger pieces than asked for.

    As a whole they would have to be sent within one time-out, however slow the line: socket.sendall has one for all.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1, /) -> bytes:
        stop = len(self._data) if size < 0 else self._position + max(size, _CHUNK)
        piece = self._data[self._position : stop]
        self._position += len(piece)
        return piece

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._position = offset + (0, self._position, len(self._data))[whence]
        return self._position


class BodyChunks(Chunks):
    """The bytes of an answer, of which the first are read now; an error if it ends before ``length`` bytes."""

    def __init__(self, body: Any, length: int) -> None:
        super().__init__()
        self._body = body
        self._left = length
        self._first = self._read()

    def fetch(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        return self._read()

    def _read(self) -> bytes:
        if not self._left:
            return b""
        data: bytes = self._body.read(min(_CHUNK, self._left))
        if not data:
            raise Unavailable(f"the connection ended {self._left} bytes before the end")
        self._left -= len(data)
        return data

    def release(self) -> None:
        """Close the connection, unless all was read."""
        self._body.close()
