"""What pytest does first: find the project, load NumPy as the project does, set up hypothesis."""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinygrad_lite import parallel_map  # noqa: E402  before NumPy, for its BLAS threads
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A shell that starts the tests in the background has them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No database of earlier failures: a run depends on nothing that another run left behind.
settings.register_profile("default", deadline=None, max_examples=25, database=None)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", params=[1, 2, 4], ids="{} processes".format)
def map_fn(request):
    """A map over so many processes."""
    with parallel_map(request.param) as map_fn:
        yield map_fn
