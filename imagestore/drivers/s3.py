"""Images as objects of one bucket, in Amazon S3 or a server that speaks its API (Ceph RGW, MinIO, …).

An image is the object ``<prefix><image id>``; its location is ``s3://<host>/<bucket>/<prefix><image id>``, with
``s3+https`` in place of ``s3`` where the endpoint is configured with https, as Glance writes it. Requests always go to
the configured endpoint.

**An image of one block** is a single PutObject within ``commit``. **A longer one** is a multipart upload, a part for
each block. Both tell the token of their upload in the object's metadata, ``x-amz-meta-imagestore-token``.

**The mark** of a multipart upload is an object of its own, ``<prefix>.imagestore/uploads/<token>-<nonce>``, because
nothing of ours is visible in an unfinished upload: ListMultipartUploads shows neither metadata nor tags, and other
programs upload to the same bucket, perhaps below the same prefix. It is written before the upload is begun, with the
image id, and again with the upload's id, before the first part. So a process that is killed between the two leaves
a mark of an upload without parts, and ``discard`` looks for it at that key. Some servers list multipart uploads for a
whole key only, which is all that this needs. What a mark tells is in its metadata: headers are signed, a body is not,
and a mark that was damaged on its way would be worth nothing.

**No clobber** rests on ``If-None-Match: *`` of PutObject and CompleteMultipartUpload. Servers that don't know it ignore
it, so ``open`` tries both out on an object of its own and keeps the outcome in ``<prefix>.imagestore/features`` for a
week. Where the server ignores it, ``commit`` looks before it completes (``collision = "detected"``).

Protocol: Amazon S3 API Reference, API version 2006-03-01.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import json
import re
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode, urlsplit

from oslo_config import cfg

from imagestore.driver import (
    IMAGE_ID,
    Block,
    Capabilities,
    Driver,
    Hints,
    Leftover,
    Location,
    Reading,
    Stat,
    StoredImage,
    Upload,
    require,
)
from imagestore.drivers._s3_answers import (
    TOKEN,
    TOKEN_KEY,
    Body,
    BodyChunks,
    code_of,
    content_md5,
    describe,
    encode_metadata,
    etag_of,
    is_right,
    meaning_of,
    metadata_of,
    need,
    refuses,
    source_changed,
    status_of,
    total_of,
)
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    ConfigurationError,
    DigestMismatch,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    StoreError,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["S3Driver"]

_MIB: Final = 1024 * 1024
_PART_MIN: Final = 5 * _MIB
_PART_MAX: Final = 5 * 1024 * _MIB
_PARTS_MAX: Final = 10_000
_COPY_PART: Final = 256 * _MIB
_SIGNED_MAX: Final = 7 * 24 * 3600

_AWS_HOST: Final = "s3.amazonaws.com"
_IMAGE_KEY: Final = "imagestore-image"
_UPLOAD_KEY: Final = "imagestore-upload"
_MARK_TEXT: Final = b"An upload that is not finished. imagestore removes it when it is over, or is collected.\n"
_MARK: Final = re.compile(r"([0-9a-f]{32})-[0-9a-f]{8}")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PREFIX: Final = re.compile(r"(?:[A-Za-z0-9!_*'()-][A-Za-z0-9!_.*'()-]*/)*(?:[A-Za-z0-9!_*'()-][A-Za-z0-9!_.*'()-]*)?")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")
_ODD: Final = re.compile(r"[\x00-\x1f\x7f?#%\\]")

_FEATURES_KEPT: Final = timedelta(days=7)
_BEGIN_WINDOW: Final = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class _Root:
    """Where locations may lie: ``host/bucket/prefix``, and the scheme that they are written with."""

    scheme: str
    host: str
    bucket: str
    prefix: str

    @property
    def text(self) -> str:
        return f"{self.host}/{self.bucket}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class _Mark:
    """What a mark tells: whose upload it is, and its id if it was begun for certain."""

    key: str
    image_id: str
    upload_id: str | None
    modified: datetime


class S3Driver(Driver):
    """Images as objects of one bucket. See the module for how."""

    name = "s3"
    schemes = ("s3", "s3+http", "s3+https")
    options = (
        cfg.StrOpt(
            "endpoint",
            help=(
                "URL of the server, such as https://s3.example.com:7480; without a scheme it is https. Not set: Amazon "
                "S3. It becomes a part of locations: change it only together with accept_locations."
            ),
        ),
        cfg.StrOpt("region", help="Region of the bucket. Servers other than Amazon's mostly take any."),
        cfg.StrOpt(
            "access_key",
            secret=True,
            help=(
                "Access key. Not set: credentials are looked for where Amazon's SDK does: environment, shared files, "
                "container, instance."
            ),
        ),
        cfg.StrOpt("secret_key", secret=True, help="Secret key for access_key."),
        cfg.StrOpt("session_token", secret=True, help="Session token, where access_key is a temporary one."),
        cfg.StrOpt("profile", help="Profile in the SDK's shared files, which may also name a role to assume."),
        cfg.StrOpt("bucket", required=True, help="Bucket that holds the images."),
        cfg.StrOpt(
            "prefix",
            default="",
            help=(
                "What the keys of all objects begin with, such as 'images/'. Glance can read locations only if there "
                "is no slash in it."
            ),
        ),
        cfg.BoolOpt("create_bucket", default=False, help="Create the bucket if it does not exist."),
        cfg.StrOpt(
            "addressing",
            default="auto",
            choices=[
                ("auto", "as the SDK thinks best"),
                ("path", "the bucket stands in the path of URLs"),
                ("virtual", "the bucket is a part of the host name"),
            ],
            help="Where requests name the bucket.",
        ),
        cfg.StrOpt("cacert", help="File with the certificates of the authorities that are trusted."),
        cfg.StrOpt(
            "conditional_writes",
            default="auto",
            choices=[
                ("auto", "find out, with an object of our own, and look again after a week"),
                ("yes", "the server honours If-None-Match in PutObject and in CompleteMultipartUpload"),
                ("no", "it does not, or answers it with an error"),
            ],
            help="Whether the server can refuse to replace an object.",
        ),
        cfg.StrOpt(
            "checksums",
            default="when_required",
            choices=[
                ("when_required", "only where the protocol demands them; every server understands that"),
                ("when_supported", "the SDK also adds its own and checks those of answers"),
            ],
            help="Checksums beside the MD5 that every block is sent with.",
        ),
        cfg.StrOpt("storage_class", help="Storage class of images, such as STANDARD_IA. Not set: the bucket's."),
        cfg.StrOpt(
            "encryption",
            default="none",
            choices=[
                ("none", "what the bucket is configured for"),
                ("s3", "SSE-S3, keys of the server"),
                ("kms", "SSE-KMS, the key kms_key or the account's own"),
                ("customer", "SSE-C, the key customer_key"),
            ],
            help="Encryption in the server.",
        ),
        cfg.StrOpt("kms_key", help="Id or ARN of the KMS key."),
        cfg.StrOpt(
            "customer_key",
            secret=True,
            help="Key for SSE-C: 32 bytes in base64. Whoever loses it loses the images.",
        ),
        cfg.DictOpt("tags", default={}, help="Tags of image objects: name:value, comma-separated."),
        cfg.ListOpt(
            "accept_locations",
            default=[],
            help=(
                "Further places whose images may be read and deleted by location, such as former hosts and buckets: "
                "s3://host/bucket or s3://host/bucket/prefix, comma-separated. Requests go to endpoint all the same. "
                "Nothing is ever listed or added there."
            ),
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        self._endpoint, scheme, host = self._read_endpoint(settings.endpoint)
        self._bucket = self._match("bucket", settings.bucket or "", _BUCKET)
        self._prefix = self._match("prefix", settings.prefix or "", _PREFIX)
        if len(self._prefix) > 512:
            raise self.invalid_option("prefix", "is longer than 512 characters")
        self._root = _Root(scheme, host, self._bucket, self._prefix)
        roots = [self._root, *(self._read_root(uri) for uri in settings.accept_locations or ())]
        if self._endpoint is None and settings.region:
            roots.append(_Root(scheme, f"s3.{settings.region}.amazonaws.com", self._bucket, self._prefix))
        # The longest first, so that a prefix within another is found before it; ours before one of the same text.
        self._roots = sorted(roots, key=lambda root: -len(root.text))
        if bool(settings.access_key) != bool(settings.secret_key):
            raise self.invalid_option("secret_key", "must be set together with access_key")
        self._customer = self._read_customer_key()
        self._encryption = self._read_encryption()
        self._own = f"{self._prefix}.imagestore/"
        self._marks = f"{self._own}uploads/"
        self._probes = f"{self._own}probe-"
        self._conditional_put = self._conditional_complete = settings.conditional_writes == "yes"
        self._client: Any = None

    # Options

    def _match(self, option: str, value: str, pattern: re.Pattern[str]) -> str:
        if not pattern.fullmatch(value):
            raise self.invalid_option(option, f"{value!r} is missing, or not what it can be" if value else "not set")
        return value

    def _read_endpoint(self, text: str | None) -> tuple[str | None, str, str]:
        """The endpoint's URL, and the scheme and host that locations get."""
        if not text:
            return None, "s3+https", _AWS_HOST
        url = text if "://" in text else f"https://{text}"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.netloc):
            raise self.invalid_option("endpoint", "is not a URL such as https://s3.example.com")
        if parts.query or parts.fragment or ".." in parts.path or "//" in parts.path:
            raise self.invalid_option("endpoint", "has a query, a fragment or an odd path")
        scheme = "s3+https" if parts.scheme == "https" else "s3"
        return url, scheme, _host(parts.scheme, parts.netloc) + parts.path.rstrip("/")

    def _read_root(self, uri: str) -> _Root:
        scheme, separator, rest = uri.partition("://")
        host, _, path = rest.partition("/")
        bucket, _, prefix = path.partition("/")
        if not separator or scheme.lower() not in self.schemes or not _HOST.fullmatch(host):
            raise self.invalid_option("accept_locations", "an entry is not of the form s3://host/bucket")
        if not _BUCKET.fullmatch(bucket) or not _PREFIX.fullmatch(prefix):
            raise self.invalid_option("accept_locations", f"a bucket or prefix can't be {path!r}")
        return _Root(scheme.lower(), _host(scheme.lower(), host), bucket, prefix)

    def _read_customer_key(self) -> dict[str, Any]:
        if self.settings.encryption != "customer":
            return {}
        try:
            key = base64.b64decode(self.settings.customer_key or "", validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) != 32:
            raise self.invalid_option("customer_key", "must be 32 bytes in base64")
        return {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}

    def _read_encryption(self) -> dict[str, Any]:
        """What is said when an object is made."""
        kind = self.settings.encryption
        if kind == "kms":
            key = {"SSEKMSKeyId": self.settings.kms_key} if self.settings.kms_key else {}
            return {"ServerSideEncryption": "aws:kms", **key}
        return {"ServerSideEncryption": "AES256"} if kind == "s3" else self._customer

    # Connecting

    def open(self) -> None:
        """Connect, see that the bucket is there, and find out whether the server can refuse to replace objects.

        Raises:
            ConfigurationError: the bucket does not exist and is not to be created, or is elsewhere.
            Unauthenticated: the server does not accept the credentials, or there are none.
            PermissionDenied: they don't allow the bucket to be used.
        """
        self._client = self._connect()
        try:
            features = self._read_features()
            if self.settings.conditional_writes == "auto":
                self._conditional_put, self._conditional_complete = features or self._find_features()
        except BaseException:
            self.close()
            raise
        self.capabilities = Capabilities(
            parallel_writes=self.limits.workers,
            block_min=_PART_MIN,
            block_max=_PART_MAX,
            blocks_max=_PARTS_MAX,
            repeatable_create=True,
            block_digest="md5",
            collision="exclusive" if self._conditional_put and self._conditional_complete else "detected",
            commit_proof=True,
        )

    def _connect(self) -> Any:
        exceptions = require("botocore.exceptions", extra="s3")
        config = require("botocore.config", extra="s3").Config(
            signature_version="s3v4",
            connect_timeout=self.timeouts.connect,
            read_timeout=self.timeouts.stall,
            # Reads hold connections beside the workers' writes.
            max_pool_connections=2 * self.limits.workers,
            retries={"total_max_attempts": 1, "mode": "standard"},
            request_checksum_calculation=self.settings.checksums,
            response_checksum_validation=self.settings.checksums,
            # Every part carries its MD5, which is signed: a second digest of the same bytes would prove nothing more.
            s3={"addressing_style": self.settings.addressing, "payload_signing_enabled": False},
            ignore_configured_endpoint_urls=True,
            tcp_keepalive=True,
            user_agent_extra="imagestore",
        )
        settings = self.settings
        try:
            session = require("botocore.session", extra="s3").Session(profile=settings.profile)
            session.register_component("data_loader", _descriptions())
            client = session.create_client(
                "s3",
                region_name=settings.region or session.get_config_variable("region") or "us-east-1",
                endpoint_url=self._endpoint,
                verify=settings.cacert or None,
                aws_access_key_id=settings.access_key,
                aws_secret_access_key=settings.secret_key,
                aws_session_token=settings.session_token,
                config=config,
            )
            # A part goes out at once: asking the server first costs a round trip, and is one more answer to wait for.
            client.meta.events.register_last("before-call.s3", _without_asking)
            return client
        except (exceptions.ProfileNotFound, exceptions.InvalidRegionError, ValueError) as error:
            raise ConfigurationError(f"options profile, region, endpoint: {error}") from error

    def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _call(self, operation: str, /, **arguments: Any) -> Any:
        """One request for the bucket's own objects."""
        client = self._client
        if client is None:
            raise Cancelled("the store was closed")
        try:
            return getattr(client, operation)(**{"Bucket": self._bucket, **arguments})
        except ValueError as error:
            # Out of the SDK's parsers, for a number or a time that was cut off.
            raise Unavailable(f"the server's answer can't be understood: {error}") from error

    def _read_features(self) -> tuple[bool, bool] | None:
        """What is known of the server, or None; on the way, whether the bucket can be used at all."""
        try:
            answer, text = self._get(f"{self._own}features")
        except Exception as error:
            if code_of(error) == "NoSuchBucket" and self.settings.create_bucket:
                self._create_bucket()
                return None
            if status_of(error) != 404 or code_of(error) == "NoSuchBucket":
                raise
            return None
        try:
            told = json.loads(text)
            fresh = datetime.now(UTC) - need(answer, "LastModified") < _FEATURES_KEPT
            if fresh and told["endpoint"] == self._root.host:
                return bool(told["put"]), bool(told["complete"])
        except (ValueError, KeyError, TypeError):
            pass
        return None

    def _create_bucket(self) -> None:
        region = self._client.meta.region_name
        # Other servers have names of their own for places, and mostly none at all.
        aws = self._endpoint is None or (urlsplit(self._endpoint).hostname or "").endswith(".amazonaws.com")
        where = {"CreateBucketConfiguration": {"LocationConstraint": region}} if aws and region != "us-east-1" else {}
        try:
            self._call("create_bucket", **where)
        except Exception as error:
            if code_of(error) != "BucketAlreadyOwnedByYou":
                raise

    def _find_features(self) -> tuple[bool, bool]:
        """Try `If-None-Match` in both operations on an object of our own, and write down what came of it."""
        key = f"{self._probes}{secrets.token_hex(16)}"
        try:
            self._put(key, b"1")
        except Exception as error:
            # Who may not write has no use for the answer.
            if isinstance(self.translate(error), PermissionDenied):
                return False, False
            raise
        try:
            put = refuses(lambda: self._put(key, b"2", IfNoneMatch="*"))
            complete = put and self._complete_refuses(key)
        finally:
            # What stays behind looks like a leftover, and is one.
            with contextlib.suppress(Exception):
                self._discard_probe(key)
        told = {"endpoint": self._root.host, "put": put, "complete": complete}
        with contextlib.suppress(Exception):
            self._put(f"{self._own}features", json.dumps(told).encode())
        return put, complete

    def _complete_refuses(self, key: str) -> bool:
        upload = need(self._call("create_multipart_upload", Key=key, **self._encryption), "UploadId")
        part = self._call("upload_part", Key=key, UploadId=upload, PartNumber=1, Body=b"3", **self._customer)
        parts = [{"PartNumber": 1, "ETag": need(part, "ETag")}]
        return refuses(lambda: self._complete(key, upload, parts, IfNoneMatch="*"))

    # Small objects of our own

    def _put(self, key: str, data: bytes, **arguments: Any) -> None:
        self._call("put_object", Key=key, Body=data, **self._encryption, **arguments)

    def _get(self, key: str) -> tuple[dict[str, Any], bytes]:
        answer = self._call("get_object", Key=key, **self._customer)
        with contextlib.closing(answer["Body"]) as body:
            return answer, body.read(4096)

    def _remove(self, key: str) -> None:
        """Delete an object, in a bucket with versions all of them: nobody shall find ours there."""
        answer = self._call("delete_object", Key=key)
        if not answer.get("VersionId"):
            return
        found = self._call("list_object_versions", Prefix=key)
        for version in (*found.get("Versions", ()), *found.get("DeleteMarkers", ())):
            if version["Key"] == key:
                self._call("delete_object", Key=key, VersionId=version["VersionId"])

    def _objects(self, prefix: str) -> Iterator[dict[str, Any]]:
        """The objects whose keys begin with ``prefix`` and have no slash after it."""
        marker: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=prefix, Delimiter="/", **marker)
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            marker = {"ContinuationToken": need(page, "NextContinuationToken")}

    # Locations

    def parse(self, uri: str, /) -> Location:
        """Check an ``s3://``, ``s3+http://`` or ``s3+https://`` location; the three mean the same image.

        All after the bucket is the key as it is: nothing is decoded.

        Raises:
            InvalidLocation: another scheme, host, bucket or prefix than configured or in ``accept_locations``, or a key
                with an empty or hidden component or with characters that mean something in a URL.
        """
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme.lower() not in self.schemes:
            raise InvalidLocation("not an s3:// location")
        host, _, path = rest.partition("/")
        text = f"{_host(scheme.lower(), host)}/{path}"
        for root in self._roots:
            if text.startswith(root.text):
                return self._location(root, text[len(root.text) :])
        raise InvalidLocation("the location is not in the host, bucket and prefix that this store is configured for")

    def _location(self, root: _Root, name: str) -> Location:
        if _ODD.search(name) or len(root.prefix) + len(name.encode(errors="replace")) > 1024:
            raise InvalidLocation("the key is too long, or has characters that a location can't have")
        try:
            name.encode()
        except UnicodeError as error:
            raise InvalidLocation("the key is not text") from error
        if any(not part or part.startswith(".") for part in name.split("/")):
            raise InvalidLocation("the key has a component that is empty or hidden")
        if root in self._roots and root.bucket == self._bucket and root.prefix == self._prefix:
            # By whatever host it was called, it is the same image.
            root = self._root
        return Location(
            uri=f"{root.scheme}://{root.text}{name}",
            key=(root.bucket, root.prefix + name),
            image_id=name if IMAGE_ID.fullmatch(name) else None,
        )

    def _place(self, location: Location) -> dict[str, Any]:
        """The arguments of a request for what is at ``location``."""
        # The text decides, whoever made the location.
        bucket, key = self.parse(location.uri).key
        return {"Bucket": bucket, "Key": key}

    def locate(self, image_id: str, /) -> Location | None:
        """The location of the object of that id, or None."""
        location = self._location(self._root, image_id)
        try:
            self.stat(location)
        except NotFound:
            return None
        return location

    def list(self) -> Iterator[StoredImage]:
        """Objects directly below the prefix whose names are image ids."""
        for item in self._objects(self._prefix):
            name = item["Key"][len(self._prefix) :]
            if IMAGE_ID.fullmatch(name):
                location = self._location(self._root, name)
                yield StoredImage(image_id=name, location=location, size=item["Size"], modified=item["LastModified"])

    # Reading

    def stat(self, location: Location, /) -> Stat:
        """Size, time, token and metadata of the object; the version is its ETag.

        Raises:
            NotFound: there is no such object.
        """
        answer = self._found("head_object", location)
        size = need(answer, "ContentLength")
        # A connection that ends within a header line gives a shorter one, and no body follows that could show it.
        last = [*answer.get("ResponseMetadata", {}).get("HTTPHeaders", ())][-1:]
        if last == ["content-length"] and self._found("head_object", location).get("ContentLength") != size:
            raise Unavailable("the server told two different sizes")
        return describe(answer, size)

    def _found(self, operation: str, location: Location, **arguments: Any) -> Any:
        try:
            return self._call(operation, **self._place(location), **self._customer, **arguments)
        except Exception as error:
            # A HEAD has no body that could tell what was not found.
            if status_of(error) == 404 and code_of(error) != "NoSuchBucket":
                raise NotFound("no such object") from error
            raise

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Open the object, or bytes ``start`` to ``stop`` of it, if its ETag is ``version``.

        Raises:
            NotFound: there is no such object.
            Changed: it has another ETag, or is shorter than the range.
        """
        whole = start == 0 and stop is None
        arguments = {} if whole else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if version is not None:
            arguments["IfMatch"] = f'"{version}"'
        answer = self._found("get_object", location, **arguments)
        try:
            length = size = need(answer, "ContentLength")
            if not whole:
                size = total_of(answer.get("ContentRange"), start)
            stat = describe(answer, size)
            if version is not None and stat.version != version:
                raise Changed("the object was replaced")
            if length != (size if stop is None else stop) - start:
                raise Unavailable("the server's answer has another length than was asked for")
            # A head is known to be whole, and its numbers right, when something comes after it.
            chunks = BodyChunks(answer["Body"], length)
        except BaseException:
            answer["Body"].close()
            raise
        return Reading(stat=stat, chunks=chunks, close=chunks.close)

    def sign(self, location: Location, seconds: int, /) -> str:
        """A presigned URL for GET. Whoever has it can read the image until it expires, or the credentials do.

        Raises:
            InvalidRequest: more than seven days, or less than a second.
            Unsupported: the images are encrypted with a key of the customer, which readers would have to send.
        """
        if self._customer:
            raise Unsupported("images under a customer's key can't be read by a URL alone")
        if not 1 <= seconds <= _SIGNED_MAX:
            raise InvalidRequest(f"a URL can be signed for 1 to {_SIGNED_MAX} seconds")
        url: str = self._client.generate_presigned_url("get_object", self._place(location), ExpiresIn=int(seconds))
        return url

    # Deleting

    def delete(self, location: Location, /) -> None:
        """Delete the object. In a bucket with versions the old one stays until the bucket's rules remove it.

        Raises:
            NotFound: there is no such object.
        """
        # DeleteObject says nothing of what was not there.
        self.stat(location)
        self._call("delete_object", **self._place(location))

    # Writing

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        """Begin an upload; one that is known to be of one block is begun, and ended, by its commit.

        Raises:
            InvalidRequest: the metadata are longer than S3 can keep.
        """
        upload = _Upload(self, self._location(self._root, image_id), image_id, hints)
        if hints.size is not None and hints.size > hints.block_size:
            try:
                upload.begin()
            except BaseException:
                with contextlib.suppress(Exception):
                    upload.abort()
                raise
        return upload

    def copy(self, location: Location, image_id: str, hints: Hints, /) -> Location:
        """Copy inside the server, pinned to the ETag that the image has now.

        Raises:
            AlreadyExists: the id is taken. Changed: the image was replaced meanwhile.
        """
        stat = self.stat(location)
        source = {"CopySource": self._place(location), "CopySourceIfMatch": f'"{stat.version}"'}
        if self._customer:
            source["CopySourceSSECustomerAlgorithm"] = self._customer["SSECustomerAlgorithm"]
            source["CopySourceSSECustomerKey"] = self._customer["SSECustomerKey"]
        upload = _Upload(self, self._location(self._root, image_id), image_id, hints)
        try:
            upload.copy(source, stat.size)
        except BaseException:
            with contextlib.suppress(Exception):
                upload.abort()
            raise
        return upload.location

    def _complete(self, key: str, upload_id: str, parts: Sequence[dict[str, Any]], **arguments: Any) -> None:
        self._call(
            "complete_multipart_upload",
            Key=key,
            UploadId=upload_id,
            MultipartUpload={"Parts": [*parts]},
            **self._customer,
            **arguments,
        )

    def _abort(self, key: str, upload_id: str) -> None:
        """Give a multipart upload up. One that is gone or complete already is left alone."""
        try:
            self._call("abort_multipart_upload", Key=key, UploadId=upload_id)
            # A part that was on its way meanwhile may keep it alive (AbortMultipartUpload in the reference).
            left = self._call("list_parts", Key=key, UploadId=upload_id, MaxParts=1, **self._customer)
        except Exception as error:
            if status_of(error) != 404 or code_of(error) == "NoSuchBucket":
                raise
            return
        if left.get("Parts"):
            raise Unavailable("parts of the upload still arrive")

    # Leftovers

    def uploads(self) -> Iterator[Leftover]:
        """Multipart uploads that have a mark of ours, and what a search for the server's features left."""
        for item in self._objects(self._marks):
            named = _MARK.fullmatch(item["Key"][len(self._marks) :])
            mark = self._read_mark(item["Key"]) if named else None
            if named and mark:
                count, last = self._stored(mark)
                yield Leftover(
                    token=named[1],
                    image_id=mark.image_id,
                    bytes=count,
                    started=mark.modified,
                    last_activity=max(last, mark.modified),
                    key=(mark.key,),
                )
        for item in self._objects(self._probes):
            token = item["Key"][len(self._probes) :]
            if TOKEN.fullmatch(token):
                modified = item["LastModified"]
                yield Leftover(
                    token=token, bytes=item["Size"], started=modified, last_activity=modified, key=(item["Key"],)
                )

    def discard(self, leftover: Leftover, /) -> None:
        """Abort the upload that a mark tells of, and remove the mark. If it still runs, its commit will fail.

        Raises:
            InvalidRequest: ``leftover`` is not from this store.
        """
        key = leftover.key[0] if leftover.key else ""
        if key.startswith(self._probes) and TOKEN.fullmatch(key[len(self._probes) :]):
            self._discard_probe(key)
            return
        if not key.startswith(self._marks) or not _MARK.fullmatch(key[len(self._marks) :]):
            raise InvalidRequest("not an upload of this store")
        mark = self._read_mark(key)
        if mark is None:
            return
        target = self._prefix + mark.image_id
        if mark.upload_id is not None:
            self._abort(target, mark.upload_id)
        for upload_id in self._strays(mark, target):
            self._abort(target, upload_id)
        self._remove(key)

    def _discard_probe(self, key: str) -> None:
        for upload in self._multipart_uploads(key):
            self._abort(key, upload["UploadId"])
        self._remove(key)

    def _write_mark(self, key: str, image_id: str, upload_id: str | None) -> None:
        told = {_IMAGE_KEY: image_id} if upload_id is None else {_IMAGE_KEY: image_id, _UPLOAD_KEY: upload_id}
        self._put(key, _MARK_TEXT, Metadata=told)

    def _read_mark(self, key: str) -> _Mark | None:
        """What a mark says; None if it is gone, or is none of ours."""
        try:
            answer, text = self._get(key)
        except Exception as error:
            if code_of(error) == "NoSuchKey":
                return None
            raise
        told = metadata_of(answer)
        if not IMAGE_ID.fullmatch(told.get(_IMAGE_KEY, "")):
            return None
        if not text:
            raise Unavailable("the server's answer ended within its head")
        return _Mark(key, told[_IMAGE_KEY], told.get(_UPLOAD_KEY) or None, need(answer, "LastModified"))

    def _stored(self, mark: _Mark) -> tuple[int, datetime]:
        """How many bytes a marked upload holds, and when the last of them came."""
        count, last = 0, mark.modified
        marker: dict[str, Any] = {}
        while mark.upload_id is not None:
            target = {"Key": self._prefix + mark.image_id, "UploadId": mark.upload_id}
            try:
                page = self._call("list_parts", **target, **marker, **self._customer)
            except Exception as error:
                if status_of(error) != 404 or code_of(error) == "NoSuchBucket":
                    raise
                break
            for part in page.get("Parts", ()):
                count += part["Size"]
                last = max(last, part["LastModified"])
            if not page.get("IsTruncated"):
                break
            marker = {"PartNumberMarker": need(page, "NextPartNumberMarker")}
        return count, last

    def _multipart_uploads(self, key: str) -> Iterator[dict[str, Any]]:
        marker: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", Prefix=key, **marker)
            yield from (upload for upload in page.get("Uploads", ()) if upload["Key"] == key)
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": need(page, "NextKeyMarker"), "UploadIdMarker": need(page, "NextUploadIdMarker")}

    def _strays(self, mark: _Mark, target: str) -> Sequence[str]:
        """Uploads that may have been begun under this mark without its learning their ids.

        They are at its key, began when it was written, have no part yet, and no other mark knows them. Should one be
        somebody else's all the same, that one loses nothing that was stored.
        """
        found = [
            upload["UploadId"]
            for upload in self._multipart_uploads(target)
            if abs(upload["Initiated"] - mark.modified) < _BEGIN_WINDOW and upload["UploadId"] != mark.upload_id
        ]
        if found:
            marks = [self._read_mark(item["Key"]) for item in self._objects(self._marks)]
            known = {other.upload_id for other in marks if other is not None}
            found = [upload_id for upload_id in found if upload_id not in known]
        return [
            upload_id
            for upload_id in found
            if not self._call("list_parts", Key=target, UploadId=upload_id, MaxParts=1, **self._customer).get("Parts")
        ]

    # Errors

    def translate(self, error: Exception, /) -> StoreError | None:
        return meaning_of(error, self._bucket)


class _Upload(Upload):
    """An image on its way into the bucket."""

    def __init__(self, driver: S3Driver, location: Location, image_id: str, hints: Hints) -> None:
        self.location = location
        self._driver = driver
        self._image_id = image_id
        self._key = location.key[1]
        self._token = hints.token
        self._metadata = encode_metadata(hints)
        self._mark = f"{driver._marks}{hints.token}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        # Whether there may be a mark, whether it is there for certain, and whether it tells the upload's id.
        self._marked = self._announced = self._known = False
        # Whether there may be an upload whose id nobody knows.
        self._doubt = False
        self._upload_id: str | None = None
        self._parts: dict[int, str] = {}
        self._only: Block | None = None
        self._committed = False

    def _making(self) -> dict[str, Any]:
        """What is said of the object when it is made."""
        settings = self._driver.settings
        arguments = {"Metadata": self._metadata, "ContentType": "application/octet-stream", **self._driver._encryption}
        if settings.storage_class:
            arguments["StorageClass"] = settings.storage_class
        if settings.tags:
            arguments["Tagging"] = urlencode(settings.tags)
        return arguments

    def begin(self) -> None:
        """Write the mark and begin the multipart upload, unless that was done. Repeated, it goes on where it failed."""
        driver = self._driver
        with self._lock:
            if not self._announced:
                self._marked = True
                driver._write_mark(self._mark, self._image_id, None)
                self._announced = True
            if self._upload_id is None:
                before, self._doubt = self._doubt, True
                self._upload_id = need(
                    driver._call("create_multipart_upload", Key=self._key, **self._making()), "UploadId"
                )
                self._doubt = before
            if not self._known:
                driver._write_mark(self._mark, self._image_id, self._upload_id)
                self._known = True

    def write(self, block: Block, /) -> None:
        """Upload a part; an only block is kept for the commit.

        Raises:
            DigestMismatch: (temporary) the server got other bytes.
            NotFound: the upload was discarded.
        """
        if block.last and block.index == 0:
            self._only = block
            return
        self.begin()
        number = block.index + 1
        answer = self._driver._call(
            "upload_part",
            Key=self._key,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=Body(block.data),
            **content_md5(block),
            **self._driver._customer,
        )
        if not is_right(answer, block):
            raise DigestMismatch("the server's ETag of a part is not the MD5 of what was sent", temporary=True)
        self._parts[number] = etag_of(answer)

    def commit(self, size: int, /) -> None:
        """Make the object visible: complete the multipart upload, or put an object of one block or none.

        Raises:
            AlreadyExists: the id was taken meanwhile.
            NotFound: the upload was discarded.
        """
        if self._committed:
            return
        try:
            if self._parts:
                self._complete()
            else:
                self._put()
        except Exception as error:
            if status_of(error) == 412:
                raise AlreadyExists("there is an image of that id already") from error
            raise
        self._committed = True
        self._only = None
        # The image stands. A mark that can't be removed is a leftover like any other.
        with contextlib.suppress(Exception):
            self._forget()

    def _complete(self) -> None:
        driver = self._driver
        if not driver._conditional_complete and self._stands():
            return
        condition = {"IfNoneMatch": "*"} if driver._conditional_complete else {}
        parts = [{"PartNumber": number, "ETag": self._parts[number]} for number in sorted(self._parts)]
        assert self._upload_id is not None
        driver._complete(self._key, self._upload_id, parts, **condition)

    def _put(self) -> None:
        driver, block = self._driver, self._only
        if not driver._conditional_put and self._stands():
            return
        condition = {"IfNoneMatch": "*"} if driver._conditional_put else {}
        body = {"Body": Body(block.data), **content_md5(block)} if block is not None else {"Body": b""}
        answer = driver._call("put_object", Key=self._key, **body, **self._making(), **condition)
        if block is None or is_right(answer, block):
            return
        # The answer may have been damaged, or the object; the latter must not stay.
        there = driver._found("head_object", self.location)
        if not is_right(there, block):
            if metadata_of(there).get(TOKEN_KEY) == self._token:
                driver._call("delete_object", Key=self._key)
            raise DigestMismatch("the server's ETag of the image is not the MD5 of what was sent")

    def _stands(self) -> bool:
        """Whether an earlier commit of ours, whose answer was lost, made the object. Another's is `AlreadyExists`."""
        try:
            stat = self._driver.stat(self.location)
        except NotFound:
            return False
        if stat.token != self._token:
            raise AlreadyExists("there is an image of that id already")
        return True

    def copy(self, source: dict[str, Any], size: int) -> None:
        """Make the object from another one. Raises as `commit` does."""
        driver = self._driver
        if size == 0 or (size <= _COPY_PART and not driver._conditional_complete):
            self._copy_small(source if size else None)
            return
        self.begin()
        length = max(_COPY_PART, -(-size // _PARTS_MAX))

        def copy_part(start: int) -> None:
            number = start // length + 1
            answer = driver._call(
                "upload_part_copy",
                Key=self._key,
                UploadId=self._upload_id,
                PartNumber=number,
                CopySourceRange=f"bytes={start}-{min(start + length, size) - 1}",
                **source,
                **driver._customer,
            )
            self._parts[number] = need(need(answer, "CopyPartResult"), "ETag")

        pool = ThreadPoolExecutor(min(8, driver.limits.workers), "imagestore-copy")
        try:
            for done in [pool.submit(copy_part, start) for start in range(0, size, length)]:
                done.result()
        except Exception as error:
            raise source_changed(error) from error
        finally:
            pool.shutdown(cancel_futures=True)
        self.commit(size)

    def _copy_small(self, source: dict[str, Any] | None) -> None:
        if source is None:
            self.commit(0)
        elif not self._stands():
            try:
                self._driver._call(
                    "copy_object", Key=self._key, MetadataDirective="REPLACE", **source, **self._making()
                )
            except Exception as error:
                raise source_changed(error) from error

    def abort(self) -> None:
        """Abort the multipart upload and remove its mark. What was committed stays."""
        with self._lock:
            self._only = None
            if self._upload_id is not None and not self._committed:
                self._driver._abort(self._key, self._upload_id)
        self._forget()

    def _forget(self) -> None:
        """Remove the mark, unless an upload may be left that can be found by it alone."""
        if self._marked and not self._doubt:
            self._driver._remove(self._mark)
            self._marked = False


@functools.cache
def _descriptions() -> Any:
    """The SDK's descriptions of services, read once in a process: most of what a client takes in time and memory."""
    return require("botocore.session", extra="s3").Session().get_component("data_loader")


def _without_asking(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def _host(scheme: str, text: str) -> str:
    """A host in lower case and without the scheme's own port."""
    port = ":443" if scheme.endswith("https") else ":80"
    return text.lower().removesuffix(port)
