"""What pytest does first: find the project, load NumPy as the project does, set up hypothesis."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tinygrad_lite  # noqa: E402, F401  before NumPy, for its BLAS threads
from hypothesis import settings  # noqa: E402

# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No time limit for an example, because a busy machine is no error, and no database, because a run
# should not depend on what an earlier one left behind. In CI the examples are always the same.
settings.register_profile(
    "project", deadline=None, max_examples=25, database=None, derandomize="CI" in os.environ
)
settings.load_profile("project")
