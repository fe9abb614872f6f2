"""The nodes of the CUDA graph of one adaptation, counted without a GPU.

The code of `adapt` and `adapt_tasks` runs on meta tensors, which have shapes and no values; kernels of the CUDA and the
Triton backend are noted in place of being launched. Every operator of ATen that is no view and no allocation counts as
one node, of the `_foreach_` ones as one where their fast kernel takes them, else as one per tensor.

    python tests/nodes.py                # a table of patterns and numbers of tasks
"""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import lambda_kernels as lk
from lambda_kernels import backends, cuda_graph
from lambda_kernels.backends import Backend, Call, Cuda, Reference, Triton
from lambda_kernels.backends.autotune import Autotune, Choice, Table
from lambda_maml import adapt, adapt_tasks, models
from lambda_maml.inner import batch, checks, recorded

__all__ = ["KERNELS", "Nodes", "counted", "is_view"]

# Kernels that a launcher of the CUDA library queues, and fills: `launch` in csrc/cuda.
KERNELS = {
    "norm_relu_pool": 3, "norm_relu_pool_grad": 3, "image_moments": 2, "image_block": 2, "image_block_grad": 2,
    "cross_entropy_grad": 1, "sgd": 1, "last_steps": 2,
}  # fmt: skip
# Which backend an operation is given to, as a device would choose it (docs/gpu.md); the first word of a table's key.
CHOICES = {
    "inner_loop": "cuda",
    "block": "cuda",
    "linear": "reference",
    "first": "cuda",
    "cross_entropy_grad": "cuda",
    "sgd_": "cuda",
}
# Allocations, and a view that is not declared as one.
NO_KERNELS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "_unsafe_view")


class Nodes(TorchDispatchMode):
    """Counts what a CUDA graph would hold of a function, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.count.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("convolution"):
            results = tree_map_only(Tensor, lambda t: _as_cudnn_lays_it_out(t, args), results)
        makes = func._schema.is_mutable or any(isinstance(t, Tensor) for t in tree_leaves(results))
        if makes and name not in NO_KERNELS and not is_view(func):
            self.count[name] += _nodes(name, args)
        return results

    def launched(self, name: str, kernels: int = 1) -> None:
        """Note kernels that go past torch's operators."""
        self.count[name] += kernels


def is_view(func: Any) -> bool:
    """Whether an operator's results share the memory of its operands, which it only reads."""
    aliases = [r.alias_info for r in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _nodes(name: str, args: tuple[Any, ...]) -> int:
    """How many kernels an operator of ATen launches on a CUDA device."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if not name.startswith("_foreach") or not lists:
        return 1
    fast = all(len({(t.stride(), t.dtype) for t in pair}) == 1 and _is_dense(pair[0]) for pair in zip(*lists))
    return 1 if fast else len(lists[0])


def _as_cudnn_lays_it_out(result: Tensor, args: tuple[Any, ...]) -> Tensor:
    """A convolution's result, channels-last where an operand is: for meta tensors torch gives another layout."""
    last = torch.channels_last
    images = [t for t in args if isinstance(t, Tensor) and t.dim() == 4]
    if result.dim() != 4 or all(t.is_contiguous() or not t.is_contiguous(memory_format=last) for t in images):
        return result
    return torch.empty(result.shape, dtype=result.dtype, device=result.device, memory_format=last)


def _is_dense(t: Tensor) -> bool:
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) == t.numel()


class _Cuda(Cuda):
    """The CUDA backend on meta tensors; its launches are noted."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(device="meta")
        self.nodes = nodes

    def reasons(self) -> list[str]:
        return []

    def launch(self, name: str, *_: Any) -> None:
        self.nodes.launched(f"cuda {name}", KERNELS[name])

    def limits(self, *_: Any) -> Any:
        """What a launch of several steps may take of a device: whatever it asks for."""

    def plan(self, *_: Any) -> bool:
        return True


class _Triton(Triton):
    """The Triton backend on tensors of any device."""

    def reasons(self) -> list[str]:
        return []

    def refusals(self, call: Call) -> list[str]:
        return []


class _Choices(dict[str, Choice]):
    """A table that holds a choice for every key."""

    def get(self, key: str, default: Any = None) -> Choice:
        return self[key]

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Choice:
        op = key.split()[0]
        if op == "block" and not re.search(r"\[\d+x\d+x3x", key):  # not of images
            return Choice("triton", {}, {})
        return Choice(CHOICES.get(op, "triton"), {}, {})


def _autotuned(nodes: Nodes) -> Autotune:
    table = Table(None)
    table.choices = _Choices()
    return Autotune([_Cuda(nodes), _Triton(), Reference()], lambda device: table)


BACKENDS: dict[str, Callable[[Nodes], Backend]] = {
    "autotune": _autotuned, "cuda": _Cuda, "triton": lambda nodes: _Triton(),
}  # fmt: skip


_numbers = itertools.count()


@contextmanager
def _noted(nodes: Nodes, make: Callable[[Nodes], Backend]) -> Iterator[None]:
    """Calls inside are those of a GPU's backend on meta tensors; what it records is run once and counted."""
    package = importlib.import_module("lambda_kernels.backends.triton")
    launch = importlib.import_module("lambda_kernels.backends.triton.launch")

    def keep(kernel: Any, *_: Any, **__: Any) -> None:
        nodes.launched(f"triton {kernel.fn.__name__}")

    def recording(key: Any, what: str, function: Callable[..., Any], inputs: Any, *_: Any) -> Callable[..., Any]:
        def replay(*given: Tensor) -> Any:
            with torch.no_grad(), nodes:
                results = function(*inputs)
            return tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), results)

        return replay

    get_torch_obj_rule_map()  # what Dynamo reads off torch's functions once, before some are replaced
    with ExitStack() as stack:
        stack.callback(backends._chosen.clear)
        backend = make(nodes)
        backend.name = f"counted-{next(_numbers)}"  # nothing is kept of an earlier count
        stack.enter_context(mock.patch.dict(backends._BACKENDS, {backend.name: backend}))
        stack.enter_context(lk.use_backend(backend.name))
        for owner, attribute, new in (
            (checks, "check_device", lambda parameters: None),  # meta tensors are no mistake here
            (torch, "is_autocast_enabled", lambda *_: False),  # torch knows none of them
            (cuda_graph, "refusal", lambda device: None),
            (recorded.RECORDINGS, "get", recording),
            (batch, "_values_at_once", lambda device: 1 << 40),  # all tasks in one graph
            (launch.Tuner, "tile", lambda self, key, tiles, *_: tiles[0]),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, new))
        names = [module.name for module in pkgutil.iter_modules(package.__path__)]
        modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
        for module in [m for m in modules if getattr(m, "launch", None) is launch.launch]:
            stack.enter_context(mock.patch.object(module, "launch", keep))
        yield


def counted(pattern: str, tasks: int = 1, backend: str = "autotune", **given: Any) -> Nodes:
    """What the graph of an adaptation holds: conv4, 84x84, 64 channels, 5-way 5-shot, K=5; many tasks with queries."""
    nodes = Nodes()
    model = models.conv4(5, 3, 64, 84).to("meta")
    with _noted(nodes, BACKENDS[backend]):
        if tasks == 1:
            xs, ys = torch.empty(25, 3, 84, 84, device="meta"), torch.empty(25, dtype=torch.int64, device="meta")
            adapt(model, xs, ys, pattern=pattern, steps=5, lr=0.01, **given)
        else:
            xs, xq = (torch.empty(tasks, n, 3, 84, 84, device="meta") for n in (25, 75))
            ys = torch.empty(tasks, 25, dtype=torch.int64, device="meta")
            with torch.no_grad():
                adapt_tasks(model, xs, ys, xq, pattern=pattern, steps=5, lr=0.01, **given)
    return nodes


def main() -> None:
    for backend in BACKENDS:
        for pattern in ("11111", "00011", "00001"):
            for tasks in (1, 64):
                nodes = counted(pattern, tasks, backend)
                names = ", ".join(f"{count} {name}" for name, count in nodes.count.most_common())
                print(f"{backend} {pattern}, {tasks} tasks: {nodes.total} nodes: {names}")


if __name__ == "__main__":
    main()
