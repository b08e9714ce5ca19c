"""The S3 driver by itself: options, locations, errors, and what it says to the server. The server is scripted."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import string
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore.driver import Block, Hints, Leftover, Limits, Options, Timeouts
from imagestore.drivers._s3_answers import Body
from imagestore.drivers.s3 import S3Driver
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    ConfigurationError,
    DigestMismatch,
    InvalidLocation,
    InvalidOption,
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

exceptions = pytest.importorskip("botocore.exceptions", reason="the S3 driver needs boto3")

TOKEN = "0123456789abcdef" * 2
NOW = datetime.now(UTC)
MIB = 1024 * 1024
DEFAULTS = {"endpoint": "https://s3.example.com", "bucket": "images", "access_key": "key", "secret_key": "secret"}


def build(**values: Any) -> S3Driver:
    defaults = {option.dest: option.default for option in S3Driver.options}
    assert values.keys() <= defaults.keys()
    return S3Driver(Options(defaults | DEFAULTS | values), store="remote", limits=Limits(workers=3))


def refusal(code: str, status: int, message: str | None = None, **headers: str) -> Exception:
    response = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    error: Exception = exceptions.ClientError(response, "Operation")
    return error


class Script:
    """A client that answers each operation with what it was told, in order, the last for ever; and remembers."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {name: list(told) if isinstance(told, list) else [told] for name, told in answers.items()}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, operation: str) -> Any:
        def call(**arguments: Any) -> Any:
            self.calls.append((operation, arguments))
            told = self.answers.get(operation, [{}])
            answer = told.pop(0) if len(told) > 1 else told[0]
            if callable(answer):
                answer = answer(**arguments)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def close(self) -> None:
        pass

    @property
    def operations(self) -> list[str]:
        return [operation for operation, _ in self.calls]

    def of(self, operation: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == operation]


def scripted(values: dict[str, Any] | None = None, *, conditional: bool = True, **answers: Any) -> tuple[S3Driver, Any]:
    driver = build(conditional_writes="yes" if conditional else "no", **(values or {}))
    driver._client = script = Script(**answers)
    return driver, script


def block(data: bytes = b"data", index: int = 0, *, last: bool = False) -> Block:
    import hashlib

    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return Block(index=index, offset=index * 8 * MIB, data=data, last=last, digest=digest)


def etag(data: bytes = b"data") -> str:
    digest = block(data).digest
    assert digest is not None
    return f'"{digest.hex()}"'


def head(token: str | None = TOKEN, tag: str = '"e"', size: int = 4) -> dict[str, Any]:
    metadata = {"imagestore-token": token} if token else {}
    return {"ContentLength": size, "ETag": tag, "LastModified": NOW, "Metadata": metadata}


LARGE = Hints(token=TOKEN, size=20 * MIB)
SMALL = Hints(token=TOKEN, size=4)
UNKNOWN = Hints(token=TOKEN)
BEGUN = {"create_multipart_upload": {"UploadId": "id"}, "upload_part": {"ETag": etag()}}


# Options


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("bucket", {"bucket": None}),
        ("bucket", {"bucket": "a/b"}),
        ("bucket", {"bucket": "a@b"}),
        ("prefix", {"prefix": "/a"}),
        ("prefix", {"prefix": "a//b"}),
        ("prefix", {"prefix": "../a"}),
        ("prefix", {"prefix": "a/./b"}),
        ("prefix", {"prefix": "a?b"}),
        ("prefix", {"prefix": "x" * 600}),
        ("endpoint", {"endpoint": "ftp://host"}),
        ("endpoint", {"endpoint": "https://user:secret@host"}),
        ("endpoint", {"endpoint": "https://"}),
        ("endpoint", {"endpoint": "https://host/?x"}),
        ("endpoint", {"endpoint": "https://host/../x"}),
        ("secret_key", {"secret_key": None}),
        ("secret_key", {"access_key": None}),
        ("customer_key", {"encryption": "customer"}),
        ("customer_key", {"encryption": "customer", "customer_key": "short"}),
        ("accept_locations", {"accept_locations": ["http://host/bucket"]}),
        ("accept_locations", {"accept_locations": ["s3://host"]}),
        ("accept_locations", {"accept_locations": ["s3://user:secret@host/bucket"]}),
    ],
)
def test_invalid_options(option: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"option {option}:") as caught:
        build(**values)
    assert "secret" not in str(caught.value).replace("secret_key", "")


def test_options_are_said_to_the_server() -> None:
    key = base64.b64encode(bytes(range(32))).decode()
    for values, expected in (
        ({"encryption": "s3"}, {"ServerSideEncryption": "AES256"}),
        ({"encryption": "kms"}, {"ServerSideEncryption": "aws:kms"}),
        ({"encryption": "kms", "kms_key": "k"}, {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k"}),
        ({"encryption": "customer", "customer_key": key}, {"SSECustomerKey": bytes(range(32))}),
        ({"storage_class": "STANDARD_IA"}, {"StorageClass": "STANDARD_IA"}),
        ({"tags": {"a b": "c&d"}}, {"Tagging": "a+b=c%26d"}),
    ):
        driver, script = scripted(values, **BEGUN, put_object={"ETag": etag()})
        large = driver.create("image", LARGE)
        large.write(block())
        large.commit(4)
        small = driver.create("image", SMALL)
        small.write(block(last=True))
        small.commit(4)
        made = [script.of("create_multipart_upload")[0], script.of("put_object")[-1]]
        for arguments in made:
            assert expected.items() <= arguments.items()
            assert arguments["Metadata"]["imagestore-token"] == TOKEN
        if "SSECustomerKey" in expected:
            driver.stat(large.location) if script.answers.update(head_object=[head()]) else None
            for operation in ("upload_part", "complete_multipart_upload"):
                assert script.of(operation)[0]["SSECustomerKey"] == bytes(range(32)), operation


def test_sdk_settings() -> None:
    driver = build(region="mars", addressing="path")
    driver.timeouts = Timeouts(connect=3, stall=4)
    client = driver._connect()
    try:
        config = client.meta.config
        assert config.retries == {"total_max_attempts": 1, "mode": "standard"}
        assert (config.connect_timeout, config.read_timeout) == (3, 4)
        assert config.max_pool_connections >= driver.limits.workers
        assert config.request_checksum_calculation == config.response_checksum_validation == "when_required"
        assert (client.meta.region_name, client.meta.endpoint_url) == ("mars", "https://s3.example.com")
    finally:
        client.close()


def test_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with pytest.raises(ConfigurationError, match="no-such-profile"):
        build(profile="no-such-profile")._connect()


# Locations


@pytest.mark.parametrize(
    ("endpoint", "uri"),
    [
        ("https://s3.example.com", "s3+https://s3.example.com/images/p-image"),
        ("https://S3.Example.com:443/", "s3+https://s3.example.com/images/p-image"),
        ("http://s3.example.com:80", "s3://s3.example.com/images/p-image"),
        ("http://127.0.0.1:7480", "s3://127.0.0.1:7480/images/p-image"),
        ("http://[::1]:7480", "s3://[::1]:7480/images/p-image"),
        ("s3.example.com", "s3+https://s3.example.com/images/p-image"),
        ("https://example.com/s3", "s3+https://example.com/s3/images/p-image"),
        (None, "s3+https://s3.amazonaws.com/images/p-image"),
    ],
)
def test_locations_as_glance_writes_them(endpoint: str | None, uri: str) -> None:
    driver = build(endpoint=endpoint, prefix="p-")
    upload = driver.create("image", UNKNOWN)
    assert upload.location.uri == uri
    assert upload.location.key == ("images", "p-image")
    rest = uri.partition("://")[2]
    for scheme in ("s3", "s3+http", "s3+https", "S3", "S3+HTTPS"):
        assert driver.parse(f"{scheme}://{rest}") == upload.location


def test_accepted_locations() -> None:
    driver = build(
        region="eu-west-1", accept_locations=["s3+https://Old.example.com:443/former/x/", "s3://s3.example.com/other"]
    )
    old = driver.parse("s3+https://old.example.com/former/x/image")
    assert old.key == ("former", "x/image")
    assert driver.parse(old.uri) == old
    assert driver.parse("s3://s3.example.com/other/image").key == ("other", "image")
    for uri in (
        "s3://old.example.com/former/y/image",
        "s3://old.example.com/images/image",
        "s3://s3.example.com/otherx",
    ):
        with pytest.raises(InvalidLocation):
            driver.parse(uri)
    assert build(endpoint=None, region="eu-west-1").parse("s3://s3.eu-west-1.amazonaws.com/images/image").key == (
        "images",
        "image",
    )
    former = build(accept_locations=["s3://former.example.com/images"])
    assert former.parse("s3://former.example.com/images/image").uri == "s3+https://s3.example.com/images/image"


@given(st.text(alphabet=string.printable + "é\u202e\0", max_size=40))
def test_locations_of_strangers(tail: str) -> None:
    driver = build(prefix="images/")
    for text in (f"s3://s3.example.com/images/images/{tail}", f"s3://s3.example.com/{tail}", f"s3://{tail}"):
        try:
            location = driver.parse(text)
        except InvalidLocation:
            continue
        bucket, key = location.key
        assert bucket == "images"
        assert key.startswith("images/")
        assert not any(part in ("", ".", "..") or part.startswith(".") for part in key.split("/"))
        assert driver.parse(location.uri) == location


# Errors


@pytest.mark.parametrize(
    ("error", "kind", "temporary"),
    [
        (refusal("NoSuchKey", 404), NotFound, False),
        (refusal("404", 404), NotFound, False),
        (refusal("NoSuchUpload", 404), NotFound, False),
        (refusal("NoSuchBucket", 404), ConfigurationError, False),
        (refusal("PermanentRedirect", 301), ConfigurationError, False),
        (refusal("AuthorizationHeaderMalformed", 400), ConfigurationError, False),
        (refusal("InvalidAccessKeyId", 403), Unauthenticated, False),
        (refusal("SignatureDoesNotMatch", 403), Unauthenticated, False),
        (refusal("ExpiredToken", 400), Unauthenticated, False),
        (refusal("RequestTimeTooSkewed", 403), Unauthenticated, False),
        (refusal("AccessDenied", 403), PermissionDenied, False),
        (refusal("UserSuspended", 403), PermissionDenied, False),
        (refusal("403", 403), PermissionDenied, False),
        (refusal("QuotaExceeded", 403), StoreFull, False),
        (refusal("413", 413), StoreFull, False),
        (refusal("XMinioStorageFull", 507), StoreFull, False),
        (refusal("507", 507), StoreFull, False),
        (refusal("EntityTooLarge", 400), LimitExceeded, False),
        (refusal("SlowDown", 503), RateLimited, True),
        (refusal("ThrottlingException", 400), RateLimited, True),
        (refusal("429", 429), RateLimited, True),
        (refusal("503", 503), Unavailable, True),
        (refusal("InternalError", 500), Unavailable, True),
        (refusal("InternalError", 200), Unavailable, True),
        (refusal("RequestTimeout", 400), StoreTimeout, True),
        (refusal("408", 408), StoreTimeout, True),
        (refusal("OperationAborted", 409), Unavailable, True),
        (refusal("ConditionalRequestConflict", 409), Unavailable, True),
        (refusal("BadDigest", 400), DigestMismatch, True),
        (refusal("InvalidRange", 416), Changed, False),
        (refusal("PreconditionFailed", 412), Changed, False),
        (refusal("NotImplemented", 501), Unsupported, False),
        (refusal("Teapot", 418), StoreError, False),
        (exceptions.ReadTimeoutError(endpoint_url="x"), StoreTimeout, True),
        (exceptions.ConnectTimeoutError(endpoint_url="x"), StoreTimeout, True),
        (exceptions.EndpointConnectionError(endpoint_url="x"), Unavailable, True),
        (exceptions.ConnectionClosedError(endpoint_url="x"), Unavailable, True),
        (exceptions.SSLError(endpoint_url="x", error="CERTIFICATE_VERIFY_FAILED"), ConfigurationError, False),
        (exceptions.SSLError(endpoint_url="x", error="EOF"), Unavailable, True),
        (exceptions.ResponseStreamingError(error="x"), Unavailable, True),
        (exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), Unavailable, True),
        (exceptions.NoCredentialsError(), Unauthenticated, False),
        (exceptions.UnauthorizedSSOTokenError(), Unauthenticated, False),
        (exceptions.ParamValidationError(report="x"), InvalidRequest, False),
        (ConnectionResetError(), Unavailable, True),
    ],
)
def test_errors(error: Exception, kind: type[StoreError], temporary: bool) -> None:
    ours = build().translate(error)
    assert type(ours) is kind
    assert ours.temporary is temporary


def test_time_out_while_sending() -> None:
    """What the server does not read any more fills the buffers; a server that answers nothing is known otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        driver = build(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}", conditional_writes="yes")
        driver.timeouts = Timeouts(connect=1, stall=0.1)
        driver._client = driver._connect()
        upload = driver.create("image", UNKNOWN)
        upload.write(block(bytes(32 * MIB), last=True))
        with pytest.raises(exceptions.BotoCoreError) as caught:
            upload.commit(32 * MIB)
        driver.close()
    ours = driver.translate(caught.value)
    assert isinstance(ours, StoreTimeout), f"{caught.value!r}"


def test_errors_tell_what_to_do() -> None:
    driver = build()

    def text(code: str, status: int) -> str:
        return str(driver.translate(refusal(code, status)))

    assert "images" in text("NoSuchBucket", 404)
    assert "create_bucket" in text("NoSuchBucket", 404)
    assert "clocks" in text("RequestTimeTooSkewed", 403)
    assert "region" in text("PermanentRedirect", 301)
    assert "images" in text("AccessDenied", 403)
    assert driver.translate(KeyError("x")) is None


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("soon", None), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0)])
def test_retry_after(header: str, seconds: float | None) -> None:
    ours = build().translate(refusal("503", 503, **{"retry-after": header}))
    assert isinstance(ours, Unavailable)
    assert ours.retry_after == seconds
    assert isinstance(ours, RateLimited) is (seconds is not None)


# Opening


def opened(script: Script, **values: Any) -> S3Driver:
    driver = build(**values)
    driver._connect = lambda: script  # type: ignore[method-assign]
    driver.open()
    return driver


def features(
    put: bool, complete: bool, age: timedelta = timedelta(), endpoint: str = "s3.example.com"
) -> dict[str, Any]:
    body = json.dumps({"endpoint": endpoint, "put": put, "complete": complete}).encode()
    return {"Body": io.BytesIO(body), "LastModified": NOW - age}


def test_features_are_looked_up() -> None:
    for put, complete in ((True, True), (True, False), (False, False)):
        script = Script(get_object=features(put, complete))
        driver = opened(script)
        assert driver.capabilities.collision == ("exclusive" if put and complete else "detected")
        assert script.operations == ["get_object"]


@pytest.mark.parametrize(
    "told",
    [
        refusal("NoSuchKey", 404),
        lambda **_: features(True, True, timedelta(days=8)),
        lambda **_: features(True, True, endpoint="elsewhere"),
        lambda **_: {"Body": io.BytesIO(b"nonsense"), "LastModified": NOW},
        lambda **_: {"Body": io.BytesIO(b"[]"), "LastModified": NOW},
    ],
    ids=["none", "old", "elsewhere", "nonsense", "list"],
)
def test_features_are_found_out(told: Any) -> None:
    failed = refusal("PreconditionFailed", 412)
    for put, complete, collision in (
        (failed, failed, "exclusive"),
        (failed, {}, "detected"),
        (failed, refusal("NotImplemented", 501), "detected"),
        (refusal("NotImplemented", 501), failed, "detected"),
        ({}, failed, "detected"),
    ):
        script = Script(
            get_object=told,
            put_object=[{}, put, {}],
            create_multipart_upload={"UploadId": "id"},
            upload_part={"ETag": '"e"'},
            complete_multipart_upload=complete,
            list_multipart_uploads=lambda **told: {"Uploads": [{"Key": told["Prefix"], "UploadId": "id"}]},
            list_parts=refusal("NoSuchUpload", 404),
        )
        assert opened(script).capabilities.collision == collision
        keys = {arguments["Key"] for operation, arguments in script.calls if "Key" in arguments}
        assert all(key.startswith(".imagestore/") for key in keys), "probes touch nothing of others"
        assert script.of("put_object")[-1]["Key"] == ".imagestore/features"
        probe = script.of("put_object")[0]["Key"]
        assert probe in [arguments["Key"] for arguments in script.of("delete_object")]
        assert script.of("abort_multipart_upload")[0]["Key"] == probe


def test_who_may_only_read_can_open() -> None:
    script = Script(get_object=refusal("NoSuchKey", 404), put_object=refusal("AccessDenied", 403))
    assert opened(script).capabilities.collision == "detected"


def test_bucket_is_missing() -> None:
    script = Script(get_object=refusal("NoSuchBucket", 404))
    with pytest.raises(exceptions.ClientError):
        opened(script)
    assert "create_bucket" not in script.operations
    for endpoint, region, expected in (
        ("https://s3.example.com", "mars", {}),
        (None, "eu-west-1", {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}}),
        (
            "https://s3.eu-west-1.amazonaws.com",
            "eu-west-1",
            {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}},
        ),
        (None, "us-east-1", {}),
    ):
        script = Script(get_object=refusal("NoSuchBucket", 404), create_bucket=refusal("BucketAlreadyOwnedByYou", 409))
        script.meta = type("Meta", (), {"region_name": region})
        opened(script, create_bucket=True, conditional_writes="no", endpoint=endpoint)
        assert script.of("create_bucket") == [{"Bucket": "images", **expected}]


# Writing


def test_one_block_is_one_request() -> None:
    for data, hints in ((b"data", SMALL), (b"data", UNKNOWN), (b"", UNKNOWN)):
        driver, script = scripted(put_object={"ETag": etag(data)})
        upload = driver.create("image", hints)
        if data:
            upload.write(block(data, last=True))
        upload.commit(len(data))
        upload.abort()
        assert script.operations == ["put_object"]
        assert script.of("put_object")[0]["IfNoneMatch"] == "*"


def test_mark_comes_first_and_goes_last() -> None:
    driver, script = scripted(**BEGUN)
    upload = driver.create("image", LARGE)
    assert script.operations == ["put_object", "create_multipart_upload", "put_object"]
    marks = script.of("put_object")
    assert marks[0]["Key"] == marks[1]["Key"]
    assert marks[0]["Key"].startswith(f".imagestore/uploads/{TOKEN}-")
    # In headers, which are signed.
    assert [mark["Metadata"] for mark in marks] == [
        {"imagestore-image": "image"},
        {"imagestore-image": "image", "imagestore-upload": "id"},
    ]
    upload.write(block(index=1, last=True))
    upload.write(block())
    upload.commit(8)
    upload.commit(8)
    done = script.of("complete_multipart_upload")
    assert len(done) == 1
    assert [part["PartNumber"] for part in done[0]["MultipartUpload"]["Parts"]] == [1, 2]
    assert done[0]["IfNoneMatch"] == "*"
    assert script.calls[-1] == ("delete_object", {"Bucket": "images", "Key": marks[0]["Key"]})
    upload.abort()
    assert "abort_multipart_upload" not in script.operations


def test_unknown_size_begins_with_the_second_block() -> None:
    driver, script = scripted(**BEGUN)
    upload = driver.create("image", UNKNOWN)
    assert not script.calls
    gate = threading.Barrier(3)

    def write(number: int) -> None:
        gate.wait(10)
        upload.write(block(index=number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert script.operations.count("create_multipart_upload") == 1
    assert script.operations.count("upload_part") == 3


def test_begin_goes_on_where_it_failed() -> None:
    broken = exceptions.ReadTimeoutError(endpoint_url="x")
    driver, script = scripted(
        put_object=[broken, {}, broken, {}],
        create_multipart_upload=[broken, {"UploadId": "id"}],
        upload_part={"ETag": etag()},
        list_parts=refusal("NoSuchUpload", 404),
    )
    upload = driver.create("image", UNKNOWN)
    for _ in range(3):
        with pytest.raises(exceptions.ReadTimeoutError):
            upload.write(block())
    upload.write(block())
    assert script.operations.count("create_multipart_upload") == 2
    assert script.of("put_object")[-1]["Metadata"]["imagestore-upload"] == "id"
    # The first attempt may have begun an upload that nobody knows: the mark stays for collect().
    upload.abort()
    assert script.of("abort_multipart_upload")[0]["UploadId"] == "id"
    assert "delete_object" not in script.operations


def test_create_that_fails_takes_back_what_it_can() -> None:
    driver, script = scripted(
        put_object=[{}, refusal("SlowDown", 503)],
        create_multipart_upload={"UploadId": "id"},
        list_parts=refusal("NoSuchUpload", 404),
    )
    with pytest.raises(exceptions.ClientError):
        driver.create("image", LARGE)
    assert script.operations[-3:] == ["abort_multipart_upload", "list_parts", "delete_object"]


def test_etags_are_compared() -> None:
    driver, script = scripted(**{**BEGUN, "upload_part": [{"ETag": etag(b"other")}, {"ETag": etag()}]})
    upload = driver.create("image", LARGE)
    with pytest.raises(DigestMismatch) as caught:
        upload.write(block())
    assert caught.value.temporary
    for half in ({"ETag": etag()[:9]}, {"ETag": '"'}, {}):
        script.answers["upload_part"] = [half, {"ETag": etag()}]
        with pytest.raises(Unavailable):
            upload.write(block())
    upload.write(block())
    assert script.of("upload_part")[0]["ContentMD5"] == base64.b64encode(bytes.fromhex(etag().strip('"'))).decode()
    for answer in ({"ETag": etag(b"other"), "ServerSideEncryption": "aws:kms"}, {"ETag": '"opaque"'}):
        driver, _ = scripted(**{**BEGUN, "upload_part": answer})
        driver.create("image", LARGE).write(block())


def test_small_image_with_another_etag() -> None:
    for there, raised, removed in (
        (head(tag=etag()), False, False),
        (head(tag=etag(b"other")), True, True),
        (head("f" * 32, tag=etag(b"other")), True, False),
    ):
        driver, script = scripted(put_object={"ETag": etag(b"other")}, head_object=there)
        upload = driver.create("image", SMALL)
        upload.write(block(last=True))
        if raised:
            with pytest.raises(DigestMismatch) as caught:
                upload.commit(4)
            assert not caught.value.temporary
        else:
            upload.commit(4)
        assert ("delete_object" in script.operations) is removed, "only what carries the token may go"


def test_taken_id() -> None:
    failed = refusal("PreconditionFailed", 412)
    for hints in (SMALL, LARGE):
        driver, script = scripted(
            **BEGUN,
            put_object=[{}, {}, failed] if hints is LARGE else failed,
            complete_multipart_upload=failed,
            list_parts=refusal("NoSuchUpload", 404),
        )
        upload = driver.create("image", hints)
        upload.write(block(last=hints is SMALL, index=0))
        with pytest.raises(AlreadyExists):
            upload.commit(4)
        upload.abort()
        assert upload.location.key[1] not in [arguments["Key"] for arguments in script.of("delete_object")]
    for hints in (SMALL, LARGE):
        driver, script = scripted(conditional=False, **BEGUN, head_object=head("f" * 32))
        upload = driver.create("image", hints)
        upload.write(block(last=hints is SMALL))
        with pytest.raises(AlreadyExists):
            upload.commit(4)
        assert "complete_multipart_upload" not in script.operations
        assert upload.location.key[1] not in [arguments["Key"] for arguments in script.of("put_object")]


def test_commit_repeated_where_conditions_are_ignored() -> None:
    driver, script = scripted(
        conditional=False,
        **BEGUN,
        head_object=[refusal("404", 404), head()],
        complete_multipart_upload=exceptions.ReadTimeoutError(endpoint_url="x"),
    )
    upload = driver.create("image", LARGE)
    upload.write(block())
    with pytest.raises(exceptions.ReadTimeoutError):
        upload.commit(4)
    upload.commit(4)
    assert script.operations.count("complete_multipart_upload") == 1
    assert "IfNoneMatch" not in script.of("complete_multipart_upload")[0]


@pytest.mark.parametrize("gone", [refusal("NoSuchUpload", 404), {}])
def test_parts_that_arrive_after_an_abort(gone: Any) -> None:
    driver, script = scripted(**BEGUN, list_parts=[{"Parts": [{}]}, gone])
    upload = driver.create("image", LARGE)
    with pytest.raises(Unavailable):
        upload.abort()
    assert "delete_object" not in script.operations, "the mark must stay as long as there may be parts"
    upload.abort()
    assert script.operations[-1] == "delete_object"


def test_versions_of_marks_are_removed() -> None:
    driver, script = scripted(
        **BEGUN,
        delete_object={"VersionId": "marker"},
        list_object_versions=lambda **told: {
            "Versions": [{"Key": told["Prefix"], "VersionId": "1"}, {"Key": told["Prefix"] + "x", "VersionId": "2"}],
            "DeleteMarkers": [{"Key": told["Prefix"], "VersionId": "marker"}],
        },
    )
    upload = driver.create("image", LARGE)
    upload.write(block())
    upload.commit(4)
    assert [arguments.get("VersionId") for arguments in script.of("delete_object")] == [None, "1", "marker"]


def test_metadata() -> None:
    given_metadata = {"name": "näïve – x", "empty": ""}
    driver, script = scripted(put_object={"ETag": etag(b"")})
    upload = driver.create("image", Hints(token=TOKEN, metadata=given_metadata))
    upload.commit(0)
    kept = script.of("put_object")[0]["Metadata"]
    assert all(text.isascii() for text in kept.values())
    answer = head()
    answer["Metadata"] = {name.title(): text for name, text in kept.items()}
    driver._client = Script(head_object=answer)
    stat = driver.stat(upload.location)
    assert (stat.token, stat.metadata) == (TOKEN, given_metadata)
    for odd in ("[]", "nonsense", '{"a": 1}'):
        answer["Metadata"] = {"imagestore-token": "odd", "imagestore-metadata": odd}
        stat = driver.stat(upload.location)
        assert (stat.token, stat.metadata) == (None, {})
    with pytest.raises(InvalidRequest):
        driver.create("image", Hints(token=TOKEN, metadata={"long": "x" * 2000}))


def test_body_goes_out_in_pieces() -> None:
    data = bytes(range(256)) * 5000
    body = Body(data)
    pieces = list(iter(lambda: body.read(16384), b""))
    assert b"".join(pieces) == data
    assert {len(piece) for piece in pieces[:-1]} == {256 * 1024}
    body.seek(0)
    assert (body.tell(), len(body), body.read()) == (0, len(data), data)
    assert (body.seek(-5, 2), body.seek(1, 1), body.read()) == (len(data) - 5, len(data) - 4, data[-4:])


def test_body_goes_out_without_asking() -> None:
    """An interim answer that is cut off must not be waited for."""
    heads: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                heads.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 100 Continue\r\n" if b"xpect" not in heads[0] else b"")

        thread = threading.Thread(target=serve)
        thread.start()
        driver = build(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}", conditional_writes="yes")
        driver._client = driver._connect()
        upload = driver.create("image", SMALL)
        upload.write(block(last=True))
        with pytest.raises(exceptions.ConnectionClosedError):
            upload.commit(4)
        driver.close()
        thread.join(10)
    assert heads
    assert b"expect:" not in heads[0].lower()


# Reading and deleting


class FakeBody(io.BytesIO):
    """A stream that ends, or breaks, where it is told."""


def reading(driver: S3Driver, start: int = 0, stop: int | None = None, version: str | None = None) -> Any:
    return driver.read(driver.parse("s3://s3.example.com/images/image"), start, stop, version)


def test_ranges() -> None:
    for start, stop, asked in ((0, None, None), (2, None, "bytes=2-"), (0, 3, "bytes=0-2"), (5, 10, "bytes=5-9")):
        whole = bytes(range(10))
        data = whole[start:stop]
        answer = {**head(size=len(data)), "Body": FakeBody(data)}
        if asked:
            answer["ContentRange"] = f"bytes {start}-{start + len(data) - 1}/10"
        driver, script = scripted(get_object=answer)
        found = reading(driver, start, stop, "e")
        assert found.stat.size == 10
        assert b"".join(found.chunks) == data
        assert script.of("get_object")[0].get("Range") == asked
        assert script.of("get_object")[0]["IfMatch"] == '"e"'


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ETag": '"other"'}, Changed),
        ({"ContentRange": None}, Unavailable),
        ({"ContentRange": "bytes 0-3/10"}, Unavailable),
        ({"ContentLength": 3}, Unavailable),
    ],
)
def test_answers_that_are_not_what_was_asked_for(changes: dict[str, Any], error: type[StoreError]) -> None:
    body = FakeBody(b"data")
    driver, _ = scripted(get_object={**head(), "Body": body, "ContentRange": "bytes 2-5/10", **changes})
    with pytest.raises(error):
        reading(driver, 2, 6, "e")
    assert body.closed


def test_replaced_while_reading() -> None:
    for error in (refusal("PreconditionFailed", 412), refusal("InvalidRange", 416)):
        driver, _ = scripted(get_object=error)
        with pytest.raises(exceptions.ClientError) as caught:
            reading(driver, 2, 6, "e")
        assert isinstance(driver.translate(caught.value), Changed)


def test_end_that_comes_too_early() -> None:
    driver, _ = scripted(get_object={**head(size=10), "Body": FakeBody(b"data")})
    chunks = reading(driver).chunks
    assert next(chunks) == b"data"
    with pytest.raises(Unavailable, match="6 bytes before the end"):
        next(chunks)


def test_closed_read() -> None:
    driver, _ = scripted(get_object={**head(), "Body": FakeBody(b"data")})
    found = reading(driver)
    found.close()
    found.close()
    with pytest.raises(Cancelled):
        next(found.chunks)


def test_delete_looks_first() -> None:
    driver, script = scripted(head_object=refusal("404", 404))
    with pytest.raises(NotFound):
        driver.delete(driver.parse("s3://s3.example.com/images/image"))
    assert script.operations == ["head_object"]


def test_closed_driver() -> None:
    driver = build()
    driver.close()
    with pytest.raises(Cancelled):
        driver.locate("image")


def test_sign() -> None:
    driver = build(region="mars", addressing="path")
    driver._client = driver._connect()
    try:
        location = driver.parse("s3://s3.example.com/images/image")
        url = driver.sign(location, 60)
        assert url.startswith("https://s3.example.com/images/image?X-Amz-Algorithm=AWS4-HMAC-SHA256")
        assert "X-Amz-Expires=60" in url
        for seconds in (0, 8 * 24 * 3600):
            with pytest.raises(InvalidRequest):
                driver.sign(location, seconds)
    finally:
        driver.close()
    key = base64.b64encode(bytes(32)).decode()
    with pytest.raises(Unsupported):
        build(encryption="customer", customer_key=key).sign(location, 60)


# Copying


def test_copy_in_parts_where_a_condition_decides() -> None:
    size = 600 * MIB
    driver, script = scripted(
        head_object=head(size=size), create_multipart_upload={"UploadId": "id"},
        upload_part_copy={"CopyPartResult": {"ETag": '"p"'}},
    )  # fmt: skip
    made = driver.copy(driver.parse("s3://s3.example.com/images/image"), "copy", Hints(token=TOKEN, size=size))
    assert made.key == ("images", "copy")
    ranges = sorted(arguments["CopySourceRange"] for arguments in script.of("upload_part_copy"))
    assert ranges == [f"bytes=0-{256 * MIB - 1}", f"bytes={256 * MIB}-{512 * MIB - 1}", f"bytes={512 * MIB}-{size - 1}"]
    assert all(arguments["CopySourceIfMatch"] == '"e"' for arguments in script.of("upload_part_copy"))
    assert script.of("complete_multipart_upload")[0]["IfNoneMatch"] == "*"
    assert script.operations[-1] == "delete_object"


def test_copy_in_one_where_nothing_decides() -> None:
    driver, script = scripted(conditional=False, head_object=[head(), refusal("404", 404)])
    driver.copy(driver.parse("s3://s3.example.com/images/image"), "copy", Hints(token=TOKEN, size=4))
    assert script.operations == ["head_object", "head_object", "copy_object"]
    assert script.of("copy_object")[0]["Metadata"] == {"imagestore-token": TOKEN}
    driver, script = scripted(conditional=False, head_object=[head(), head("f" * 32)])
    with pytest.raises(AlreadyExists):
        driver.copy(driver.parse("s3://s3.example.com/images/image"), "copy", Hints(token=TOKEN, size=4))


def test_copy_that_fails_asks_for_no_more_parts() -> None:
    size = 100 * 256 * MIB
    driver, script = scripted(
        head_object=head(size=size), create_multipart_upload={"UploadId": "id"},
        upload_part_copy=refusal("AccessDenied", 403), list_parts=refusal("NoSuchUpload", 404),
    )  # fmt: skip
    with pytest.raises(exceptions.ClientError):
        driver.copy(driver.parse("s3://s3.example.com/images/image"), "copy", Hints(token=TOKEN, size=size))
    assert len(script.of("upload_part_copy")) < 100
    assert "abort_multipart_upload" in script.operations


def test_copy_of_what_is_replaced() -> None:
    driver, script = scripted(
        head_object=head(size=MIB), create_multipart_upload={"UploadId": "id"},
        upload_part_copy=refusal("PreconditionFailed", 412), list_parts=refusal("NoSuchUpload", 404),
    )  # fmt: skip
    with pytest.raises(Changed):
        driver.copy(driver.parse("s3://s3.example.com/images/image"), "copy", Hints(token=TOKEN, size=MIB))
    assert "abort_multipart_upload" in script.operations
    assert script.operations[-1] == "delete_object"


# Leftovers

MARK = f".imagestore/uploads/{TOKEN}-01234567"


def marked(upload_id: str | None, image_id: str = "image", modified: datetime = NOW) -> Any:
    told = {"imagestore-image": image_id} | ({"imagestore-upload": upload_id} if upload_id else {})
    return lambda **_: {"Body": io.BytesIO(b"mark"), "Metadata": told, "LastModified": modified}


def test_uploads() -> None:
    later = NOW + timedelta(minutes=3)
    keys = [MARK, f"{MARK}.bak", ".imagestore/uploads/x"]
    driver, _ = scripted(
        list_objects_v2=lambda **told: {"Contents": [{"Key": key} for key in keys if key.startswith(told["Prefix"])]},
        get_object=marked("id"),
        list_parts=[
            {"Parts": [{"Size": 5, "LastModified": later}], "IsTruncated": True, "NextPartNumberMarker": 1},
            {"Parts": [{"Size": 6, "LastModified": NOW}]},
        ],
    )
    (found,) = driver.uploads()
    assert (found.token, found.image_id, found.bytes) == (TOKEN, "image", 11)
    assert (found.started, found.last_activity, found.alive) == (NOW, later, None)


@pytest.mark.parametrize("metadata", [{}, {"imagestore-image": "../x"}, {"imagestore-upload": "id"}, {"other": "x"}])
def test_what_looks_like_a_mark(metadata: dict[str, str]) -> None:
    driver, script = scripted(
        list_objects_v2=lambda **told: {"Contents": [{"Key": MARK}] if MARK.startswith(told["Prefix"]) else []},
        get_object=lambda **_: {"Body": io.BytesIO(b"text"), "Metadata": metadata, "LastModified": NOW},
    )
    assert not list(driver.uploads())
    driver.discard(Leftover(token=TOKEN, key=(MARK,)))
    assert set(script.operations) == {"list_objects_v2", "get_object"}


def test_discard() -> None:
    driver, script = scripted(get_object=marked("id"), list_parts=refusal("NoSuchUpload", 404))
    driver.discard(Leftover(token=TOKEN, key=(MARK,)))
    assert script.of("abort_multipart_upload") == [{"Bucket": "images", "Key": "image", "UploadId": "id"}]
    assert script.of("delete_object") == [{"Bucket": "images", "Key": MARK}]
    driver, script = scripted(get_object=refusal("NoSuchKey", 404))
    driver.discard(Leftover(token=TOKEN, key=(MARK,)))
    assert script.operations == ["get_object"]
    for key in ((), ("image",), (f"{MARK}.bak",), (".imagestore/features",), (".imagestore/probe-x",)):
        with pytest.raises(InvalidRequest):
            driver.discard(Leftover(token=TOKEN, key=key))


def test_mark_whose_head_was_cut_off() -> None:
    """An id that lacks its end must not decide what is removed."""
    driver, script = scripted(
        get_object=lambda **_: {"Body": io.BytesIO(b""), "Metadata": {"imagestore-image": "im"}, "LastModified": NOW}
    )
    with pytest.raises(Unavailable):
        driver.discard(Leftover(token=TOKEN, key=(MARK,)))
    assert script.operations == ["get_object"]


def test_discard_finds_what_was_begun_without_an_answer() -> None:
    other = f".imagestore/uploads/{'f' * 32}-01234567"
    uploads = {
        "stray": {"Key": "image", "Initiated": NOW + timedelta(seconds=2)},
        "claimed": {"Key": "image", "Initiated": NOW},
        "filled": {"Key": "image", "Initiated": NOW},
        "earlier": {"Key": "image", "Initiated": NOW - timedelta(hours=1)},
        "elsewhere": {"Key": "image2", "Initiated": NOW},
    }
    bodies = {MARK: marked(None), other: marked("claimed")}
    gone: list[str] = []

    def parts(UploadId: str, **_: Any) -> Any:  # noqa: N803 - the SDK's name
        if UploadId in gone:
            return refusal("NoSuchUpload", 404)
        return {"Parts": [{"Size": 1}] if UploadId == "filled" else []}

    driver, script = scripted(
        get_object=lambda **told: bodies[told["Key"]](),
        list_multipart_uploads={"Uploads": [{"UploadId": name, **told} for name, told in uploads.items()]},
        list_objects_v2={"Contents": [{"Key": MARK}, {"Key": other}]},
        list_parts=parts,
        abort_multipart_upload=lambda **told: gone.append(told["UploadId"]) or {},
    )
    driver.discard(Leftover(token=TOKEN, key=(MARK,)))
    assert gone == ["stray"]
    assert script.of("delete_object") == [{"Bucket": "images", "Key": MARK}]


# Answers that are cut off


@pytest.mark.parametrize(
    "head",
    [
        b'HTTP/1.1 200 OK\r\nETag: "e"\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 1',
        b'HTTP/1.1 200 OK\r\nETag: "e"\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n',
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\nETag: "e"\r\n',
        b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\nETag: "e',
        b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 10\r\nLast-Modified: Sun, 06 N',
        b'HTTP/1.1 200 OK\r\nETag: "e"\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: ',
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 20",
        b"",
    ],
)
# The SDK leaves the socket of such an answer to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_answer_cut_off_within_its_head(head: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def serve() -> None:
            with contextlib.suppress(OSError):
                for cut in (0, 1, 0):
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        # The same cut does not come twice.
                        connection.sendall(head[: len(head) - cut])

        thread = threading.Thread(target=serve)
        thread.start()
        driver = build(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}", conditional_writes="yes")
        driver._client = driver._connect()
        location = driver._location(driver._root, "image")
        for ask in (driver.stat, lambda place: driver.read(place, 0, None)):
            with pytest.raises(Exception) as caught:  # noqa: PT011 - judged below
                ask(location)
            ours = caught.value if isinstance(caught.value, StoreError) else driver.translate(caught.value)
            assert isinstance(ours, Unavailable), f"{caught.value!r}"
        driver.close()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
