"""A call of a native operator, of the prepared call or of a snapshot with arguments that do not fit: it is refused, or
right. A call that ends the process is found by the runner."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from chains import Layer, Network, given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lambda_kernels.backends import native
from lambda_kernels.backends.reference import channels_last

from .adaptations import Found

__all__ = ["NAMES", "check_operator", "describe_operator"]

OPS = torch.ops.lambda_kernels
NETWORKS = (
    Network((2, 7, 6), (Layer(3), Layer(4, stride=(1, 2), pool=1, eps=1e-3)), images=4, ways=3),
    Network((8, 6, 6), (Layer(8), Layer(8)), images=2),
    Network((4, 5, 7), (Layer(6, (1, 3), padding=(0, 1), groups=2), Layer(5, (2, 2), dilation=(2, 1))), images=3),
    Network((16, 4, 5), (Layer(64), Layer(9, pool=1)), images=1, ways=2),
    Network((5,), (), images=4, ways=3),
)
NEAR = {torch.float64: 1e-9, torch.float32: 1e-3}  # the same kernels on other memory: what is wrong is far off
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, OverflowError, MemoryError, NotImplementedError)
NUMBERS = (0, -1, 1, 2, 3, 5, 33, 1000, -(2**63), 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63)
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
    torch.complex64,
)  # fmt: skip


class Call(NamedTuple):
    name: str
    run: Callable[..., Any]
    arguments: list[Any]
    changes: list[str]  # what was done to them


def _draw(rng: random.Random) -> tuple[Any, ...]:
    """Sizes of images and of a convolution that fit."""
    tasks, n = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3])
    c, o = rng.choice([1, 2, 3, 8, 16]), rng.choice([1, 3, 8, 16, 64])
    h, w, pool = rng.choice([3, 4, 6, 9]), rng.choice([3, 5, 8]), rng.choice([1, 2, 2])
    numbers = [rng.choice([1, 1, 2]) for _ in range(2)] + [rng.choice([1, 1, 2]) for _ in range(2)] + [1, 1, pool]
    return tasks, n, c, o, h, w, numbers


def _norm(rng: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    tasks, n, _, c, h, w, numbers = _draw(rng)
    z = channels_last(torch.randn(tasks, n, c, h, w, dtype=dtype))
    gamma, beta, pool = torch.randn(tasks, c, dtype=dtype), torch.randn(1, c, dtype=dtype), numbers[6]
    y, index, mean, rstd = OPS.norm_relu_pool(z, gamma, beta, 1e-5, pool)
    v = rng.choice([None, torch.randn_like(z)])
    saved = [torch.randn_like(y), z, gamma, index, mean, rstd, pool]
    return {
        "norm_relu_pool": [z, gamma, beta, 1e-5, pool],
        "norm_relu_pool_grad": [*saved, rng.random() < 0.5],
        "norm_relu_pool_grad_grad": [*saved, v, gamma, beta, rng.random() < 0.5],
    }


def _convolutions(rng: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    tasks, n, c, o, h, w, _ = _draw(rng)
    own, pads = rng.choice([1, tasks]), [rng.choice([0, 1, 2]) for _ in range(2)]
    x, weight = torch.randn(tasks, n, c, h, w, dtype=dtype), torch.randn(own, o, c, 3, 3, dtype=dtype)
    gy = torch.randn(tasks, n, o, h + 2 * pads[0] - 2, w + 2 * pads[1] - 2, dtype=dtype)
    return {
        "winograd": [x, weight, pads],
        "winograd_input_grad": [gy, weight, list(x.shape), pads],
        "winograd_weight_grad": [gy, x, list(weight.shape), pads],
    }


def _blocks(rng: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    tasks, n, _, o, h, w, numbers = _draw(rng)
    c, kernel = rng.choice([1, 2, 3]), [rng.choice([1, 2, 3]), rng.choice([1, 2, 3])]
    x = torch.randn(rng.choice([1, tasks]), n, c, h + 2, w + 2, dtype=dtype)
    weight = torch.randn(rng.choice([1, tasks]), o, c, *kernel, dtype=dtype)
    gamma, beta = torch.randn(tasks, o, dtype=dtype), torch.randn(1, o, dtype=dtype)
    moments = OPS.image_moments(x, kernel, numbers)
    y, index, _, rstd = OPS.image_block(x, weight, gamma, beta, moments, numbers, 1e-5)
    affine = OPS.affine_block(x, weight, beta, numbers)
    head = torch.randn(3, affine[0, 0].numel(), dtype=dtype)
    chain = [weight[0], beta[0], head, head[:, 0].clone()]
    ready = OPS.affine_chain_prepare(chain, numbers, x.shape[2:])
    return {
        "frozen_block": [x, weight, gamma, beta, numbers, 1e-5],
        "affine_block": [x, weight, beta, numbers],
        "affine_chain": [x[0], chain, numbers, rng.choice([[], ready])],
        "affine_chain_prepare": [chain, numbers, list(x.shape[2:])],
        "image_moments": [x, kernel, numbers],
        "image_block": [x, weight, gamma, beta, moments, numbers, 1e-5],
        "image_block_grad": [torch.randn_like(y), x, weight, gamma, index, rstd, moments, numbers],
    }


def _chains(rng: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    network, tasks = rng.choice(NETWORKS), rng.choice([1, 1, 2, 3])
    task = given(network, dtype, tasks=tasks, own=rng.random() < 0.5)
    count, layers = len(task.parameters), len(network.layers)
    updated = network.from_layer(rng.randrange(layers + 1))
    flags, geometry, eps = native._constants(updated, network.specs)
    ranks, steps = [4, 1, 1] * layers + [2, 1], rng.choice([1, 2, 3])
    own = [p if p.dim() > n else p.unsqueeze(0) for p, n in zip(task.parameters, ranks)]
    rates, from_images = [0.1] * (steps * sum(flags)), rng.random() < 0.5
    _, path = OPS.chain_steps(task.x, task.labels, own, flags, geometry, eps, steps, rates, from_images)
    shape = [geometry, eps, from_images]
    chain = own if layers == 0 or rng.random() < 0.7 else own[:-2]
    y, kept = OPS.chain_logits(task.x, chain, *shape)
    wanted, want_x = [rng.choice([0, 1]) for _ in own], not from_images and rng.random() < 0.5
    head = task.parameters[-2:] if task.parameters[-1].dim() == 1 else [p[0] for p in own[-2:]]
    plain = [p[0] if p.dim() > n else p for p, n in zip(task.parameters, ranks)][: count - 2] + head
    return {
        "inner_loop": [task.x, task.labels, task.parameters, flags, geometry, eps, steps, rng.choice([[0.1], rates]),
                       rng.choice([None, task.query])],
        "chain_steps": [task.x, task.labels, own, flags, geometry, eps, steps, rates, from_images],
        "chain_steps_grad": [torch.randn_like(path[:, -1]), task.x, task.labels, own, path, flags, geometry, eps, steps,
                             rates, wanted, from_images, want_x, rng.random() < 0.5, rng.random() < 0.7],
        "chain_logits": [task.x, chain, *shape],
        "chain_logits_grad": [torch.randn_like(y), task.x, chain, kept, geometry, eps, wanted[: len(chain)],
                              from_images, want_x],
        "prepared_call": [plain, flags, geometry, eps, task.x[0], task.labels[0], steps, [0.1]],
    }  # fmt: skip


def _snapshots(rng: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    module = torch.nn.Linear(2, 3)
    return {
        "addresses": [[module], [module.__dict__, [module]], rng.random() < 0.5],
        "forms": [list(module.parameters())],
        "versions": [[torch.nn.Linear], [torch.nn.Linear.forward]],
    }


KINDS = (_norm, _convolutions, _blocks, _chains, _snapshots)
KIND_OF = {name: kind for kind in KINDS for name in kind(random.Random(0), torch.float64)}
NAMES = list(KIND_OF)
"""Every door; a seed is a call of one, in turn."""


def _prepared(
    parameters: Any, flags: Any, geometry: Any, eps: Any, xs: Any, ys: Any, steps: Any, rates: Any
) -> list[Tensor] | None:
    found: list[Tensor] | None = native._extension.PreparedCall(parameters, flags, geometry, eps)(xs, ys, steps, rates)
    return found


def _number(rng: random.Random, old: Any) -> Any:
    return rng.choice([*NUMBERS, old if isinstance(old, bool) else old + rng.choice([-1, 1]), None, 0.5, "1", []])


def _tensor(rng: random.Random, t: Tensor) -> tuple[Any, str]:
    """Another tensor in place of t, and what it is; most do not fit, some are the same values in other memory."""
    if not _held(t):  # changed before
        return t, "as it is"
    if t.dim() == 0 or t.numel() == 0:
        return t.new_zeros(3), "[3]"
    axis = rng.randrange(t.dim())
    size = t.shape[axis]
    ways: dict[str, Callable[[], Any]] = {
        "an axis less": lambda: t.select(axis, 0),
        "an axis more": lambda: t.unsqueeze(axis),
        "no axes": lambda: t.flatten()[0],
        "one less": lambda: t.narrow(axis, 0, size - 1),
        "one": lambda: t.narrow(axis, 0, 1),
        "one more": lambda: torch.cat([t, t.narrow(axis, 0, 1)], axis),
        "twice": lambda: torch.cat([t, t], axis),
        "turned": lambda: t.transpose(axis, (axis + 1) % t.dim()),
        "other memory": lambda: torch.stack([t, t], -1)[..., 0],
        "other order": lambda: t.mT.contiguous().mT if t.dim() > 1 else t.repeat(2)[: t.shape[0]],
        "expanded": lambda: t.narrow(axis, 0, 1).expand(*t.shape[:axis], size, *t.shape[axis + 1 :]),
        "vast": lambda: t.narrow(axis, 0, 1).expand(*t.shape[:axis], 2**40, *t.shape[axis + 1 :]),
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "dtype": lambda: t.to(rng.choice(DTYPES)),
        "negative bit": lambda: torch._neg_view(t) if t.is_floating_point() else t.neg(),
        "requires grad": lambda: t.clone().requires_grad_(t.is_floating_point()),
        "labels": lambda: t + rng.choice([-1, 1, 100]) if t.dtype == torch.int64 else t.roll(1),
        "none": lambda: None,
        "a list": lambda: t.tolist(),
        "a number": lambda: 1.5,
    }
    name = rng.choice(list(ways))
    return ways[name](), name


def _changed(rng: random.Random, value: Any) -> tuple[Any, str]:
    """An argument in place of a good one."""
    if isinstance(value, Tensor):
        return _tensor(rng, value)
    if isinstance(value, list):
        if value and rng.random() < 0.7:
            at = rng.randrange(len(value))
            new, told = _changed(rng, value[at])
            return [*value[:at], new, *value[at + 1 :]], f"[{at}] {told}"
        new = rng.choice([[], value[:-1], [*value, *value[-1:]], [*value, *value], None, 1, [None], [[]]])
        return new, f"a list of {len(new)}" if isinstance(new, list) else str(new)
    if isinstance(value, float):
        new = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e300, None, "1", []])
        return new, str(new)
    if isinstance(value, (bool, int)):
        new = _number(rng, value)
        return new, str(new)
    new = rng.choice([None, 1, [], "", torch.zeros(2)])
    return new, str(new)


def call(seed: int) -> Call:
    """The call of a seed."""
    name = NAMES[seed % len(NAMES)]
    rng = random.Random(f"operator {seed}")
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    arguments, changes = KIND_OF[name](rng, dtype)[name], []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
        at = rng.randrange(len(arguments))
        arguments[at], told = _changed(rng, arguments[at])
        changes.append(f"{at}: {told}")
    run = {
        "prepared_call": _prepared,
        "addresses": native._extension.addresses,
        "forms": native._extension.forms,
        "versions": native._extension.versions,
    }
    return Call(name, run.get(name) or getattr(OPS, name), arguments, changes)


def describe_operator(seed: int) -> str:
    """The call of a seed in words."""
    c = call(seed)

    def told(value: Any) -> str:
        if isinstance(value, Tensor):
            strides = value.stride() if value.layout == torch.strided else "none"
            return f"{list(value.shape)} {value.dtype} {value.device} strides {strides}"
        return f"[{', '.join(map(told, value))}]" if isinstance(value, list) else repr(value)

    return "\n".join([f"operator {seed}: {c.name}, changed {c.changes}", *map(told, c.arguments)])


def _map(f: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    return type(value)(_map(f, v) for v in value) if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _held(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.layout == torch.strided and t.numel() < 2**30


def _forms(value: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride() if t.numel() else None, t.device.type) for t in _tensors(value)]


def _faked(c: Call) -> list[tuple[Any, ...]] | str:
    """The forms of the results without data, or the refusal."""
    with FakeTensorMode() as mode:
        try:
            return _forms(c.run(*_map(mode.from_tensor, c.arguments)))
        except REFUSALS as error:
            return f"{type(error).__name__}: {error}"


def check_operator(seed: int) -> Found:
    """Make the call of a seed and say what came of it."""
    c = call(seed)
    operands = [t for t in _tensors(c.arguments) if _held(t)]
    before = [t.detach().clone() for t in operands]
    got: Any = None
    refusal = ""
    try:
        got = c.run(*c.arguments)
    except REFUSALS as error:
        refusal = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if any(not torch.equal(a.detach().nan_to_num(), b.nan_to_num()) for a, b in zip(operands, before)):
        return Found("WRONG", "an operand was written to")
    if any(text in refusal for text in ("INTERNAL ASSERT", "vector::", "basic_string")):
        return Found("WRONG", f"a refusal of no one: {refusal}")
    if c.run not in (_prepared, native._extension.addresses, native._extension.forms, native._extension.versions):
        strided = all(t.layout == torch.strided for t in _tensors(c.arguments))
        memory = any(text in refusal for text in ("memory", "allocate", "overflow", "label "))
        faked = _faked(c) if strided and not memory else None
        if faked is not None and isinstance(faked, str) != bool(refusal):
            return Found("WRONG", f"the fake gives {faked}, the operator {refusal or _forms(got)}")
        if faked is not None and not refusal and faked != _forms(got):
            return Found("WRONG", f"the fake gives {faked}, the operator {_forms(got)}")
    if refusal or got is None:
        return Found("refused")
    if isinstance(got, bytes) or len(operands) < len(_tensors(c.arguments)):
        return Found("ok")
    again = c.run(*_map(lambda t: t.detach().resolve_neg().contiguous() if t.dim() else t, c.arguments))
    for a, b in zip(_tensors(got), _tensors(again), strict=True):
        if a.dtype not in NEAR:  # places of maxima, and a pass that is kept
            continue
        most = max(1.0, float(b.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())) if b.numel() else 1.0
        # sums in another order: of the largest value that is summed, per dtype
        if not torch.allclose(a, b, rtol=0.0, atol=NEAR[a.dtype] * most, equal_nan=True):
            return Found("WRONG", f"contiguous copies give {float((a - b).abs().max()):.1e} else")
    return Found("ok")
