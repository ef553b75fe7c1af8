"""Where a tensor's arithmetic runs: Triton kernels on a GPU, the plain PyTorch references elsewhere."""

import os

from torch import Tensor


def use_kernels(tensor: Tensor) -> bool:
    """True on CUDA, and on the CPU under TRITON_INTERPRET=1, where Triton's interpreter runs the kernels for tests."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
