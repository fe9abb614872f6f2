"""Networks with a user's forward: TorchDynamo captures the call, with guards on everything that its Python code read.

What Dynamo leaves unguarded is closed here: classes and functions that are changed in their place are compared by the
`Snapshot` of the lookup; a forward that catches exceptions, and the hooks of all modules at once, are not captured.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import dis
import logging
import os
import re
import sysconfig
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .. import layers
from ..layers import has_hooks
from .structure import flatten, opened
from .watch import Deeds, Watch, storages

__all__ = ["Capture", "Refusal", "capture", "hooked_everywhere"]

_CAPTURING = threading.RLock()  # what Dynamo keeps for one capture is the process's


class Refusal(Exception):
    """Why a call has no graph that stands for it."""


def _called(root: Any, args: Any, kwargs: Any) -> Any:
    return root(*args, **kwargs)


def _forward(root: Any, args: Any, kwargs: Any) -> Any:
    return type(root).forward(root, *args, **kwargs)


_GLOBALS: dict[str, Any] = {"__builtins__": builtins}  # of the captured functions: Dynamo adds to them


@dataclass
class Capture:
    """A graph, and what has to hold for it to stand for a call."""

    graph: fx.Graph  # `get_attr` by parameter name, `call_module` by path; a placeholder per tensor of the call
    guards: Any
    classes: list[type]  # of which a change in place changes the forward
    functions: list[types.FunctionType]

    def holds(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether everything that the captured code read is what it was, for this call."""
        if self.guards.lost:
            return False
        return bool(self.guards.guard_manager.check({"root": root, "args": args, "kwargs": kwargs}))


def hooked_everywhere() -> str | None:
    """Why no graph stands for any call at the moment: hooks of all modules, which Dynamo has no guards on."""
    hooks = torch.nn.modules.module
    held = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
    if held or hooks._global_backward_hooks or hooks._global_backward_pre_hooks:
        return "a hook for all modules is set (torch.nn.modules.module.register_module_...)"
    return None


def capture(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool) -> Capture:
    """The graph of `root(*args, **kwargs)`, or of its forward alone; no value is computed and nothing is changed.

    Raises:
        Refusal: the call has no graph that stands for it; the reason is in words.
    """
    with _CAPTURING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Dynamo asks of tensors; the forward's own are said when it runs
        try:
            return _capture(root, args, dict(kwargs), _called if called else _forward)
        except Refusal:
            raise
        except Exception as error:  # whatever Dynamo, or the forward on fake tensors, raises
            raise Refusal(_in_words(error)) from error


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation:")), "")
    at = next((line for line in lines if line.startswith('File "') and "site-packages" not in line), "")
    where = f", line {at.split(', line ')[1].split(',')[0]}" if ", line " in at else ""
    return f"{lines[0] if lines else type(error).__name__}{where}{f': {told}' if told else ''}"


class _Quiet(logging.Filter):
    """Lets nothing through while a call is captured: what is wrong with its shapes, the call itself says better."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not layers.is_captured()


@cache
def _compile_frame() -> Any:
    """torch's compile_frame, but the process's random state stays as it is.

    torch puts it back when a capture ends. Nothing was drawn from it for the capture, and what other threads drew
    meanwhile would be drawn twice.
    """
    from torch._dynamo import convert_frame

    logging.getLogger("torch._subclasses.fake_tensor").addFilter(_Quiet())
    plain = convert_frame.compile_frame
    trace: Any = convert_frame.trace_frame
    names = {**vars(convert_frame), "trace_frame": trace.__wrapped__}
    made = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    return made


@cache
def _guards() -> Any:
    """torch's guards, which notice when something was freed whose address they compare: another may lie there."""
    from torch._dynamo.guards import CheckFunctionManager

    class Guards(CheckFunctionManager):
        lost = False

        def invalidate(self, obj_str: str) -> None:
            self.lost = True

    return Guards


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    """torch's modes are after the block what they were before it, also where tracing ends within a `with`."""
    import torch._dynamo.convert_frame as frames

    without_inference: Any = vars(frames)["maybe_disable_inference_mode"]
    dtype = torch.get_default_dtype()
    with torch._C._PreserveDispatchKeyGuard(), without_inference():
        gradients = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch._C._set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)


class _Found:
    """What Dynamo hands over in the middle of a capture."""

    def __init__(self) -> None:
        self.graph: fx.Graph | None = None
        self.backend = ""
        self.values: dict[str, Tensor] = {}  # by placeholder
        self.deeds: dict[str, Deeds] = {}  # by operation
        self.batches: dict[str, int] = {}  # length of its first argument, by operation
        self.refusal: str | None = None

    def __call__(self, module: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        self.graph, self.backend = module.graph, module.meta["backend_id"]
        try:
            self.refusal = _beside(output) or self._look()
        except Exception as error:  # Dynamo would hide which: whatever an operation raises on fake tensors
            self.refusal = f"it cannot be seen what its operations do ({type(error).__name__}: {error})"
        return module

    def _look(self) -> str | None:
        """Run the graph on fake tensors, to see what its operations do."""
        assert self.graph is not None
        env: dict[fx.Node, Any] = {}
        given = [node.meta["grapharg"] for node in self.graph.nodes if node.op == "placeholder"]
        if any(g.pass_arg_as_tensor or g.fake_tensor is None or not isinstance(g.example, Tensor) for g in given):
            return "its forward computes with an array, or a number out of one"
        if not given:
            return "its forward reads no tensor"
        with given[0].fake_tensor.fake_mode, Watch() as watch:
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    argument = node.meta["grapharg"]
                    self.values[node.name], env[node] = argument.example, argument.fake_tensor
                    self.deeds[node.name] = Deeds(memory=storages(env[node]))
                elif node.op in ("call_function", "call_method"):
                    if (why := _unknown(node)) is not None:
                        return why
                    args, kwargs = (fx.map_arg(part, env.__getitem__) for part in (node.args, node.kwargs))
                    function = _method(node.target) if isinstance(node.target, str) else node.target
                    if args and isinstance(args[0], Tensor) and args[0].dim():
                        self.batches[node.name] = args[0].shape[0]
                    env[node], deeds = watch.run(cast("Callable[..., Any]", function), *args, **kwargs)
                    in_place = env[node] is None and bool(deeds.writes)  # x[i] = y
                    if not (in_place or _is_value(env[node])):
                        return f"its forward calls {_name(node)}, which changes more than its result"
                    self.deeds[node.name] = deeds
                elif node.op != "output":
                    return f"its forward holds a part with rules of its own ({_name(node)})"
        return None


def _beside(output: Any) -> str | None:
    """What a forward does that no graph holds."""
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

    effects = output.side_effects
    for variable in effects.id_to_variable.values():
        new = isinstance(variable.mutation_type, (AttributeMutationNew, ValueMutationNew))
        if not new and variable.mutation_type is not None and effects.is_modified(variable):
            place = _place(getattr(variable, "source", None))
            names = list(effects.store_attr_mutations.get(variable, ()))
            return f"its forward writes to {place}{f'.{names[0]}' if names else ''}: keep such things out of it"
    if effects.tensor_hooks or effects.save_for_backward:
        return "its forward sets hooks on tensors"
    if output.random_calls:
        return "its forward draws random numbers in Python"
    return None


def _place(source: Any) -> str:
    """An object by the name that a user gave it: self.stem.config for L['root']._modules['stem'].config"""
    if source is None:
        return "an object"
    name = str(source.name() if callable(source.name) else source.name)
    name = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", name)
    return re.sub(r"[GL]\['([^']*)'\]", r"\1", name.replace("L['root']", "self"))


def _unknown(node: fx.Node) -> str | None:
    """Why it is not known what a function does."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"its forward holds a part with rules of its own ({_name(node)})"
    home = str(getattr(node.target, "__module__", "") or "torch").split(".")[0]
    if node.op == "call_function" and home not in ("torch", "_operator", "math", "builtins"):
        return f"its forward calls {_name(node)}, into which Dynamo was told not to look"
    return None


def _method(name: str) -> Callable[..., Any]:
    return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)


def _is_value(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_value, value))
    return isinstance(value, (Tensor, int, float, bool, complex, torch.Size, torch.dtype, torch.device))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _capture(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], function: Any) -> Capture:
    import torch._dynamo.convert_frame as frames
    from torch._dynamo import config, utils
    from torch._guards import CompileContext, compile_context

    given = {"root": root, "args": args, "kwargs": kwargs}
    found = _Found()
    # A number is a constant, a new shape a new capture. Hooks are guarded where there are any: a `Snapshot` sees that
    # one is set, and `Snapshot.forms` that a parameter is changed in its place (`p.data = ...`).
    hooked = any(has_hooks(module) for module in root.modules())
    settings = config.patch(
        skip_nnmodule_hook_guards=not hooked, specialize_float=True, specialize_int=True,
        automatic_dynamic_shapes=False, assume_static_by_default=True, capture_scalar_outputs=False, allow_rnn=True,
    )  # fmt: skip
    with (
        layers.captured(),
        _unchanged(),
        settings,
        utils.get_metrics_context(),
        utils.dynamo_timed("lambda_kernels.capture"),  # Dynamo counts within one
        compile_context(CompileContext(frames.get_compile_id({}))),
    ):
        done = _compile_frame()(
            function.__code__, _GLOBALS, given, vars(builtins), (),
            compiler_fn=found, one_graph=True, restart_reasons=set(),
        )  # fmt: skip
        if found.graph is None:
            raise Refusal("its forward computes nothing with tensors")
        if found.refusal is not None:
            raise Refusal(found.refusal)
        output = done.tracer_output.output_graph
        codes = list(output.traced_code)
        output.skip_guards_check = True  # they are checked below: torch would also time them, with the caches flushed
        guards = _guards()(function.__code__, output)
        classes = _classes(root, output)
        if guards.lost or not guards.guard_manager.check(given):
            raise Refusal("its forward reads something that is another in each call")
    for why in (_asks(output), *map(_catches, codes)):
        if why is not None:
            raise Refusal(why)
    markers = [torch.empty(0) for _ in _outputs(found.graph)]
    environment = done.graph_capture_output().get_runtime_env()
    run = environment.forward_callable(found.backend, lambda *_: tuple(markers), extra_globals=_GLOBALS)
    result = run(*given.values())
    graph = _Rewritten(root, args, kwargs, found).graph_of(result, markers)
    functions = [f for cls in classes for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    return Capture(graph, guards, classes, functions)


def _classes(root: nn.Module, output: Any) -> list[type]:
    """The classes, other than torch's, of the objects that the captured code asked, and of what these inherit from."""
    kinds: dict[type, None] = {type(module): None for module in root.modules()}
    kinds |= {found: None for found in _guarded(output) if isinstance(found, type)}
    every = dict.fromkeys(base for kind in kinds for base in kind.__mro__)
    return [c for c in every if str(c.__module__).split(".")[0] not in ("builtins", "torch", "typing", "abc")]


def _guarded(output: Any) -> Iterator[Any]:
    """The objects that the captured code asked, and their classes."""
    for guard in output.guards:
        for found in (guard.guarded_class_weakref, guard.obj_weakref):
            yield found() if isinstance(found, weakref.ref) else None


def _asks(output: Any) -> str | None:
    """Whether the captured code asked a mapping that finds by an exception what is missing: see `_catches`."""
    for found in _guarded(output):
        if isinstance(found, (type(os.environ), collections.ChainMap)):
            name = "os.environ" if isinstance(found, type(os.environ)) else f"a {type(found).__name__}"
            return f"its forward reads {name}: read what it needs where the network is made"
    return None


def _catches(code: types.CodeType) -> str | None:
    """Whether a user's code asks by an exception what there is: Dynamo has no guard on what is missing."""
    path, name = code.co_filename, getattr(code, "co_qualname", code.co_name)  # a qualified name from Python 3.11 on
    if code is contextlib.suppress.__exit__.__code__:
        return "its forward uses contextlib.suppress: ask with hasattr, or getattr with a default"
    library = path.startswith(sysconfig.get_path("stdlib")) and "-packages" not in path
    if library or path.startswith(torch.__path__[0]):
        return None
    names = [step.opname for step in dis.get_instructions(code)]
    caught = names.count("PUSH_EXC_INFO") > names.count("WITH_EXCEPT_START")
    if caught or "SETUP_FINALLY" in names:  # as compiled from Python 3.11 on, and by 3.10
        return f"{name} catches exceptions: ask with hasattr, or getattr with a default"
    return None


def _outputs(graph: fx.Graph) -> tuple[Any, ...]:
    last = next(reversed(graph.nodes))
    return tuple(last.args[0])


class _Rewritten:
    """Dynamo's graph, which takes every parameter as an input, as one of this package's."""

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: _Found) -> None:
        assert found.graph is not None
        self.root, self.found, self.old = root, found, found.graph
        self.new = fx.Graph()
        self.given, _ = flatten((args, kwargs))
        self.inputs = [self._placed(self.new.placeholder(f"x{i}")) for i in range(len(self.given))]
        self.names: dict[int, str] = {}
        for name, t in (*root.named_parameters(), *root.named_buffers()):
            self.names.setdefault(id(t), name)
        self.paths = {id(module): path for path, module in reversed([*root.named_modules(remove_duplicate=False)])}
        self.held: dict[str, fx.Node] = {}  # parameters and buffers that were read, by name
        self.env: dict[fx.Node, fx.Node] = {}

    def _placed(self, node: fx.Node) -> fx.Node:
        node.meta["deeds"] = Deeds()
        return node

    def graph_of(self, result: Any, markers: list[Tensor]) -> fx.Graph:
        """The new graph, which gives `result` with the outputs of the old one in the places of the markers."""
        tensors: dict[str, str | int] = {}  # placeholder of a parameter -> its name; of the call -> its place
        for node in self.old.nodes:
            if node.op == "placeholder":
                value = self.found.values[node.name]
                place = next((i for i, t in enumerate(self.given) if t is value), None)
                deeds = self.found.deeds[node.name]
                if place is not None:
                    self.inputs[place].meta["deeds"] = deeds
                    self.env[node] = self.inputs[place]
                elif (name := self.names.get(id(value))) is not None:
                    tensors[node.name] = name
                else:
                    raise Refusal(
                        f"its forward uses a tensor {list(value.shape)} that is no parameter or buffer: register it "
                        "with register_buffer"
                    )
        self.parameters = tensors
        groups = _layers_in(self.old, self.root, self.paths, self.names, tensors)
        inside = {node: group for group in groups for node in group.nodes}
        for node in self.old.nodes:
            if node.op in ("placeholder", "output"):
                continue
            group = inside.get(node)
            if group is None:
                args, kwargs = (fx.map_arg(part, self._read) for part in (node.args, node.kwargs))
                made = self.new.create_node(node.op, node.target, args, kwargs, name=_name(node))
                made.meta = {"deeds": self.found.deeds[node.name], "batch": self.found.batches.get(node.name)}
                self.env[node] = made
            elif node is group.last:
                made = self.new.call_module(group.path, (self._read(group.source),))
                made.meta["deeds"] = _joined([self.found.deeds[n.name] for n in group.nodes])
                self.env[node] = made
        outputs = {id(m): n for m, n in zip(markers, _outputs(self.old))}
        self.new.output(self._built(result, outputs))
        return self.new

    def _read(self, node: fx.Node) -> fx.Node:
        if node in self.env:
            return self.env[node]
        name = str(self.parameters[node.name])
        if name not in self.held:
            first = next((n for n in self.new.nodes if n.op != "placeholder"), None)
            where = self.new.inserting_before(first) if first is not None else contextlib.nullcontext()
            with where:
                held = self.new.create_node("get_attr", name, name=name.replace(".", "_"))
            held.meta["deeds"] = self.found.deeds[node.name]
            self.held[name] = held
        return self.held[name]

    def _built(self, value: Any, outputs: dict[int, Any]) -> Any:
        """The graph's account of a result: nodes, constants, and frames of what holds them."""
        if isinstance(value, Tensor):
            if id(value) in outputs:
                return self._read(outputs[id(value)])
            place = next((i for i, t in enumerate(self.given) if t is value), None)
            if place is not None:
                return self.inputs[place]
            if id(value) in self.names:
                node = next((n for n in self.old.nodes if self.parameters.get(n.name) == self.names[id(value)]), None)
                if node is not None:
                    return self._read(node)
                return self.new.create_node("get_attr", self.names[id(value)])
            raise Refusal(f"its forward gives a tensor {list(value.shape)} that is no parameter or buffer")
        found = opened(value)
        if found is None:
            if not flatten(getattr(value, "__dict__", None))[0]:
                return value
            raise Refusal(f"its forward gives a {type(value).__name__}, which holds tensors")
        frame, parts = found
        return self.new.create_node("call_function", frame, tuple(self._built(part, outputs) for part in parts), {})


@dataclass
class _Group:
    """The operations of one call of a layer."""

    path: str
    nodes: list[fx.Node]
    source: fx.Node
    last: fx.Node


_LAYERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.MaxPool2d, nn.Flatten,
    layers.ConvBlock,
)  # fmt: skip


def _is_layer(module: nn.Module | None) -> bool:
    """Whether a layer takes one tensor and gives one, and is torch's or ours as it was written."""
    home = f"{type(module).__module__}."
    plain = isinstance(module, _LAYERS) and home.startswith(("torch.nn.modules.", "lambda_kernels.layers."))
    return plain and module is not None and not any(has_hooks(part) for part in module.modules())


def _layers_in(
    graph: fx.Graph, root: nn.Module, paths: Mapping[int, str], names: Mapping[int, str], held: Mapping[str, Any]
) -> list[_Group]:
    """The calls of layers that a graph holds: operations in a row with one input from outside and one result."""
    runs: list[tuple[Any, nn.Module, list[fx.Node]]] = []
    for node in graph.nodes:
        key, module = _layer_of(node, root)
        if module is None:
            runs.append((None, root, []))
        elif runs and runs[-1][0] == key:
            runs[-1][2].append(node)
        else:
            runs.append((key, module, [node]))
    groups = []
    for _, module, nodes in runs:
        own = set(nodes)
        read = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))
        inputs = [n for n in read if n.name not in held]
        results = [node for node in nodes if any(user not in own for user in node.users)]
        owned = {names[id(t)] for t in (*module.parameters(), *module.buffers())} if nodes else set()
        if len(inputs) == 1 and len(results) == 1 and all(held[n.name] in owned for n in read if n.name in held):
            groups.append(_Group(paths[id(module)], nodes, inputs[0], results[0]))
    return groups


def _layer_of(node: fx.Node, root: nn.Module) -> tuple[Any, nn.Module | None]:
    """The outermost layer in whose call an operation was recorded, and which call that is."""
    if node.op not in ("call_function", "call_method"):
        return None, None
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        module = _at(root, path)
        if module is not None and _is_layer(module):
            return key, module
    return None, None


def _at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path as Dynamo writes it: L['root'].stem.0"""
    try:
        return root.get_submodule(path.removeprefix("L['root']").removeprefix("."))
    except AttributeError:
        return None


def _joined(deeds: list[Deeds]) -> Deeds:
    return Deeds(
        next((d.random for d in deeds if d.random), None),
        set().union(*(d.writes for d in deeds)),
        deeds[-1].memory,
        any(d.statistics for d in deeds),
        frozenset().union(*(d.otherwise for d in deeds)),
        any(d.uncertain for d in deeds),
    )
