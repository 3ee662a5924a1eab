"""Makes torchvision importable with a CPU build of torch, for reference implementations that import it.

Releases of torchvision are built against torch with CUDA. With a CPU build its compiled operators do not load, and its
import fails at two operators that it registers. Its networks are plain Python and do not use them.
"""

import warnings

_LIBRARIES = []  # keeps the operators registered


def import_torchvision():
    """Imports torchvision, or skips the test if torch or torchvision is not installed."""
    import pytest

    torch = pytest.importorskip("torch", reason="needs torch==2.13.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Failed to load image Python extension"
        try:
            return pytest.importorskip("torchvision", reason="needs torchvision==0.28.0")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
            for name in ("nms", "qnms"):
                _LIBRARIES[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import torchvision

            return torchvision
