"""Kernels for adapting networks under layer masks: fused, masked-backward convolution and linear ops for PyTorch.

`functional` holds the operations, `layers` the drop-in modules, `convert` puts them into a model, `use_backend` chooses
who computes, `register_backend` adds a backend of your own. Importing this package touches no GPU and no network.
"""

from . import functional
from .backends import BackendError, register_backend, use_backend
from .convert import convert, report, to_torch
from .layers import Conv2d, ConvBlock, Linear

__all__ = [
    "BackendError",
    "Conv2d",
    "ConvBlock",
    "Linear",
    "convert",
    "functional",
    "register_backend",
    "report",
    "to_torch",
    "use_backend",
]
__version__ = "0.1.0"
