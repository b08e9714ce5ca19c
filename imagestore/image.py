"""The life of an image: its statuses, what leads from one to another, and the image itself as a value.

The statuses are those of OpenStack's image service, and every transition that its API documents is allowed here too
(https://docs.openstack.org/glance/latest/user/statuses.html). This module knows no store: `imagestore.lifecycle` ties
an image's status to its data.

::

    image = Image(id="debian-13", disk_format="qcow2", container_format="bare")
    image = image.on(Event.UPLOAD_STARTED)          # saving
    image = image.on(Event.UPLOAD_FAILED)           # queued
    image.on(Event.RESTORED)                        # IllegalTransition: … an image that is queued may become …
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from imagestore.errors import IllegalTransition, InvalidRequest, WrongStatus

__all__ = ["EVENTS", "TRANSITIONS", "Event", "Image", "ImageLocation", "ImageStatus", "check_transition"]


class ImageStatus(StrEnum):
    """Where an image is in its life, and what that means to a client of the host."""

    QUEUED = "queued"
    """It is known, and has no data. Formats may be changed; data may be uploaded, staged or imported; it may be
    deleted."""

    SAVING = "saving"
    """Its data is being uploaded. Nothing can be read, and nothing changed. Deleting it ends the upload."""

    UPLOADING = "uploading"
    """Its data is being put into staging, or is there and waits to be imported. Nothing can be read. It may be
    imported when the data is there, and deleted."""

    IMPORTING = "importing"
    """Its data is being imported. Nothing can be read, and nothing changed. Deleting it ends the import."""

    ACTIVE = "active"
    """All of its data is stored and checked, and anybody whom the host lets may read it. It may be deactivated and
    deleted; its data never changes."""

    DEACTIVATED = "deactivated"
    """As active, but only an administrator may read it. It may be reactivated and deleted."""

    KILLED = "killed"
    """Its upload failed, and by the host's policy there is no second try. It has no data, and can only be deleted."""

    PENDING_DELETE = "pending_delete"
    """It is deleted, and its data is still to be removed. Nothing can be read. Until the removal begins it may be
    restored."""

    DELETED = "deleted"
    """It is gone, and none of its data is left. The record remains, so that the id is never used again."""


class Event(StrEnum):
    """What changes the status of an image."""

    UPLOAD_STARTED = "upload_started"
    """A client begins to send the data."""

    UPLOAD_COMPLETED = "upload_completed"
    """All of it is stored, and every check passed."""

    UPLOAD_FAILED = "upload_failed"
    """The upload failed and its data is gone: another may be tried. The policy of Glance's API version 2."""

    UPLOAD_KILLED = "upload_killed"
    """The upload failed and its data is gone, for good. The policy of Glance's API version 1."""

    STAGING_STARTED = "staging_started"
    """A client begins to send data into staging."""

    STAGING_FAILED = "staging_failed"
    """That failed, and the staged data is gone."""

    IMPORT_STARTED = "import_started"
    """Data begins to be imported, from staging or from elsewhere."""

    IMPORT_COMPLETED = "import_completed"
    """All of it is stored, and every check passed."""

    IMPORT_FAILED = "import_failed"
    """The import failed; its data is gone, and so is what was staged."""

    REGISTERED = "registered"
    """Data that a store holds already becomes that of the image."""

    DEACTIVATED = "deactivated"
    """An administrator closes the image to all others."""

    REACTIVATED = "reactivated"
    """The administrator opens it again."""

    DELETED = "deleted"
    """It is deleted, and has no data, or its data went before."""

    DELETE_DELAYED = "delete_delayed"
    """It is deleted, and its data is removed later."""

    SCRUBBED = "scrubbed"
    """The data of a deleted image was removed."""

    RESTORED = "restored"
    """A deleted image, which was active, comes back before its data was touched."""

    RESTORED_DEACTIVATED = "restored_deactivated"
    """The same, and it was deactivated."""


def _from(new: ImageStatus, *olds: ImageStatus) -> Mapping[ImageStatus, ImageStatus]:
    return MappingProxyType(dict.fromkeys(olds, new))


_S: Final = ImageStatus

EVENTS: Final[Mapping[Event, Mapping[ImageStatus, ImageStatus]]] = MappingProxyType(
    {
        Event.UPLOAD_STARTED: _from(_S.SAVING, _S.QUEUED),
        Event.UPLOAD_COMPLETED: _from(_S.ACTIVE, _S.SAVING),
        Event.UPLOAD_FAILED: _from(_S.QUEUED, _S.SAVING),
        Event.UPLOAD_KILLED: _from(_S.KILLED, _S.SAVING),
        Event.STAGING_STARTED: _from(_S.UPLOADING, _S.QUEUED),
        Event.STAGING_FAILED: _from(_S.QUEUED, _S.UPLOADING),
        Event.IMPORT_STARTED: _from(_S.IMPORTING, _S.QUEUED, _S.UPLOADING),
        Event.IMPORT_COMPLETED: _from(_S.ACTIVE, _S.IMPORTING),
        Event.IMPORT_FAILED: _from(_S.QUEUED, _S.IMPORTING),
        Event.REGISTERED: _from(_S.ACTIVE, _S.QUEUED),
        Event.DEACTIVATED: _from(_S.DEACTIVATED, _S.ACTIVE),
        Event.REACTIVATED: _from(_S.ACTIVE, _S.DEACTIVATED),
        Event.DELETED: _from(
            _S.DELETED, _S.QUEUED, _S.SAVING, _S.UPLOADING, _S.IMPORTING, _S.ACTIVE, _S.DEACTIVATED, _S.KILLED
        ),
        Event.DELETE_DELAYED: _from(
            _S.PENDING_DELETE, _S.QUEUED, _S.SAVING, _S.UPLOADING, _S.IMPORTING, _S.ACTIVE, _S.DEACTIVATED, _S.KILLED
        ),
        Event.SCRUBBED: _from(_S.DELETED, _S.PENDING_DELETE),
        Event.RESTORED: _from(_S.ACTIVE, _S.PENDING_DELETE),
        Event.RESTORED_DEACTIVATED: _from(_S.DEACTIVATED, _S.PENDING_DELETE),
    }
)
"""For each event, the statuses in which it may happen, and the status that each leads to."""


def _transitions() -> Mapping[ImageStatus, Mapping[ImageStatus, tuple[Event, ...]]]:
    found: dict[ImageStatus, dict[ImageStatus, tuple[Event, ...]]] = {status: {} for status in ImageStatus}
    for event, steps in EVENTS.items():
        for old, new in steps.items():
            found[old][new] = (*found[old].get(new, ()), event)
    return MappingProxyType({old: MappingProxyType(news) for old, news in found.items()})


TRANSITIONS: Final[Mapping[ImageStatus, Mapping[ImageStatus, tuple[Event, ...]]]] = _transitions()
"""For each status, those that an image may go to from there, and the events that lead to each; made from `EVENTS`."""


def check_transition(old: ImageStatus, new: ImageStatus) -> None:
    """Raise `IllegalTransition`, which names what is allowed, unless an image may go from ``old`` to ``new``."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"an image that is {old} can't become {new}; {_allowed(old)}")


def _allowed(old: ImageStatus) -> str:
    news = list(TRANSITIONS[old])
    if not news:
        return "it stays so for ever"
    head = ", ".join(news[:-1])
    return f"it may become {f'{head} or {news[-1]}' if head else news[-1]}"


_WITH_FORMATS: Final = frozenset({_S.SAVING, _S.UPLOADING, _S.IMPORTING, _S.ACTIVE, _S.DEACTIVATED})
_WITH_DATA: Final = frozenset({_S.ACTIVE, _S.DEACTIVATED})
_WITHOUT_DATA: Final = frozenset({_S.QUEUED, _S.SAVING, _S.UPLOADING, _S.IMPORTING, _S.KILLED})


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLocation:
    """Where data of an image is: the name of a store, and the location in it (``str`` of a `Location`'s ``uri``)."""

    store: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image as its host knows it. It never changes: what happens to it makes a new one.

    Raises `InvalidRequest` when the values don't go together: an image has formats from the moment on that data is
    sent, locations and a size if and only if there is data, and neither size nor digests while there is none.

    Attributes:
        id: its id, also in the store, as far as its first upload succeeds.
        status: where it is in its life.
        disk_format, container_format: what it is declared to be; needed before any data, and fixed from then on.
        size: length of its data in bytes.
        virtual_size: length in bytes of the disk that a guest sees, where the format tells.
        digests: algorithm to lower-case hexadecimal digest of its data.
        locations: where its data is.
        protected: it can't be deleted.
        created_at, updated_at, deleted_at: timezone-aware.
        before_delete: the status that it had when its delayed deletion began.
    """

    id: str
    status: ImageStatus = ImageStatus.QUEUED
    disk_format: str | None = None
    container_format: str | None = None
    size: int | None = None
    virtual_size: int | None = None
    digests: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    locations: tuple[ImageLocation, ...] = ()
    protected: bool = False
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None
    before_delete: ImageStatus | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "digests", MappingProxyType(dict(self.digests)))
        if self.status in _WITH_FORMATS and None in (self.disk_format, self.container_format):
            raise InvalidRequest(
                f"an image that is {self.status} has a disk_format and a container_format: declare them first",
                image_id=self.id,
            )
        if self.status in _WITH_DATA and (self.size is None or not self.locations):
            raise InvalidRequest(f"an image that is {self.status} has a size and a location", image_id=self.id)
        if self.status in _WITHOUT_DATA and (self.size, self.virtual_size, *self.digests, *self.locations) != (
            None,
            None,
        ):
            raise InvalidRequest(f"an image that is {self.status} has no size, digests and locations", image_id=self.id)
        if self.status is ImageStatus.DELETED and self.locations:
            raise InvalidRequest("an image that is deleted has no locations", image_id=self.id)

    def on(
        self,
        event: Event,
        *,
        at: datetime | None = None,
        size: int | None = None,
        virtual_size: int | None = None,
        digests: Mapping[str, str] | None = None,
        locations: tuple[ImageLocation, ...] = (),
    ) -> Image:
        """The image after ``event``, which happened ``at`` that time.

        Size, digests and locations come with what makes an image active that had no data before, and only with that.
        They are cleared when it goes back to ``queued``; an image that is deleted keeps size and digests.

        Raises `IllegalTransition` if the event can't happen in this status, and `InvalidRequest` if the image has no
        formats yet and needs them.
        """
        new = EVENTS[event].get(self.status)
        if new is None:
            raise IllegalTransition(
                f"{event} can't happen to an image that is {self.status}; {_allowed(self.status)}", image_id=self.id
            )
        changes: dict[str, Any] = {"status": new}
        given = {"size": size, "virtual_size": virtual_size, "digests": digests or {}, "locations": tuple(locations)}
        if new is ImageStatus.ACTIVE and self.status in _WITHOUT_DATA:
            changes |= given
        elif any(given.values()) or size is not None:
            raise InvalidRequest(f"no data comes with {event}", image_id=self.id)
        if new is ImageStatus.QUEUED:
            changes |= given
        if at is not None:
            changes["updated_at"] = at
        if event in {Event.DELETED, Event.DELETE_DELAYED}:
            changes |= {"deleted_at": at, "before_delete": self.status}
        elif event in {Event.RESTORED, Event.RESTORED_DEACTIVATED}:
            changes |= {"deleted_at": None, "before_delete": None}
        if new is ImageStatus.DELETED:
            changes["locations"] = ()
        return dataclasses.replace(self, **changes)

    def declare(self, *, disk_format: str | None = None, container_format: str | None = None) -> Image:
        """The image with these formats; None leaves what it has. Raises `WrongStatus` unless it is ``queued``."""
        if self.status is not ImageStatus.QUEUED:
            raise WrongStatus(f"the formats of an image that is {self.status} can't be changed", image_id=self.id)
        return dataclasses.replace(
            self,
            disk_format=disk_format or self.disk_format,
            container_format=container_format or self.container_format,
        )

    def readable(self, *, administrator: bool = False) -> bool:
        """Whether its data may be read: in ``active``, and in ``deactivated`` by an administrator."""
        return self.status is ImageStatus.ACTIVE or (administrator and self.status is ImageStatus.DEACTIVATED)

    def check_readable(self, *, administrator: bool = False) -> None:
        """Raise `WrongStatus` if its data may not be read."""
        if not self.readable(administrator=administrator):
            who = " but by an administrator" if self.status is ImageStatus.DEACTIVATED else ""
            raise WrongStatus(f"an image that is {self.status} can't be read{who}", image_id=self.id)
