"""The package's own tests are for an environment in which it is installed: see tests/conformance/test_thirdparty.py."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("imagestore_toy") else ["test_imagestore_toy.py"]
