"""From a module's graph to its program: the steps, with what is known of each."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .. import layers
from ..layers import ConvBlock, has_hooks
from .calls import (
    AttributeCall,
    BlockCall,
    ConvCall,
    FunctionCall,
    LinearCall,
    MethodCall,
    ModuleCall,
    NormCall,
    WholeCall,
)
from .fuse import Fuser, block_refusal, is_batch_size, is_shape
from .purity import function_impurity, is_fresh_function, is_fresh_module, is_in_place, module_impurity, tracks
from .steps import LAYERS, NORMS, Built, Fusion, Program, Slot, Step, slots
from .structure import Frame
from .trace import trace

__all__ = ["build", "opaque"]

_CONV = (nn.Conv2d, layers.Conv2d)
_LINEAR = (nn.Linear, layers.Linear)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def build(root: nn.Module) -> Program:
    """The program of a module's forward in its present mode; an opaque one where the forward cannot be traced."""
    try:
        return _Builder(root, trace(root)).program()
    except Exception as error:  # whatever a forward raises on a symbolic input
        return opaque(root, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def opaque(root: nn.Module, reason: str) -> Program:
    """The program that calls the module as a whole, with any arguments."""
    names = tuple(name for name, _ in root.named_parameters())
    step = Step(1, type(root).__name__, "module", WholeCall(), (Slot(0),), {}, (0,), names, not_reusable=reason)
    return Program((step,), 1, Slot(1), (), {}, ("",), _modes(root), reason, _aliases(root))


def _modes(root: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in root.named_modules()}


def _aliases(root: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)):
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases


class _Builder:
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.nodes = root, list(graph.nodes)
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.fuser = Fuser(self.modules)
        self.slots: dict[fx.Node, Slot | Built] = {}
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
            elif isinstance(node.target, Frame):  # no step: whoever reads it puts it together
                self.slots[node] = Built(node.target, self._convert(tuple(node.args)))
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
            _modes(self.root),
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
            fresh = kind != "module" or (is_fresh_module(module) and not in_place)
            facts["writes"] = tuple(slots(args)) if in_place and kind == "module" else ()
        elif node.op == "get_attr":
            kind, call, fresh = "attribute", AttributeCall(str(node.target)), True
            facts["parameters"] = (str(node.target),)
        else:
            kind, target = "function", node.target
            name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            call = MethodCall(target) if isinstance(target, str) else FunctionCall(target)
            facts["not_reusable"] = function_impurity(node, name)
            fresh = is_fresh_function(node, name)
            written = slots(args)[:1] or slots(kwargs)[:1] if is_in_place(node, name) else slots(kwargs.get("out"))
            facts["writes"] = tuple(written)
        if self.fuser.flattens(node):
            kind = "flatten"
        elif is_batch_size(node) or is_shape(node):
            kind = "size"
        slot = Slot(len(self.inputs) + len(self.steps))
        reads = tuple(dict.fromkeys(slots((args, kwargs))))
        self._share(() if fresh else facts["writes"] or reads)
        self.steps.append(Step(slot.index, str(node.name), kind, call, args, kwargs, reads, **facts))
        run = {node}
        while node is not last:
            node = next(iter(node.users))
            run.add(node)
        for node in run:
            self.slots[node] = slot
        return run

    def _share(self, read: tuple[int, ...]) -> None:
        """Give the next slot a number in `memory`, the same as that of the given ones, which become one."""
        joined = {self.memory[slot] for slot in read}
        number = min(joined, default=len(self.memory))
        self.memory = [number if m in joined else m for m in self.memory] + [number]

    def _names(self, *paths: str) -> tuple[str, ...]:
        return tuple(f"{p}.{name}" if p else name for p in paths for name, _ in self.modules[p].named_parameters())

    def _module(self, node: fx.Node, path: str, module: nn.Module, facts: dict[str, Any]) -> tuple[str, Any, fx.Node]:
        """Kind, computation and last node of a module's step; what else is known of it goes to `facts`."""
        self.paths.add(path)
        facts["parameters"] = self._names(path)
        if isinstance(module, ConvBlock):
            facts["layer"] = (f"{path}.conv", f"{path}.norm")
            why = block_refusal(module, len(node.args))
            if why is None:
                size = layers.pool_size(module.pool)
                fusion = Fusion(f"{path}.conv", f"{path}.norm", f"{path}.relu", f"{path}.pool", size)
                self.fusions.append(fusion)
                self.paths |= {fusion.conv, fusion.norm}
                facts["tracks"] = tracks(module.norm)
                return "block", BlockCall(fusion, module.conv, module.norm), node
            self.left_alone[f"{path}.conv"] = why
        elif isinstance(module, LAYERS):
            norm = next((n for n in node.users if isinstance(self.fuser.module(n), NORMS)), None)
            facts["layer"] = (path, str(norm.target) if norm is not None else "")
        plain = not has_hooks(module) and len(node.args) == 1 and not node.kwargs
        if plain and type(module) in _CONV:
            found = self.fuser.run(node, path)
            if not isinstance(found, str):
                fusion, last = found
                self.fusions.append(fusion)
                self.paths.add(fusion.norm)
                facts["parameters"] = self._names(path, fusion.norm)
                norm = self.modules[fusion.norm]
                assert isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
                facts["tracks"] = tracks(norm)
                return "block", BlockCall(fusion, module, norm), last
            self.left_alone[path] = found
            return "conv", ConvCall(path), node
        if plain and type(module) in _LINEAR:
            assert isinstance(module, nn.Linear)
            return "linear", LinearCall(path, module), node
        facts["tracks"] = any(tracks(child) for child in module.modules())
        if plain and type(module) in _BATCH_NORM:
            return "norm", NormCall(path), node
        if isinstance(module, LAYERS) and type(module) not in (*_CONV, *_LINEAR):
            self.left_alone[path] = f"it is a {type(module).__name__}, which may compute something of its own"
        why = facts["not_reusable"] = module_impurity(module)
        return "module", ModuleCall(path, keeps=why is not None), node
