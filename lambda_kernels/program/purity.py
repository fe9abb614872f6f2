"""What of a program may be left out a second time, what writes in place, and what may share memory."""

from __future__ import annotations

from torch import fx, nn

from .. import layers
from ..layers import has_hooks
from .calls import FRESH_MODULES

__all__ = [
    "function_impurity",
    "is_fresh_function",
    "is_fresh_module",
    "is_in_place",
    "module_impurity",
    "tracks",
]

_RANDOM = (
    "dropout",
    "rrelu",
    "fractional",
    "rand",
    "bernoulli",
    "multinomial",
    "normal_",
    "poisson",
    "gumbel",
    "sample",
    "uniform",
    "exponential",
    "geometric",
    "cauchy",
)
_IN_PLACE = (
    "setitem",
    "delitem",
    *(
        f"i{name}"
        for name in (
            "add",
            "sub",
            "mul",
            "matmul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "and",
            "or",
            "xor",
            "lshift",
            "rshift",
        )
    ),
)
_KNOWN = ("torch", "_operator", "operator", "math", "builtins")
# Functions whose results never share memory with what they read; of any other it is assumed that they may.
_FRESH = frozenset(
    "add sub mul truediv floordiv mod pow matmul neg abs exp log sqrt rsqrt square bmm mm baddbmm cat concat stack "
    "where sigmoid tanh relu relu6 leaky_relu elu selu gelu silu mish hardswish hardtanh softplus softmax "
    "clone log_softmax "
    "normalize conv1d conv2d conv3d linear bilinear layer_norm group_norm max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum var std amax amin "
    "clamp".split()
)


def is_in_place(node: fx.Node, name: str) -> bool:
    """Whether a function or method, called `name`, writes into its first argument."""
    return (
        (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
        or (getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE)
    )


def is_fresh_function(node: fx.Node, name: str) -> bool:
    """Whether a function's result never shares memory with what it reads; it does where it writes in place."""
    return name in _FRESH and not is_in_place(node, name) and "out" not in node.kwargs


def is_fresh_module(module: nn.Module) -> bool:
    """As `is_fresh_function`, for a module that writes nothing in place."""
    return type(module).__module__.startswith(FRESH_MODULES) and not has_hooks(module)


def function_impurity(node: fx.Node, name: str) -> str | None:
    """Why a function may not be left out a second time."""
    drops = node.kwargs.get("dropout_p", node.args[4] if name.startswith("scaled_dot") and len(node.args) > 4 else 0.0)
    if any(word in name for word in _RANDOM) or drops != 0.0:
        return f"{name} draws random numbers"
    if name in ("batch_norm", "instance_norm"):
        return f"{name} may update running statistics"
    home = getattr(node.target, "__module__", "") or ""
    if node.op == "call_function" and home.split(".")[0] not in _KNOWN:
        return f"{name} is a function that the program knows nothing of"
    return None


def module_impurity(module: nn.Module) -> str | None:
    """Why a module may not be left out a second time."""
    for child in module.modules():
        kind = type(child).__name__
        if has_hooks(child):
            return f"{kind} has hooks"
        if kind.startswith("Fractional"):
            return f"{kind} draws random numbers"
        if tracks(child):
            return f"{kind} updates running statistics"
        if child.training and kind == "_SpectralNorm":
            return "spectral_norm moves its estimate in training mode"
        drops = getattr(child, "dropout", 0.0)
        random = "Dropout" in kind or kind == "RReLU" or (isinstance(drops, float) and drops > 0.0)
        if child.training and random:
            return f"{kind} draws random numbers in training mode"
        if not type(child).__module__.startswith(("torch.nn", layers.__name__)):
            return f"{kind} is a module that the program knows nothing of"
    return None


def tracks(module: nn.Module) -> bool:
    """Whether a norm updates running statistics."""
    return module.training and getattr(module, "running_mean", None) is not None
