"""Makes a torchvision that was built for another torch importable: it looks for two operators.

Networks that classify never call them.
"""

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def define_operators() -> torch.library.Library:
    """Define torchvision::nms and qnms while the result lives, where they are not."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}{_SIGNATURE}")
    return library
