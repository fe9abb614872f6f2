"""What the figures of docs/gpu.md would be on an H200, by a model: for as long as no device has shown them.

A graph takes, for each of its nodes, GAP and the longest of three times: a kernel's least, its bytes over the memory's
rate, its operations over its unit's rate. Nodes, bytes and operations are counted, by running the code on tensors
without values; every tensor that a kernel is given moves once. `python bench/gpu_model.py` writes
bench/results/gpu-model.json, of which bench/gpu_report.py makes the page.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from by_hand import LR, Stock, Tasks, Vmapped
from gpu_kernels import as_handed_on, needed
from harness import CONFIGURATIONS, Problem, write
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lambda_kernels as lk
from lambda_kernels.backends.cuda.operands import geometry, patches_inside
from lambda_maml import Pattern, adapt, adapt_tasks, models

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
counting: Any = importlib.import_module("nodes")

# Seconds, bytes and operations per second, and where each is from.
GAP = 1.2e-6, "between two nodes of a graph: assumed"
LEAST = 2.0e-6, "of a kernel, however little it does: assumed"
STEP = 1.8e-5, "of a step where all steps are one launch, whose blocks wait for each other: assumed"
BYTES = 4.3e12, "a large copy, read and written: measured on such a card, without this project's code"
RATES = {  # by kind of kernel, for float32 operands
    "matrix": (4.0e14, "a large TF32 product: half of the 7.9e14 that bfloat16 was measured at on an H200"),
    "convolve": (1.5e14, "Triton's TF32 for 64 channels, and cuDNN's: assumed"),
    "weight gradient": (0.7e14, "Triton's when it transposed by 4-byte copies (now of 16): assumed"),
    "grouped": (0.2e14, "cuDNN's convolutions in groups, which vmap makes: assumed"),
    "patches": (0.8e14, "a first block's TF32 products, whose patches are gathered by 4 bytes: assumed"),
    "fma": (0.35e14, "multiply-adds without tensor cores, at half of their peak: assumed"),
    "float64": (1.0e13, "sums in float64, at a third of their peak: assumed"),
}
HALF = 2.0  # how much faster tensor cores are in bfloat16
STOCK = 2.5e-3, "an eager adaptation in stock PyTorch, five steps of 0.5 ms that the host sets: assumed"
HOST = {"11111": 1.7e-4, "00011": 1.2e-4}
HOST_SOURCE = "of a call of ours beside its graph: Python's part measured on a CPU, torch's assumed"
HOST_BY_HAND = 2.0e-5, "of a graph by hand, two copies and a replay: assumed"
TASKS = 64
CONFIGURATION = CONFIGURATIONS["mini-imagenet-64"]
TENSOR_CORES = ("matrix", "convolve", "weight gradient", "grouped")
# What the CUDA backend launches beside its operations, by the operation that it is like.
LIKE = {"_over_moments": "image_block"}


class Node(NamedTuple):
    """A kernel of a graph."""

    name: str
    bytes: float
    flops: float = 0.0
    kind: str = "fma"
    half: bool = False  # whether its operands are of 16 bits
    steps: int = 0  # of an adaptation, where they are one launch

    @property
    def seconds(self) -> float:
        faster = HALF if self.half and self.kind in TENSOR_CORES else 1.0
        least = max(LEAST[0], self.steps * STEP[0])
        return GAP[0] + max(least, self.bytes / BYTES[0], self.flops / (faster * RATES[self.kind][0]))


class Weighed(counting.Nodes):
    """Nodes with what each one moves and computes."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []

    @property
    def seconds(self) -> float:
        return sum(node.seconds for node in self.nodes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.total
        results = super().__torch_dispatch__(func, types, args, kwargs)
        count, tensors = self.total - before, distinct((args, kwargs, results))
        if count:
            name = func.overloadpacket.__name__
            flops, kind = operations(name, args, results)
            half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
            node = Node(name, sum(map(size, tensors)) / count, flops / count, kind, half)
            self.nodes += [node] * count
        return results

    def launched(self, name: str, kernels: int = 1) -> None:
        """Kernels past torch's operators, whose tensors `weighing` knows."""
        super().launched(name, kernels)
        self.nodes += [Node(name, 0.0)] * kernels


def size(t: Tensor) -> int:
    """Bytes; of an expanded axis one value moves."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride()) if stride or n == 0)


def distinct(values: Any) -> list[Tensor]:
    return list({id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())


def operations(name: str, args: Sequence[Any], results: Any) -> tuple[float, str]:
    """(floating-point operations of an operator of ATen, kind)."""
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        left = args[0] if name in ("mm", "bmm") else args[1]
        return 2.0 * results.numel() * left.shape[-1], "fma"  # torch's default: no TF32 in matrix products
    if name == "convolution":
        return 2.0 * results.numel() * args[1][0].numel(), "convolve" if args[8] == 1 else "grouped"
    if name == "convolution_backward":
        wanted = sum(bool(v) for v in args[10][:2])
        return wanted * 2.0 * args[0].numel() * args[2][0].numel(), "convolve" if args[9] == 1 else "grouped"
    return 0.0, "fma"


def product_of_triton(name: str, operands: dict[str, Any]) -> tuple[float, str]:
    taps = operands.get("CHANNELS", 0) * operands.get("KH", 0) * operands.get("KW", 0)
    if name == "convolve":
        of_pixels = operands["y"].numel() // math.prod(operands["y"].shape[-2:])  # y may hold one of each window alone
        return 2.0 * of_pixels * operands["y_height"] * operands["y_width"] * taps, "convolve"
    if name == "weight_gradient":
        return 2.0 * operands["gy"].numel() * taps, "weight gradient"
    if name == "matrix_product":
        return 2.0 * operands["y"].numel() * operands["terms"], "fma"
    return 0.0, "fma"


def product_of_cuda(name: str, operands: Sequence[Any]) -> tuple[float, str]:
    """Of the patches [M, K] of a first block's images, and of no other operation."""
    shapes = [t.shape for t in operands if isinstance(t, Tensor)]
    if name == "image_moments":
        (tasks, images, channels, height, width), (kh, kw) = shapes[0], operands[1]
        sizes = geometry(operands[0], torch.Size((1, 1, channels, kh, kw)), operands[2], 1)
        inside, side = patches_inside(sizes), channels * kh * kw + 1
        one_by_one = (sizes.out_height * sizes.out_width - inside) * side * (side + 1)
        distances = kw + (kh - 1) * (2 * kw - 1) if inside else 0
        return float(tasks * images * (one_by_one + 2 * height * width * channels**2 * distances)), "float64"
    if name in ("image_block", "image_block_grad"):
        backward = name == "image_block_grad"
        (tasks, images, channels, height, width), weight = shapes[backward : backward + 2]
        places = height * width / (4 if backward else 1)  # pooled: one of each window
        kind = "fma" if backward or operands[0].dtype == torch.float64 else "patches"
        return 2.0 * max(tasks, weight[0]) * images * places * math.prod(weight[1:]), kind
    return 0.0, "fma"


def all_steps(p: Any, moved: int) -> Node:
    """All steps of the last block, forward and back to its weight, and of the linear layer, as one launch; `p` is the
    launch's structure."""
    pixels = p.out_height * p.out_width * p.outputs * p.inputs * p.kernel_height * p.kernel_width
    head = p.features * p.ways * (3 if pixels else 2)  # its features' gradient for the block's sake alone
    flops = 2.0 * p.tasks * p.images * p.steps * (2 * pixels + head)
    return Node("cuda last_steps", moved, flops, "convolve", steps=p.steps)


@contextmanager
def weighing(weighed: Weighed) -> Iterator[None]:
    """Calls inside are those of a GPU's backends on tensors without values. What an operation of the CUDA backend moves
    goes to the first kernel that it launches."""

    def launch(noted: Callable[..., None]) -> Callable[..., None]:
        def run(kernel: Any, programs: int, where: Tensor, *operands: Any, **options: Any) -> None:
            noted(kernel, programs, where, *operands, **options)
            tensors, named = distinct(operands), dict(zip(kernel.arg_names, operands))
            flops, kind = product_of_triton(kernel.fn.__name__, named)
            half = tensors[0].element_size() == 2
            moved = sum(map(size, tensors))
            if "z" in named and named["z"] is named.get("y"):  # in place: read and written
                moved += size(named["y"])
            weighed.nodes[-1] = Node(weighed.nodes[-1].name, moved, flops, kind, half)

        return run

    def start(noted: Callable[..., None]) -> Callable[..., None]:
        def run(self: Any, name: str, parameters: Any, x: Tensor, what: str) -> None:
            noted(self, name, parameters, x, what)
            if name == "last_steps":
                weighed.nodes[-1] = all_steps(parameters, size(x))

        return run

    def method(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *operands: Any, **more: Any) -> Any:
            first = len(weighed.nodes)
            results = plain(self, *operands, **more)
            own = [i for i in range(first, len(weighed.nodes)) if weighed.nodes[i].name.startswith("cuda")]
            if own and not any(weighed.nodes[i].bytes for i in own):
                tensors = distinct((operands, more, results))
                product = product_of_cuda(name, operands)
                flops = 0.0 if any(node.flops for node in weighed.nodes[first:]) else product[0]
                node = Node(weighed.nodes[own[0]].name, sum(map(size, tensors)), flops, product[1])
                weighed.nodes[own[0]] = node._replace(half=tensors[0].element_size() == 2)
            return results

        return run

    with ExitStack() as stack:
        stack.enter_context(counting._noted(weighed, counting.BACKENDS["autotune"]))
        package = "lambda_kernels.backends.triton."
        for module in [m for n, m in sys.modules.items() if n.startswith(package) and n != package + "launch"]:
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", launch(module.launch)))
        for name in {"launch", "_launch"} & vars(counting._Cuda).keys():
            stack.enter_context(mock.patch.object(counting._Cuda, name, start(getattr(counting._Cuda, name))))
        for name in [*filter(lambda name: not name.startswith("_"), dir(lk.backends.Backend)), *LIKE]:
            plain = getattr(counting._Cuda, name)
            if callable(plain) and plain is not getattr(lk.backends.Reference, name, None):
                if name not in ("reasons", "refusals", "block_refusals", "image_refusals", "layout"):
                    stack.enter_context(mock.patch.object(counting._Cuda, name, method(LIKE.get(name, name), plain)))
        yield


def adaptation(pattern: str, tasks: int = 1, dtype: torch.dtype = torch.float32) -> Weighed:
    """The graph of `adapt`, or of `adapt_tasks` with a query image per task."""
    weighed = Weighed()
    given: dict[str, Any] = {"pattern": pattern, "steps": CONFIGURATION.steps, "lr": LR}
    model, xs, ys = problem(dtype)
    with weighing(weighed), torch.no_grad():
        if tasks == 1:
            adapt(model, xs, ys, **given)
        else:
            xs, ys = (torch.empty(tasks, *t.shape, dtype=t.dtype, device="meta") for t in (xs, ys))
            adapt_tasks(model, xs, ys, xs[:, :1].clone(), **given)
    return weighed


def problem(dtype: torch.dtype = torch.float32) -> Problem:
    c = CONFIGURATION
    model = models.conv4(c.ways, c.in_channels, c.width, c.image_size).to("meta", dtype)
    images = torch.empty(c.ways * c.shots, c.in_channels, c.image_size, c.image_size, dtype=dtype, device="meta")
    return Problem(model, images, torch.empty(len(images), dtype=torch.int64, device="meta"))


def by_hand(pattern: str) -> Weighed:
    """Stock PyTorch under the pattern with the prefix by hand, as a graph."""
    stock, weighed = Stock(problem(), Pattern(pattern), CONFIGURATION.steps, prefix=True), Weighed()
    with weighed:
        stock()
    return weighed


def vmapped(pattern: str) -> Weighed:
    """All tasks at once by vmap of stock PyTorch."""
    model, xs, ys = problem()
    many = xs.expand(TASKS, *xs.shape)
    tasks = Tasks(model, many, ys.expand(TASKS, -1), many[:, :1])
    run, weighed = Vmapped(tasks, Pattern(pattern), CONFIGURATION.steps), Weighed()
    with weighed:
        run()
    return weighed


def block(layer: int, backward: bool) -> tuple[float, float]:
    """(seconds, floor in seconds) of a fused block, forward or backward, with weights of each task's own."""
    c, side = CONFIGURATION, CONFIGURATION.image_size >> layer
    channels, images = c.width if layer else c.in_channels, c.ways * c.shots
    images_in, images_out = (TASKS, images, channels, side, side), (TASKS, images, c.width, side // 2, side // 2)
    shapes = [images_in, (TASKS, c.width, channels, 3, 3), *[(TASKS, c.width)] * 2, images_out]
    moving = (layer > 0, True, True, True, False)
    operands = [torch.empty(s, device="meta", requires_grad=moves) for s, moves in zip(shapes, moving)]
    weighed = Weighed()
    with weighing(weighed):
        x, weight, gamma, beta, gy = as_handed_on(operands)
        if backward:
            y = lk.functional.conv_block(x, weight, None, gamma, beta)
            weighed.nodes.clear()
            with weighed:
                torch.autograd.grad(y, [t for t in (x, weight, gamma, beta) if t.requires_grad], gy)
        else:
            with torch.no_grad(), weighed:
                lk.functional.conv_block(x, weight, None, gamma, beta)
    sizes = TASKS, images, channels, c.width, side, side // 2
    moved, flops = needed(*sizes, own=TASKS, backward=backward, first=not layer)
    return weighed.seconds, max(moved / BYTES[0], flops / RATES["matrix"][0])


def predicted() -> dict[str, Any]:
    """Each figure of the page, by its name there."""
    ours = {pattern: adaptation(pattern) for pattern in ("11111", "00011")}
    many, half = adaptation("00011", TASKS), adaptation("00011", TASKS, torch.bfloat16)
    figures: dict[str, float] = {}
    for pattern, graph in ours.items():
        took, hand = graph.seconds + HOST[pattern], by_hand(pattern).seconds + HOST_BY_HAND[0]
        figures[f"nodes {pattern}"] = len(graph.nodes)
        figures[f"adapt {pattern} stock_full"], figures[f"adapt {pattern} best"] = STOCK[0] / took, hand / took
    figures["tasks 00011 stock_full"] = STOCK[0] * TASKS / many.seconds
    figures["tasks 00011 bfloat16 stock_full"] = STOCK[0] * TASKS / half.seconds
    figures["tasks 00011 vmap"] = vmapped("00011").seconds / many.seconds
    for name, backward in (("forward", False), ("backward", True)):
        for layer in range(4):
            took, floor = block(layer, backward)
            figures[f"block {layer + 1} {name}"] = floor / took
    times = {**{f"adapt {p}": g for p, g in ours.items()}, "tasks 00011": many, "tasks 00011 bfloat16": half}
    constants = {
        "the gap": [f"{1e6 * GAP[0]:g} us", GAP[1]],
        "the least": [f"{1e6 * LEAST[0]:g} us", LEAST[1]],
        "the least of a step": [f"{1e6 * STEP[0]:g} us", STEP[1]],
        "memory": [f"{BYTES[0] / 1e12:g} TB/s", BYTES[1]],
        **{kind: [f"{rate / 1e12:g} TFLOP/s", source] for kind, (rate, source) in RATES.items()},
        "tensor cores in bfloat16": [f"{HALF:g}x", "their rates above times this: assumed"],
        "stock": [f"{1e3 * STOCK[0]:g} ms", STOCK[1]],
        "the host": [", ".join(f"{1e3 * t:g} ms for {p}" for p, t in HOST.items()), HOST_SOURCE],
        "the host, by hand": [f"{1e3 * HOST_BY_HAND[0]:g} ms", HOST_BY_HAND[1]],
    }
    return {
        "card": "H200",
        "constants": constants,
        "figures": {name: float(f"{value:.3g}") for name, value in figures.items()},
        "milliseconds": {name: float(f"{1e3 * graph.seconds:.3g}") for name, graph in times.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    default = ROOT / "bench" / "results" / "gpu-model.json"
    parser.add_argument("--result", type=Path, default=default, help="Where to write. Default: bench/results")
    parser.add_argument("--nodes", metavar="PATTERN", help="Print its nodes instead, the longest first")
    given = parser.parse_args()
    if given.nodes:
        graph = adaptation(given.nodes)
        for node in sorted(graph.nodes, key=lambda node: -node.seconds):
            what = f"{1e6 * node.seconds:8.1f} us  {node.bytes / 1e6:9.2f} MB  {node.flops / 1e9:8.3f} GFLOP"
            print(f"{what}  {node.name}")
        return 0
    found = predicted()
    write(given.result, found)
    for name, value in found["figures"].items():
        print(f"{name}: {value:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
