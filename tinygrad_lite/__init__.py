"""A reverse-mode autograd engine on NumPy arrays, with the ops a Transformer needs.

Import it before NumPy: it chooses the number of BLAS threads, which NumPy reads as it loads.
"""

import ctypes
import os
import sys

if sys.version_info < (3, 10):
    sys.exit(f"tinygrad_lite needs Python 3.10 or later; this is {sys.version.split()[0]}")

# Each process uses one BLAS thread: on matrices as small as ours, several threads cost more than
# they bring. `parallel.launch` uses the other cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")  # NumPy from conda
os.environ.setdefault("VECLIB_MAXIMUM_THREADS", "1")  # macOS

# A training step allocates and frees the same few megabytes again and again. By default glibc, the
# C library of most Linux systems, returns large freed blocks to the operating system and then has
# to ask for them again, and a step takes 1.7 to 2 times as long. With these two settings it keeps
# them: blocks of up to 32 MB are recycled, and up to 256 MB of freed memory stay with the process.
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)

from . import functional  # noqa: E402  these import NumPy
from .gradcheck import gradcheck  # noqa: E402
from .optim import AdEMAMix, Adam, clip_grad_norm, cosine_schedule  # noqa: E402
from .parallel import World, launch  # noqa: E402
from .tensor import Tensor, no_grad  # noqa: E402

__all__ = [
    "AdEMAMix",
    "Adam",
    "Tensor",
    "World",
    "clip_grad_norm",
    "cosine_schedule",
    "functional",
    "gradcheck",
    "launch",
    "no_grad",
]
