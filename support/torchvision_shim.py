"""Makes a torchvision that was built for another torch importable.

Its import looks for two operators that its kernels would define; networks that classify never call
them. Where torchvision is absent or in order, nothing is done.
"""

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def define_missing_operators() -> torch.library.Library | None:
    """Define torchvision::nms and qnms, while the result lives, if the import needs it."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}{_SIGNATURE}")
        return library
    return None
