"""What a step computes: call(modules, state, effects, *args, **kwargs), with the parameters that `state` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, layers
from ..layers import Update
from ..spec import BlockSpec, conv_spec, pair
from .shadow import leads_nowhere, shadow, shallow
from .steps import Arguments, Effects, Fusion, OwnState, State

__all__ = [
    "AttributeCall",
    "BlockCall",
    "ConvCall",
    "FunctionCall",
    "LinearCall",
    "MethodCall",
    "ModuleCall",
    "NormCall",
    "WholeCall",
]


class ModuleCall:
    """A module of torch's that the program does not look into. Its code may write to it: it runs on a shadow."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(
        self, modules: Mapping[str, nn.Module], state: State, effects: Effects | None, /, *args: Any, **kwargs: Any
    ) -> Any:
        module = modules[self.path]
        if isinstance(state, OwnState):
            return module(*args, **kwargs)
        prefix = f"{self.path}." if self.path else ""
        own = {} if module._modules else {**module._parameters, **module._buffers}
        names = [name for name, tensor in own.items() if tensor is not None]
        if not (names or module._modules):
            return module(*args, **kwargs)
        if not module._modules and leads_nowhere(module):
            return shallow(module, {name: state[prefix + name] for name in names})(*args, **kwargs)
        return self._on_shadow(modules, state, prefix, module, args, kwargs)

    def _on_shadow(
        self, modules: Any, state: State, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        twin = shadow(module, _Below(state, prefix) if prefix else state)
        result = twin(*args, **kwargs)
        if isinstance(state, dict):
            for name, buffer in twin.named_buffers():
                if state.get(prefix + name, buffer) is not buffer:  # one that the forward put in place of the given
                    state[prefix + name] = buffer
        if isinstance(modules, dict) and isinstance(self, WholeCall):
            modules[""] = twin
        return result


class _Below(Mapping[str, Tensor]):
    """A module's part of a state."""

    def __init__(self, state: State, prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.state.get(self.prefix + name, default)

    def __iter__(self) -> Any:
        return (name.removeprefix(self.prefix) for name in self.state if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class WholeCall(ModuleCall):
    """A network as one step, called with `Arguments`; any other value is its only argument.

    The next call begins with the shadow of the last one: what the network's code wrote to attributes is there.
    """

    def __init__(self) -> None:
        super().__init__("")

    def __call__(self, modules: Any, state: State, effects: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if isinstance(args[0], Arguments) else Arguments(args, {})
        module = modules[""]
        if isinstance(state, OwnState):
            return module(*given.args, **given.kwargs)
        return self._on_shadow(modules, state, "", module, given.args, given.kwargs)


class _Leaf:
    """A layer whose parameters are looked up by name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get(self, state: State, module: nn.Module, name: str, path: str | None = None) -> Any:
        where = self.path if path is None else path
        return None if getattr(module, name) is None else state[f"{where}.{name}" if where else name]


class ConvCall(_Leaf):
    def __call__(self, modules: Any, state: State, effects: Any, x: Tensor) -> Tensor:
        conv = modules[self.path]
        weight, bias = self.get(state, conv, "weight"), self.get(state, conv, "bias")
        return layers.convolve(conv, x, weight, bias, as_laid=True)


class LinearCall(_Leaf):
    def __init__(self, path: str, linear: nn.Linear) -> None:
        super().__init__(path)
        self.names = _present(path, linear, "weight", "bias")
        self.inputs, self.outputs = linear.in_features, linear.out_features

    def __call__(self, modules: Any, state: State, effects: Any, x: Tensor) -> Tensor:
        linear = modules[self.path]
        return functional.linear(x, self.get(state, linear, "weight"), self.get(state, linear, "bias"))


class NormCall(_Leaf):
    def __call__(self, modules: Any, state: State, effects: Effects | None, x: Tensor) -> Tensor:
        norm = modules[self.path]
        own = {name: self.get(state, norm, name) for name in layers.own_state(norm)}
        if not layers.uses_batch_statistics(norm):
            return F.batch_norm(
                x, own["running_mean"], own["running_var"], own["weight"], own["bias"], False, 0.0, norm.eps
            )
        y = F.batch_norm(x, None, None, own["weight"], own["bias"], True, 0.0, norm.eps)
        if norm.training and norm.track_running_stats:
            _do(layers.running_update(norm, own, *layers.moments(x), x.numel() // x.shape[1]), effects)
        return y


def _present(path: str, module: nn.Module, *names: str) -> tuple[str, ...]:
    """The parameters' full names, "" for one that the module does not have."""
    prefix = f"{path}." if path else ""
    return tuple(prefix + name if getattr(module, name) is not None else "" for name in names)


class BlockCall(_Leaf):
    """A fused block. Its result is contiguous, as that of the layers it stands for is where the images are; one that is
    `between` blocks hands its result on to other blocks alone, in the backend's own memory layout."""

    between = False  # set by the program that the block is a step of

    def __init__(self, fusion: Fusion, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__(fusion.conv)
        self.norm, self.size = fusion.norm, fusion.size
        self.names = _present(self.path, conv, "weight") + _present(self.norm, norm, "weight", "bias")
        self.bias = None if conv.bias is None else f"{self.path}.bias".lstrip(".")  # cancels in the norm
        self.inputs, self.outputs = conv.in_channels, conv.out_channels
        self.kernel = pair("kernel", conv.kernel_size, 1)
        assert not isinstance(conv.padding, str)
        convolution = conv_spec("conv_block", conv.stride, conv.padding, conv.dilation, conv.groups, self.kernel)
        self.spec = BlockSpec(convolution, norm.eps, fusion.size)

    def __call__(self, modules: Any, state: State, effects: Effects | None, x: Tensor) -> Tensor:
        conv, norm = modules[self.path], modules[self.norm]
        own = {name: self.get(state, norm, name, self.norm) for name in layers.own_state(norm)}
        weight, bias = self.get(state, conv, "weight"), self.get(state, conv, "bias")
        y, update = layers.fused_block(conv, norm, self.size, x, weight, bias, own)
        if update is not None:
            _do(update, effects)
        return y if self.between else y.contiguous()


def _do(update: Update, effects: Effects | None) -> None:
    update()
    if effects is not None:
        effects.append(update)


class FunctionCall:
    """A function or tensor method that needs no parameter of ours."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, modules: Any, state: Any, effects: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class MethodCall:
    def __init__(self, name: str) -> None:
        # A fused block's result may be channels-last, where view() refuses what it does on contiguous memory.
        self.name = name

    def __call__(self, modules: Any, state: Any, effects: Any, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        shape = self.name == "view" and not isinstance(args[0] if args else kwargs.get("dtype"), torch.dtype)
        return getattr(x, "reshape" if shape else self.name)(*args, **kwargs)


class AttributeCall:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, modules: Any, state: State, effects: Any) -> Tensor:
        return state[self.name]
