"""A reverse-mode autograd engine on NumPy arrays, with the fused ops a Transformer needs."""
import ctypes
import os
import sys

# One BLAS thread a process: `parallel` gives each core whole lines. Read when NumPy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("VECLIB_MAXIMUM_THREADS", "1")  # macOS
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    # glibc gives freed arrays back to the system; getting new ones takes 0.7 of a step's time.
    _libc.mallopt(-1, 2 ** 28)  # M_TRIM_THRESHOLD: it keeps 256 MB at hand,
    _libc.mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD: also from arrays of up to 32 MB

from . import functional  # noqa: E402
from .gradcheck import gradcheck  # noqa: E402
from .optim import Adam, clip_grad_norm, cosine_schedule  # noqa: E402
from .parallel import World, launch  # noqa: E402
from .tensor import Tensor, no_grad  # noqa: E402
