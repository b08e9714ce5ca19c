"""What a driver's author gives to the kit: how to make the driver, and what the kit may do to its backend."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar
from unittest import SkipTest

from imagestore.driver import Driver

__all__ = ["Harness", "NotApplicable"]


class NotApplicable(SkipTest):
    """This check means nothing for this driver; the text says why. pytest and unittest take it as a skip."""


class Harness(ABC):
    """One backend for the kit to use, empty and for the kit alone.

    Three functions are needed: `make_driver`, `make_unreachable`, `close`. The others open further checks; what a
    harness leaves out is reported as not applicable, with the reason.

    Attributes:
        processes: another process can reach the same backend. The harness must then be picklable and its class
            importable; checks that kill and fork use a child process.
        kill_rounds: how often an adding child is killed.
        settle: seconds until the backend knows that a killed uploader is gone.
        trailing: seconds for which the backend may go on with what a killed client had sent.
        vanishing: unfinished uploads have no name and are gone with their process, so that ``uploads`` of another
            driver need not list them.
        auths_apart: the two `auths` don't see each other's images.
        sdk: modules that importing the driver's module must not import.
    """

    processes: ClassVar[bool] = False
    kill_rounds: ClassVar[int] = 6
    settle: ClassVar[float] = 0.0
    trailing: ClassVar[float] = 0.0
    vanishing: ClassVar[bool] = False
    auths_apart: ClassVar[bool] = False
    sdk: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def make_driver(self) -> Driver:
        """A new driver, not opened. All drivers of one harness share one backend: they see the same images."""

    @abstractmethod
    def make_unreachable(self) -> Driver | None:
        """A driver configured for a backend that is not there; None if there can be no such thing.

        Its time-outs should be short: the check waits for them.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the backend up. Called once, at the end."""

    def make_stalled(self) -> Driver:
        """A driver whose backend accepts connections and never answers, with short time-outs."""
        raise NotApplicable("the harness has no make_stalled()")

    def failing(self) -> AbstractContextManager[Callable[[], int]]:
        """While the context lasts the backend answers every request with a temporary failure.

        Gives a function that tells how many requests have come since: for finding retries that a driver, or the
        library below it, makes on its own.
        """
        raise NotApplicable("the harness has no failing(), which counts requests in the backend")

    def plant(self, data: bytes) -> str:
        """Put an image into the backend by other means and return its location: for drivers that only read."""
        raise NotApplicable("the harness has no plant(), which checks of a read-only driver need")

    def plant_foreign(self) -> Callable[[], None]:
        """Put objects of other tools into the backend, of every kind that could be taken for ours.

        Returns a function that asserts that all of them are still there, unchanged.
        """
        raise NotApplicable("the harness has no plant_foreign()")

    def hold(self, location: str) -> AbstractContextManager[None]:
        """Make the image in use while the context lasts, so that deleting it must fail with `InUse`."""
        raise NotApplicable("the harness has no hold(): it knows no way for an image to be in use")

    def auths(self) -> tuple[Any, Any]:
        """Two objects for ``bind`` which may both use the backend."""
        raise NotApplicable("the harness has no auths()")

    def hostile_locations(self) -> Iterable[str]:
        """Locations outside of what the driver was configured for, each of which must be an `InvalidLocation`."""
        raise NotApplicable("the harness has no hostile_locations()")

    def canary(self) -> AbstractContextManager[None]:
        """Put something worth protecting where the hostile locations point; assert at the end that it is whole."""
        return contextlib.nullcontext()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
