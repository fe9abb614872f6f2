"""A module as a program: its torch.fx graph, conv-norm-ReLU-pool runs fused, every step knowing what it reads.

A step computes with parameters that are handed to it by name, so the same program runs the module itself, its adapted
copies, and parts of it (a frozen prefix once, the rest every inner step). Programs hold paths, never modules, so that
all modules of the same structure share one.
"""

from __future__ import annotations

import copy
import operator
import pickle
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional, layers
from .layers import ConvBlock, Update, has_hooks
from .seen import BASE, SCALARS, Seen
from .spec import BlockSpec, ConvSpec, pair

__all__ = ["Fusion", "Program", "Step", "memo_of", "program_of", "tensors_of"]

State = Mapping[str, Tensor]
EVALUATION = "the norm is in evaluation mode, with running statistics"
Effects = list[Update]


@dataclass(frozen=True)
class Slot:
    """The place of a value in the environment of a run."""

    index: int


@dataclass(frozen=True)
class Fusion:
    """A run of layers that one fused block computes; paths are "" for a function in place of a module."""

    conv: str
    norm: str
    relu: str
    pool: str
    size: int  # pooling window, 1 for none


@dataclass(frozen=True)
class Step:
    """One computation of a program."""

    slot: int
    label: str
    kind: str  # "block", "conv", "linear", "norm", "flatten", "size", "module", "function" or "attribute"
    call: Callable[..., Any]  # call(modules, state, effects, *args, **kwargs)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]  # slots
    parameters: tuple[str, ...]  # names, as in named_parameters
    layer: tuple[str, str] | None = None  # paths of a Conv2d or Linear and, where one belongs to it, of its norm
    not_reusable: str | None = None  # why a second run with the same inputs may not be left out
    writes: tuple[int, ...] = ()  # slots whose tensors are written in place
    tracks: bool = False  # updates running statistics


@dataclass(frozen=True, eq=False)
class Program:
    """The steps of a module in the order of execution."""

    steps: tuple[Step, ...]
    inputs: int
    result: Any
    fusions: tuple[Fusion, ...]
    left_alone: dict[str, str]  # path of a convolution that no block computes -> why
    paths: tuple[str, ...]  # modules that the steps use
    untraceable: str | None = None  # why the module is one opaque step
    aliases: dict[str, str] = field(default_factory=dict)  # second names of shared tensors -> their first
    memory: tuple[int, ...] = (0, 1)  # for each slot a number; slots that may share memory have the same

    def bind(self, root: nn.Module) -> dict[str, nn.Module]:
        """The modules that the steps use, by path."""
        return {path: _at(root, path) for path in self.paths}

    def __call__(self, root: nn.Module, *inputs: Tensor) -> Any:
        """The module's result, with its own parameters."""
        return self.evaluate(self.bind(root), OwnState(root), *inputs)

    def evaluate(self, modules: Mapping[str, nn.Module], state: State, *inputs: Tensor) -> Any:
        """The module's result with the given parameters and buffers."""
        env = dict(enumerate(inputs))
        self.run(self.whole, modules, state, env)
        return self.take(env)

    @cached_property
    def whole(self) -> list[tuple[Step, tuple[int, ...]]]:
        """All steps."""
        return self.part(range(len(self.steps)), ())

    @property
    def result_slots(self) -> list[int]:
        """The slots that the program's result is made of."""
        return _slots(self.result)

    def take(self, env: dict[int, Any]) -> Any:
        """The program's result out of a run's environment."""
        return _resolve(self.result, env)

    def part(self, indices: Iterable[int], keep: Iterable[int]) -> list[tuple[Step, tuple[int, ...]]]:
        """Some steps, each with the slots that no later one of them reads and that are neither result nor in `keep`."""
        steps = [self.steps[i] for i in indices]
        wanted = {*keep, *self.result_slots, *range(self.inputs)}
        part = []
        for step in reversed(steps):
            last = {step.slot, *step.reads} - wanted
            wanted |= last
            part.append((step, tuple(last)))
        return part[::-1]

    def run(
        self,
        part: Sequence[tuple[Step, tuple[int, ...]]],
        modules: Mapping[str, nn.Module],
        state: State,
        env: dict[int, Any],
        effects: Effects | None = None,
    ) -> None:
        """Run a part with the given parameters and buffers; results go to `env`, updates of running statistics are made
        and, for a caller that will leave out later runs, noted in `effects`."""
        for step, done in part:
            args, kwargs = _resolve(step.args, env), _resolve(step.kwargs, env)
            env[step.slot] = step.call(modules, state, effects, *args, **kwargs)
            for slot in done:
                env.pop(slot, None)


def _at(root: nn.Module, path: str) -> nn.Module:
    """root.get_submodule(path), in a tenth of its time."""
    module: Any = root
    for name in path.split(".") if path else ():
        module = module._modules[name]
    return module


class OwnState(Mapping[str, Tensor]):
    """The parameters and buffers that a module has at the moment, by name."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __getitem__(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.root.get_submodule(path), leaf)

    def __iter__(self) -> Any:
        return iter(self.root.state_dict(keep_vars=True))

    def __len__(self) -> int:
        return len(self.root.state_dict(keep_vars=True))


def _slots(value: Any) -> list[int]:
    found: list[int] = []
    _resolve(value, None, found)
    return found


def _resolve(value: Any, env: dict[int, Any] | None, found: list[int] | None = None) -> Any:
    """The value with each Slot replaced by what `env` holds; with env None, the slots are noted in `found` instead."""
    kind = type(value)
    if kind is Slot:
        if env is None:
            assert found is not None
            found.append(value.index)
            return None
        return env[value.index]
    if kind is tuple or kind is list:
        return kind([_resolve(v, env, found) for v in value])
    if kind is dict:
        return {k: _resolve(v, env, found) for k, v in value.items()}
    if kind is slice:
        return slice(*(_resolve(v, env, found) for v in (value.start, value.stop, value.step)))
    return value


# Which structure a program belongs to.

_CACHE: OrderedDict[Any, Program] = OrderedDict()
_CACHE_SIZE = 128
_LOCK = threading.Lock()
# Held while torch.func.functional_call has put other tensors into a module, and by whoever reads a module's tensors.
SWAP = threading.RLock()
_SEEN: WeakKeyDictionary[nn.Module, tuple[Seen, Program]] = WeakKeyDictionary()


class _Same:
    """Compares by identity, and keeps the object so that its identity is not given to another."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _freeze(value: Any, depth: int = 4) -> Any:
    """What the value is now, hashable: containers and plain objects by what they hold, `depth` levels deep."""
    if type(value) in SCALARS:
        return value
    if depth == 0 or isinstance(value, (Tensor, nn.Module, type)):
        return _Same(value)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_freeze(v, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_freeze(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return dict, tuple((_freeze(k, depth - 1), _freeze(v, depth - 1)) for k, v in value.items())
    held = getattr(value, "__dict__", None)
    return (_Same(value), _freeze(held, depth - 1)) if isinstance(held, dict) and held else _Same(value)


def _fingerprint(root: nn.Module) -> tuple[Any, ...]:
    """All that a module's trace can depend on: classes, modes, hooks, plain attributes, which tensors there are."""
    parts: list[Any] = []
    seen: dict[int, str] = {}
    numbers: dict[int, int] = {}
    for path, module in root.named_modules():
        state = module.__dict__
        parts += (path, type(module), module.training, has_hooks(module))
        for name, child in state["_modules"].items():
            parts += (name, child is None or numbers.setdefault(id(child), len(numbers)))
        for group in (state["_parameters"], state["_buffers"]):
            for name, tensor in group.items():
                parts += (name, tensor is None or seen.setdefault(id(tensor), f"{path}.{name}"))
        for name, value in state.items():
            if name not in BASE:
                parts += (name, value if type(value) in SCALARS else _freeze(value))
    return tuple(parts)


def program_of(root: nn.Module, called: bool = False) -> Program:
    """The program of a module in its present mode; a module that torch.fx cannot trace is one opaque step.

    The program does what the module's forward does; with `called`, what calling it does, its own hooks included.
    """
    with SWAP:
        last = _SEEN.get(root)
        if last is not None and last[0].holds(root):
            return last[1]
        hooked = called and has_hooks(root)
        key = (_fingerprint(root), hooked)
        seen = Seen(root)
    program = _program(root, key, hooked)
    if seen.complete:  # else it is never found to hold, and what it keeps may lead back to the root
        with SWAP:
            _SEEN[root] = seen, program
    return program


def memo_of(root: nn.Module) -> dict[Any, Any] | None:
    """A place for what was made of a module, empty once the module is not what it was; None where that cannot be told.

    Its parameters are the same objects for as long; their values, shapes and devices may change.
    """
    with SWAP:
        last = _SEEN.get(root)
        return last[0].memo if last is not None and last[0].holds(root) else None


def tensors_of(root: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the buffers of a module, by every name that they have."""
    with SWAP:
        last = _SEEN.get(root)
        seen = last[0] if last is not None and last[0].holds(root) else Seen(root)
        parameters, buffers = ({n: group[k] for n, group, k in found} for found in (seen.parameters, seen.buffers))
    return parameters, buffers


def _program(root: nn.Module, key: Any, hooked: bool) -> Program:
    with _LOCK:
        if key in _CACHE:
            _CACHE.move_to_end(key)
            return _CACHE[key]
    program = _opaque(root, "it has hooks of its own") if hooked else _build(root)
    with _LOCK:
        program = _CACHE.setdefault(key, program)
        while len(_CACHE) > _CACHE_SIZE:
            _CACHE.popitem(last=False)
    return program


# From a module to its fx graph.


class _Value(fx.Proxy):
    """A symbolic value on which `x += y` and `x[i] = y` are in-place steps, as they are on a tensor."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Input(_Value):
    """A symbolic input that passes for a tensor: `isinstance(x, Tensor)` in a forward takes a real call's branch."""

    @property
    def __class__(self) -> type:
        return Tensor

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of an input is fixed")


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m).__module__ == layers.__name__ or super().is_leaf_module(m, module_qualified_name):
            return True
        if has_hooks(m) and any(isinstance(child, LAYERS) for child in m.modules()):
            raise fx.proxy.TraceError(f"{module_qualified_name} holds layers and has hooks")
        return has_hooks(m)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise fx.proxy.TraceError("its forward switches gradients or autocast for a part of it")
        return super().create_node(kind, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return (_Input if node.op == "placeholder" else _Value)(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Input:
            return a.node
        if isinstance(a, Tensor) and not any(a is t for t in (*self.root.parameters(), *self.root.buffers())):
            raise fx.proxy.TraceError(f"its forward uses a tensor {list(a.shape)} that is no parameter or buffer")
        return super().create_arg(a)


def _modes() -> tuple[Any, ...]:
    """What a `with` in a forward can change and a graph does not hold."""
    devices = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _trace(root: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    if "forward" in root.__dict__:
        raise fx.proxy.TraceError("its forward was replaced on the instance")
    if hasattr(type(root), "unfused_forward"):
        tracer.traced_func_name = "unfused_forward"
    return tracer.trace(root)


def _stand_in(root: nn.Module) -> nn.Module:
    """Copies of modules and buffers around the same parameters: a trace runs the forward, which may write to `self`."""
    memo: dict[int, Any] = {}
    for module in root.modules():
        for group in (module._parameters, module.__dict__):
            memo.update({id(value): value for value in group.values() if isinstance(value, Tensor)})
    return copy.deepcopy(root, memo)


def _versions(root: nn.Module) -> list[int]:
    return [t._version for t in (*root.parameters(), *root.buffers())]


def _outside() -> tuple[Any, ...]:
    """The states of the global random number generators."""
    return torch.random.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())


def _spelled(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(n.op, str(n.target), repr(n.args), repr(n.kwargs)) for n in graph.nodes]


def _build(root: nn.Module) -> Program:
    torch_state, python_state, numpy_state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        twin = _stand_in(root)
        before = _fingerprint(twin), _versions(twin), _outside()
        graph = _trace(twin)
        with torch.set_grad_enabled(not torch.is_grad_enabled()):
            again = _trace(twin)
        if (_fingerprint(twin), _versions(twin), _outside()) != before:
            raise fx.proxy.TraceError("its forward draws random numbers in Python or writes to attributes or buffers")
        if _spelled(graph) != _spelled(again):
            raise fx.proxy.TraceError("its forward does not do the same twice, with gradients and without")
        return _Builder(root, graph).program()
    except Exception as error:  # whatever a forward raises on a symbolic input
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return _opaque(root, reason)
    finally:
        torch.random.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _opaque(root: nn.Module, reason: str) -> Program:
    names = tuple(name for name, _ in root.named_parameters())
    step = Step(1, type(root).__name__, "module", _Module(""), (Slot(0),), {}, (0,), names, not_reusable=reason)
    return Program((step,), 1, Slot(1), (), {}, ("",), reason, _aliases(root))


def _aliases(root: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)):
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases


# From the graph to steps.

_CONV = (nn.Conv2d, layers.Conv2d)
_LINEAR = (nn.Linear, layers.Linear)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
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
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_KNOWN = ("torch", "_operator", "operator", "math", "builtins")
# Their results never share memory with what they read; of any other function it is assumed that they may.
_FRESH = frozenset(
    "add sub mul truediv floordiv mod pow matmul neg abs exp log sqrt rsqrt square bmm mm baddbmm cat concat stack "
    "where sigmoid tanh relu relu6 leaky_relu elu selu gelu silu mish hardswish hardtanh softplus softmax "
    "clone log_softmax "
    "normalize conv1d conv2d conv3d linear bilinear layer_norm group_norm max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum var std amax amin "
    "clamp".split()
)
_FRESH_MODULES = tuple(
    f"torch.nn.modules.{name}"
    for name in ("activation", "pooling", "conv", "linear", "normalization", "batchnorm", "instancenorm")
)


class _Module:
    """A module that the program does not look into."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(
        self, modules: Mapping[str, nn.Module], state: State, effects: Effects | None, *args: Any, **kwargs: Any
    ) -> Any:
        module = modules[self.path]
        if isinstance(state, OwnState):
            with SWAP:
                return module(*args, **kwargs)
        prefix = f"{self.path}." if self.path else ""
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        if not names:
            return module(*args, **kwargs)
        tensors = {name: state[prefix + name] for name in names}
        if not module._modules and not has_hooks(module) and type(module).__module__.startswith(_FRESH_MODULES):
            return _twin(module, tensors)(*args, **kwargs)
        with SWAP:
            return torch.func.functional_call(module, tensors, args, kwargs)


def _twin(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A childless module with other tensors, in which everything else is shared with the given one."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for group in ("_parameters", "_buffers"):
        twin.__dict__[group] = {n: None if t is None else tensors[n] for n, t in module.__dict__[group].items()}
    return twin


class _Leaf(_Module):
    """A layer whose parameters are looked up by name."""

    def get(self, state: State, module: nn.Module, name: str, path: str | None = None) -> Any:
        return None if getattr(module, name) is None else state[f"{self.path if path is None else path}.{name}"]


class _Conv(_Leaf):
    def __call__(self, modules: Any, state: State, effects: Any, x: Tensor) -> Tensor:
        conv = modules[self.path]
        return layers.convolve(conv, x, self.get(state, conv, "weight"), self.get(state, conv, "bias"))


class LinearCall(_Leaf):
    def __init__(self, path: str, linear: nn.Linear) -> None:
        super().__init__(path)
        self.names = _present(path, linear, "weight", "bias")
        self.inputs, self.outputs = linear.in_features, linear.out_features

    def __call__(self, modules: Any, state: State, effects: Any, x: Tensor) -> Tensor:
        linear = modules[self.path]
        return functional.linear(x, self.get(state, linear, "weight"), self.get(state, linear, "bias"))


class _Norm(_Leaf):
    def __call__(self, modules: Any, state: State, effects: Effects | None, x: Tensor) -> Tensor:
        norm = modules[self.path]
        own = {name: self.get(state, norm, name) for name in layers.own_state(norm)}
        if not layers.uses_batch_statistics(norm):
            return F.batch_norm(
                x, own["running_mean"], own["running_var"], own["weight"], own["bias"], False, 0.0, norm.eps
            )
        y = F.batch_norm(x, None, None, own["weight"], own["bias"], True, 0.0, norm.eps)
        if norm.training and norm.track_running_stats:
            axes = [a for a in range(x.dim()) if a != 1]
            variance, mean = torch.var_mean(x.detach(), axes, correction=0)
            _make(layers.running_update(norm, own, mean, variance, x.numel() // x.shape[1]), effects)
        return y


def _present(path: str, module: nn.Module, *names: str) -> tuple[str, ...]:
    """The parameters' full names, "" for one that the module does not have."""
    return tuple(f"{path}.{name}" if getattr(module, name) is not None else "" for name in names)


class BlockCall(_Leaf):
    def __init__(self, fusion: Fusion, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__(fusion.conv)
        self.norm, self.size = fusion.norm, fusion.size
        self.names = _present(self.path, conv, "weight") + _present(self.norm, norm, "weight", "bias")
        self.inputs, self.outputs = conv.in_channels, conv.out_channels
        self.kernel = pair("kernel", conv.kernel_size, 1)
        stride, dilation = pair("stride", conv.stride, 1), pair("dilation", conv.dilation, 1)
        assert not isinstance(conv.padding, str)
        convolution = ConvSpec(stride, pair("padding", conv.padding, 0), dilation, conv.groups)
        self.spec = BlockSpec(convolution, norm.eps, fusion.size)

    def __call__(self, modules: Any, state: State, effects: Effects | None, x: Tensor) -> Tensor:
        conv, norm = modules[self.path], modules[self.norm]
        own = {name: self.get(state, norm, name, self.norm) for name in layers.own_state(norm)}
        weight, bias = self.get(state, conv, "weight"), self.get(state, conv, "bias")
        y, update = layers.fused_block(conv, norm, self.size, x, weight, bias, own)
        if update is not None:
            _make(update, effects)
        return y


def _make(update: Update, effects: Effects | None) -> None:
    update()
    if effects is not None:
        effects.append(update)


class _Function:
    """A function or tensor method that needs no parameter of ours."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, modules: Any, state: Any, effects: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _Method:
    def __init__(self, name: str) -> None:
        # A fused block's result may be channels-last, where view() refuses what it does on contiguous memory.
        self.name = name

    def __call__(self, modules: Any, state: Any, effects: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        shape = self.name == "view" and not isinstance(args[0] if args else kwargs.get("dtype"), torch.dtype)
        return getattr(x, "reshape" if shape else self.name)(*args, **kwargs)


class _Attribute:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, modules: Any, state: State, effects: Any) -> Tensor:
        return state[self.name]


class _Builder:
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.nodes = root, list(graph.nodes)
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.slots: dict[fx.Node, Slot] = {}
        self.steps: list[Step] = []
        self.fusions: list[Fusion] = []
        self.left_alone: dict[str, str] = {}
        self.paths: set[str] = set()
        self.memory: list[int] = []

    def program(self) -> Program:
        result: Any = None
        absorbed: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                if node.args:
                    raise fx.proxy.TraceError(f"its forward has the optional argument {node.target!r}")
                if str(node.target).startswith("*"):
                    raise fx.proxy.TraceError(f"its forward takes any number of arguments, {node.target}")
                self.slots[node] = Slot(len(self.slots))
                self.memory.append(len(self.memory))
            elif node.op == "output":
                result = self._convert(node.args[0])
            elif node not in absorbed:
                absorbed |= self._add(node)
        self._check_writes()
        return Program(
            tuple(self.steps),
            len(self.inputs),
            result,
            tuple(self.fusions),
            self.left_alone,
            tuple(sorted(self.paths)),
            aliases=_aliases(self.root),
            memory=tuple(self.memory),
        )

    def _check_writes(self) -> None:
        """What is handed in must not be written to: the parts of a program are run again with the same."""
        given = {self.memory[i] for i in range(len(self.inputs))}
        held = {self.memory[step.slot] for step in self.steps if step.kind == "attribute"}
        for step in self.steps:
            written = {self.memory[slot] for slot in step.writes}
            if written & (given | held):
                what = "its input" if written & given else "a parameter or buffer"
                raise fx.proxy.TraceError(f"its forward writes into {what} in place ({step.label})")

    def _convert(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.slots[value]
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(self._convert(v) for v in value)
        if isinstance(value, dict):
            return {k: self._convert(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._convert(v) for v in (value.start, value.stop, value.step)))
        return value

    def _add(self, node: fx.Node) -> set[fx.Node]:
        """Append the node's step; returns the later nodes that the step computes too."""
        args, kwargs = self._convert(tuple(node.args)), self._convert(dict(node.kwargs))
        last = node
        facts: dict[str, Any] = {"parameters": ()}
        call: Any
        if node.op == "call_module":
            path = str(node.target)
            module = self.modules[path]
            kind, call, last = self._module(node, path, module, facts)
            in_place = any(getattr(child, "inplace", False) for child in module.modules())
            home = type(module).__module__
            fresh = kind != "module" or (home.startswith(_FRESH_MODULES) and not in_place and not has_hooks(module))
            facts["writes"] = tuple(_slots(args)) if in_place and kind == "module" else ()
        elif node.op == "get_attr":
            kind, call, fresh, in_place = "attribute", _Attribute(str(node.target)), True, False
            facts["parameters"] = (str(node.target),)
        else:
            kind, target = "function", node.target
            name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            call = _Method(target) if isinstance(target, str) else _Function(target)
            facts["not_reusable"] = self._impure(node, name)
            in_place = (
                (name.endswith("_") and not name.endswith("__"))
                or bool(node.kwargs.get("inplace"))
                or (getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE)
            )
            fresh = name in _FRESH and not in_place and "out" not in node.kwargs
            facts["writes"] = (
                tuple(_slots(args)[:1] or _slots(kwargs)[:1]) if in_place else tuple(_slots(kwargs.get("out")))
            )
        if self._flattens(node):
            kind = "flatten"
        elif _is_batch_size(node) or _is_shape(node):
            kind = "size"
        slot = Slot(len(self.inputs) + len(self.steps))
        reads = tuple(dict.fromkeys(_slots((args, kwargs))))
        self._share(() if fresh else facts["writes"] or reads)
        self.steps.append(Step(slot.index, str(node.name), kind, call, args, kwargs, reads, **facts))
        run = {node}
        while node is not last:
            node = next(iter(node.users))
            run.add(node)
        for node in run:
            self.slots[node] = slot
        return run

    def _share(self, slots: tuple[int, ...]) -> None:
        """Give the next slot a number in `memory`, the same as that of the given ones, which become one."""
        joined = {self.memory[slot] for slot in slots}
        number = min(joined, default=len(self.memory))
        self.memory = [number if m in joined else m for m in self.memory] + [number]

    def _flattens(self, node: fx.Node) -> bool:
        """Whether the node makes [N, F] of [N, ...]: the step between the blocks and a linear layer."""
        module = self._at(node)
        if module is not None:
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        if node.kwargs or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        x, *shape = node.args
        if node.target in (torch.flatten, "flatten"):
            return shape in ([1], [1, -1])
        viewed = node.target in ("view", "reshape") and len(shape) == 2 and shape[1] == -1
        return bool(viewed) and isinstance(shape[0], fx.Node) and _is_batch_size(shape[0]) and _measured(shape[0]) is x

    def _impure(self, node: fx.Node, name: str) -> str | None:
        drops = node.kwargs.get(
            "dropout_p", node.args[4] if name.startswith("scaled_dot") and len(node.args) > 4 else 0.0
        )
        if any(word in name for word in _RANDOM) or drops != 0.0:
            return f"{name} draws random numbers"
        if name in ("batch_norm", "instance_norm"):
            return f"{name} may update running statistics"
        home = getattr(node.target, "__module__", "") or ""
        if node.op == "call_function" and home.split(".")[0] not in _KNOWN:
            return f"{name} is a function that the program knows nothing of"
        return None

    def _names(self, *paths: str) -> tuple[str, ...]:
        return tuple(f"{p}.{name}" if p else name for p in paths for name, _ in self.modules[p].named_parameters())

    def _module(self, node: fx.Node, path: str, module: nn.Module, facts: dict[str, Any]) -> tuple[str, Any, fx.Node]:
        """Kind, computation and last node of a module's step; what else is known of it goes to `facts`."""
        self.paths.add(path)
        facts["parameters"] = self._names(path)
        if isinstance(module, ConvBlock):
            facts["layer"] = (f"{path}.conv", f"{path}.norm")
            why = self._block_refusal(module, len(node.args))
            if why is None:
                size = layers.pool_size(module.pool)
                fusion = Fusion(f"{path}.conv", f"{path}.norm", f"{path}.relu", f"{path}.pool", size)
                self.fusions.append(fusion)
                self.paths |= {fusion.conv, fusion.norm}
                facts["tracks"] = _tracks(module.norm)
                return "block", BlockCall(fusion, module.conv, module.norm), node
            self.left_alone[f"{path}.conv"] = why
        elif isinstance(module, LAYERS):
            norm = next((n for n in node.users if n.op == "call_module" and isinstance(self._at(n), NORMS)), None)
            facts["layer"] = (path, str(norm.target) if norm is not None else "")
        plain = not has_hooks(module) and len(node.args) == 1 and not node.kwargs
        if plain and type(module) in _CONV:
            found = self._fuse(node, path)
            if not isinstance(found, str):
                fusion, last = found
                self.fusions.append(fusion)
                self.paths.add(fusion.norm)
                facts["parameters"] = self._names(path, fusion.norm)
                norm = self.modules[fusion.norm]
                assert isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
                facts["tracks"] = _tracks(norm)
                return "block", BlockCall(fusion, module, norm), last
            self.left_alone[path] = found
            return "conv", _Conv(path), node
        if plain and type(module) in _LINEAR:
            assert isinstance(module, nn.Linear)
            return "linear", LinearCall(path, module), node
        facts["tracks"] = any(_tracks(child) for child in module.modules())
        if plain and type(module) in _BATCH_NORM:
            return "norm", _Norm(path), node
        if isinstance(module, LAYERS) and type(module) not in (*_CONV, *_LINEAR):
            self.left_alone[path] = f"it is a {type(module).__name__}, which may compute something of its own"
        facts["not_reusable"] = self._module_impure(module)
        return "module", _Module(path), node

    def _module_impure(self, module: nn.Module) -> str | None:
        name = type(module).__name__
        for child in module.modules():
            kind = type(child).__name__
            if has_hooks(child):
                return f"{kind} has hooks"
            if kind.startswith("Fractional"):
                return f"{kind} draws random numbers"
            if _tracks(child):
                return f"{kind} updates running statistics"
            drops = getattr(child, "dropout", 0.0)
            random = "Dropout" in kind or kind == "RReLU" or (isinstance(drops, float) and drops > 0.0)
            if child.training and random:
                return f"{kind} draws random numbers in training mode"
        if not type(module).__module__.startswith(("torch.nn", layers.__name__)):
            return f"{name} is a module that the program knows nothing of"
        return None

    def _at(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _block_refusal(self, block: ConvBlock, arguments: int) -> str | None:
        parts = [block, block.conv, block.norm, block.relu, block.pool]
        if any(has_hooks(part) for part in parts):
            return "a part of the block has hooks"
        if arguments != 1 or not block.is_whole():
            return "a part of the block was replaced"
        return self._norm_refusal(block.norm)

    def _norm_refusal(self, norm: nn.BatchNorm2d) -> str | None:
        return None if layers.uses_batch_statistics(norm) else EVALUATION

    def _fuse(self, node: fx.Node, path: str) -> tuple[Fusion, fx.Node] | str:
        """The run of layers that begins with a convolution and the run's last node, or why there is none."""
        conv = self.modules[path]
        assert isinstance(conv, nn.Conv2d)
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return f"its padding is {conv.padding_mode if conv.padding_mode != 'zeros' else conv.padding!r}"
        following = self._only_user(node)
        norm = None if following is None else self._at(following)
        if following is None or type(norm) is not nn.BatchNorm2d:
            return "no BatchNorm2d alone follows it"
        assert isinstance(norm, nn.BatchNorm2d)
        why = "the norm has hooks" if has_hooks(norm) else self._norm_refusal(norm)
        if why is not None:
            return why
        relu = self._only_user(following)
        if relu is None or not self._is_relu(relu):
            return "no ReLU alone follows its norm"
        pool = self._only_user(relu)
        size = 0 if pool is None else self._pool_size(pool)
        last = pool if pool is not None and size else relu
        where = [
            str(n.target) if n is not None and n.op == "call_module" else "" for n in (relu, pool if size else None)
        ]
        return Fusion(path, str(following.target), where[0], where[1], size or 1), last

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _is_relu(self, node: fx.Node) -> bool:
        module = self._at(node)
        if module is not None:
            return type(module) is nn.ReLU and not has_hooks(module)
        return node.target in (F.relu, torch.relu, torch.relu_, "relu", "relu_")

    def _pool_size(self, node: fx.Node) -> int:
        """The window of a max-pool whose windows tile the image, else 0."""
        module = self._at(node)
        if type(module) is nn.MaxPool2d and not has_hooks(module):
            assert isinstance(module, nn.MaxPool2d)
            given: list[Any] = [getattr(module, name) for name in _POOL]
        elif node.target in (F.max_pool2d, torch.max_pool2d):
            given = [None, None, 0, 1, False, False]
            for i, value in enumerate(node.args[1:]):
                given[i] = value
            for name, value in node.kwargs.items():
                if name in _POOL:
                    given[_POOL.index(name)] = value
        else:
            return 0
        kernel, stride, padding, dilation, *flags = given
        size = set(_pair(kernel)) | set(_pair(stride if stride not in (None, [], ()) else kernel))
        tiles = len(size) == 1 and set(_pair(padding)) == {0} and set(_pair(dilation)) == {1} and not any(flags)
        only = size.pop() if tiles else 0
        return only if isinstance(only, int) else 0


def _tracks(module: nn.Module) -> bool:
    return module.training and getattr(module, "running_mean", None) is not None


def _is_shape(node: fx.Node) -> bool:
    return node.target is getattr and len(node.args) == 2 and node.args[1] == "shape"


def _is_batch_size(node: fx.Node) -> bool:
    """Whether the node is x.size(0) or x.shape[0]."""
    if node.target == "size":
        return node.args[1:] == (0,)
    shape = node.args[0] if node.target is operator.getitem else None
    return isinstance(shape, fx.Node) and _is_shape(shape) and bool(node.args[1] == 0)


def _measured(size: fx.Node) -> Any:
    """The tensor whose batch size a node is."""
    source = size.args[0]
    return source.args[0] if isinstance(source, fx.Node) and _is_shape(source) else source


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
