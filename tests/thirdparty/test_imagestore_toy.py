"""Proves the driver with the conformance kit: ``pytest test_imagestore_toy.py``."""

import shutil
import tempfile

from imagestore_toy import ToyDriver

from imagestore.driver import Options
from imagestore.testing import DriverConformance, Harness


class ToyHarness(Harness):
    processes = True

    def __init__(self):
        self.directory = tempfile.mkdtemp()

    def make_driver(self):
        return ToyDriver(Options({"database": f"{self.directory}/images.db"}), store="toy")

    def make_unreachable(self):
        return ToyDriver(Options({"database": f"{self.directory}/not/there/images.db"}), store="toy")

    def close(self):
        shutil.rmtree(self.directory)


class TestToy(DriverConformance):
    harness = ToyHarness
