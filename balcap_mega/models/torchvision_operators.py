"""Make `import torchvision` work beside a CPU-only torch.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled part cannot load, which it tolerates, but
its Python part then registers shape functions for two operators that nobody defined, which it does not. The image
processors of transformers and vLLM use neither operator, so declaring their schemas is enough.
"""

import importlib.util

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare_torchvision_operators() -> None:
    """Declare torchvision's operators where its compiled part cannot (idempotent).

    Also a `torch.backends` entry point, which torch calls at the end of its own import in every process: so torch is
    imported here and not above, and `import balcap_mega` itself imports nothing.
    """
    import torch

    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
