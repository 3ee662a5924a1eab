"""Makes torchvision importable beside a CPU build of torch, for the originals that import it.

Its releases are built against CUDA's torch: without that, its compiled operators do not load, and its import fails at
the two that it describes to torch. The networks it defines are Python and use none of them.
"""

import warnings

_LIBRARIES = []  # an operator lasts as long as its library


def import_torchvision():
    """Imports torchvision, or skips the test that asks for it where torch or torchvision is absent."""
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
