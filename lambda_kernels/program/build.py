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
from .capture import Refusal
from .fuse import Fuser, block_refusal
from .steps import LAYERS, Built, Fusion, Program, Slot, Step, slots
from .structure import Frame
from .watch import Deeds

__all__ = ["aliases", "build", "modes", "opaque"]

_CONV = (nn.Conv2d, layers.Conv2d)
_LINEAR = (nn.Linear, layers.Linear)
_OURS = ("block", "conv", "linear", "norm")  # kinds of steps that this package computes
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def build(root: nn.Module, graph: fx.Graph, called: bool = True) -> Program:
    """The program of a graph of a module's call, or of its forward, in its present mode.

    Raises:
        Refusal: the graph writes to what is handed in.
    """
    return _Builder(root, graph, called).program()


def opaque(root: nn.Module, reason: str) -> Program:
    """The program that calls the module as a whole, with any arguments."""
    names = tuple(name for name, _ in root.named_parameters())
    step = Step(1, type(root).__name__, "module", WholeCall(), (Slot(0),), {}, (0,), names, not_reusable=reason)
    return Program((step,), 1, Slot(1), (), {}, ("",), modes(root), reason, aliases(root))


def modes(root: nn.Module) -> dict[str, bool]:
    """Training or not, by the path of each module."""
    return {path: module.training for path, module in root.named_modules()}


def aliases(root: nn.Module) -> dict[str, str]:
    """The second names of shared tensors, and their first."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)):
        if first.setdefault(id(tensor), name) != name:
            found[name] = first[id(tensor)]
    return found


class _Builder:
    def __init__(self, root: nn.Module, graph: fx.Graph, called: bool) -> None:
        self.root, self.nodes, self.called = root, list(graph.nodes), called
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.fuser = Fuser(self.modules)
        self.slots: dict[fx.Node, Slot | Built] = {}
        self.steps: list[Step] = []
        self.fusions: list[Fusion] = []
        self.left_alone: dict[str, str] = {}
        self.paths: set[str] = set()
        self.memory: list[int] = []
        self._stored: dict[int, set[int]] = {}  # storages, by slot
        self._loose: set[int] = set()  # slots whose memory may lie otherwise than torch's would

    def program(self) -> Program:
        result: Any = None
        absorbed: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                self.slots[node] = Slot(len(self.slots))
                self._share((), node.meta.get("deeds"))
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
            modes(self.root),
            aliases=aliases(self.root),
            memory=tuple(self.memory),
            called=self.called,
        )

    def _check_writes(self) -> None:
        """What is handed in must not be written to: the parts of a program are run again with the same."""
        given = {self.memory[i] for i in range(len(self.inputs))}
        held = {self.memory[step.slot] for step in self.steps if step.kind == "attribute"}
        for step in self.steps:
            written = {self.memory[slot] for slot in step.writes}
            if written & (given | held):
                what = "its input" if written & given else "a parameter or buffer"
                raise Refusal(f"its forward writes into {what} in place ({step.label})")

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
        deeds: Deeds | None = node.meta.get("deeds")
        if node.op == "call_module":
            path = str(node.target)
            kind, call, last = self._module(node, path, self.modules[path], facts)
        elif node.op == "get_attr":
            kind, call = "attribute", AttributeCall(str(node.target))
            facts["parameters"] = (str(node.target),)
        else:
            kind, target = "function", node.target
            call = MethodCall(target) if isinstance(target, str) else FunctionCall(target)
        reads = tuple(dict.fromkeys(slots((args, kwargs))))
        if kind in _OURS:  # a result of its own, whatever torch's layer would give
            known = last.meta["deeds"].memory if "deeds" in last.meta else frozenset()
            deeds = Deeds(memory=known.difference(*self._stored.values()))
        elif deeds is not None:
            facts["not_reusable"] = f"{deeds.random} draws random numbers" if deeds.random else None
            facts["uncertain"] = deeds.uncertain
            facts["writes"] = tuple(slot for slot in reads if self._stored.get(slot, set()) & deeds.writes)
            if deeds.statistics:
                facts["not_reusable"] = f"{_name(node)} updates running statistics"
        if self.fuser.flattens(node):
            kind = "flatten"
        slot = Slot(len(self.inputs) + len(self.steps))
        if kind in _OURS or not self._loose.isdisjoint(reads):
            self._loose.add(slot.index)
        self._share(reads, deeds)
        self.steps.append(Step(slot.index, str(node.name), kind, call, args, kwargs, reads, **facts))
        run = {node}
        while node is not last:
            node = next(iter(node.users))
            run.add(node)
        for node in run:
            self.slots[node] = slot
        return run

    def _share(self, read: tuple[int, ...], deeds: Deeds | None) -> None:
        """Give the next slot a number in `memory`, the same as that of slots whose storages it has, or may have where
        memory lies otherwise than torch's; of a step of which nothing is known, as that of the given ones. Those
        become one."""
        if deeds is None:
            shared = list(read)
        else:
            shared = [slot for slot, stored in self._stored.items() if stored & deeds.memory]
            shared += [
                slot for slot in self._loose.intersection(read) if self._stored.get(slot, set()) & deeds.otherwise
            ]
            self._stored[len(self.memory)] = set(deeds.memory)
        joined = {self.memory[slot] for slot in shared}
        number = min(joined, default=len(self.memory))
        self.memory = [number if m in joined else m for m in self.memory] + [number]

    def _names(self, *paths: str) -> tuple[str, ...]:
        return tuple(f"{p}.{name}" if p else name for p in paths for name, _ in self.modules[p].named_parameters())

    def _module(self, node: fx.Node, path: str, module: nn.Module, facts: dict[str, Any]) -> tuple[str, Any, fx.Node]:
        """Kind, computation and last node of a module's step; what else is known of it goes to `facts`."""
        self.paths.add(path)
        facts["parameters"] = self._names(path)
        if isinstance(module, ConvBlock):
            facts["layer"] = f"{path}.conv".lstrip(".")
            why = block_refusal(module, len(node.args))
            if why is None:
                size = layers.pool_size(module.pool)
                conv, norm, relu, pool = (f"{path}.{n}".lstrip(".") for n in ("conv", "norm", "relu", "pool"))
                fusion = Fusion(conv, norm, relu, pool, size)
                self.fusions.append(fusion)
                self.paths |= {fusion.conv, fusion.norm}
                facts["tracks"] = tracks(module.norm)
                return "block", BlockCall(fusion, module.conv, module.norm), node
            self.left_alone[facts["layer"]] = why
        elif isinstance(module, LAYERS):
            facts["layer"] = path
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
        return "module", ModuleCall(path), node


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def tracks(module: nn.Module) -> bool:
    """Whether a norm updates running statistics."""
    return module.training and getattr(module, "running_mean", None) is not None
