"""Kernels for adapting networks under layer masks: fused, masked-backward convolution and linear ops for PyTorch.

`functional` holds the operations, `layers` the drop-in modules, `convert` puts them into a model, `use_backend` chooses
who computes. Importing this package touches no GPU and no network.
"""

from . import functional
from .backends import BackendError, use_backend
from .convert import convert, report, to_torch
from .layers import Conv2d, ConvBlock, Linear

__all__ = [
    "BackendError",
    "Conv2d",
    "ConvBlock",
    "Linear",
    "convert",
    "functional",
    "report",
    "to_torch",
    "use_backend",
]
__version__ = "0.1.0"
