"""The tests of this directory share `served`, and run on asyncio."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]


@pytest.fixture
def anyio_backend():
    return "asyncio"
