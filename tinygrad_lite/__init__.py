"""A reverse-mode autograd engine on NumPy arrays, with the fused ops a Transformer needs.

The first statement must come before NumPy loads, when OpenBLAS reads its thread count. One BLAS
thread for each product leaves the cores to `parallel`, which gives each of them whole lines.
"""
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from . import functional  # noqa: E402
from .gradcheck import gradcheck  # noqa: E402
from .optim import Adam, clip_grad_norm, cosine_schedule  # noqa: E402
from .parallel import parallel_map, value_and_grad  # noqa: E402
from .tensor import Tensor, no_grad  # noqa: E402
