"""The tests of this directory share `docpages`, and look into the extension that the pages are built with."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "docs" / "_ext")]
