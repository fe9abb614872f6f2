"""Forward mode, nested transforms and batched gradients through the operations, networks and learners."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, by_task, explicit_block
from operations import TINY, call, tiny
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vmap
from torch.func import hessian as hessian_of

import lambda_kernels as lk

# torch's own, when forward mode is first used, and of every torch.func.linearize.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

Function = Callable[..., Tensor]
Point = tuple[Tensor, ...]
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}  # third derivatives of a norm over few pixels lose some digits


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lk.use_backend(request.param):
        yield request.param


def energy(f: Function) -> Function:
    return lambda *p: f(*p).pow(3).sum()


def places(point: Point) -> tuple[int, ...]:
    return tuple(range(len(point)))


def many(point: Point) -> Point:
    return tuple(torch.stack([t, t.flip(0), 0.5 * t]) for t in point)


def along(f: Function, point: Point, way: Point) -> Any:
    return jvp(f, point, way)[1]


def with_duals(f: Function, point: Point, way: Point) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, point, way))).tangent


def with_duals_without_gradients(f: Function, point: Point, way: Point) -> Any:
    with torch.no_grad():
        return with_duals(f, point, way)


def gradient_with_duals(f: Function, point: Point, way: Point) -> Any:
    """The tangents of the gradients: a Hessian times the way, in backward over forward mode."""
    with forward_ad.dual_level():
        leaves = [t.clone().requires_grad_() for t in point]
        duals = map(forward_ad.make_dual, leaves, way)
        gradients = torch.autograd.grad(energy(f)(*duals), leaves)
        tangents = [forward_ad.unpack_dual(g).tangent for g in gradients]
        return [torch.zeros_like(g) if t is None else t for t, g in zip(tangents, gradients)]


def leaves_of(point: Point) -> Point:
    return tuple(t.clone().requires_grad_() for t in point)


def batched(f: Function, point: Point, way: Point) -> Any:
    leaves = leaves_of(point)
    y = f(*leaves)
    return torch.autograd.grad(y, leaves, torch.stack([y, y.sin(), y * y]).detach(), is_grads_batched=True)


def batched_twice(f: Function, point: Point, way: Point) -> Any:
    """A batch of gradients of a batch of gradients."""
    leaves = leaves_of(point)
    y = f(*leaves)
    v = torch.stack([y, y.sin()]).detach()
    gradients = torch.autograd.grad(y, leaves, v, is_grads_batched=True, create_graph=True)
    first = [g + 0 * sum(t.sum() for t in leaves) for g in gradients]  # a constant gradient has no graph
    second = [torch.stack([g, g.cos(), 2 * g]).detach() for g in first]
    return torch.autograd.grad(first, leaves, second, is_grads_batched=True, materialize_grads=True)


def jacobian_with_graph(f: Function, point: Point, way: Point) -> Any:
    leaves = leaves_of(point)
    rows = jacobian(f, leaves, vectorize=True, create_graph=True)
    return torch.autograd.grad(sum(j.pow(2).sum() for j in rows), leaves, materialize_grads=True)


TRANSFORMS: dict[str, Callable[[Function, Point, Point], Any]] = {
    "jvp": along,
    "jvp-without-gradients": lambda f, p, v: torch.no_grad()(along)(f, p, v),
    "jvp-of-some": lambda f, p, v: jvp(lambda t: f(t, *p[1:]), p[:1], v[:1])[1],
    "jvp-of-last": lambda f, p, v: jvp(lambda t: f(*p[:-1], t), p[-1:], v[-1:])[1],
    "linearize": lambda f, p, v: linearize(f, *p)[1](*v),
    "jacfwd": lambda f, p, v: jacfwd(f, places(p))(*p),
    "hessian": lambda f, p, v: hessian_of(energy(f), places(p))(*p),
    "duals": with_duals,
    "duals-without-gradients": with_duals_without_gradients,
    "gradient-of-duals": gradient_with_duals,
    "jvp-of-grad": lambda f, p, v: along(grad(energy(f), places(p)), p, v),
    "grad-of-jvp": lambda f, p, v: grad(lambda *q: along(f, q, v).pow(2).sum(), places(p))(*p),
    "jvp-of-jvp": lambda f, p, v: along(lambda *q: along(f, q, v), p, v),
    "jacfwd-of-jacfwd": lambda f, p, v: jacfwd(jacfwd(energy(f)))(*p),
    "jvp-of-jvp-of-grad": lambda f, p, v: along(lambda *q: along(grad(energy(f), places(p)), q, v), p, v),
    "jvp-of-grad-of-grad": lambda f, p, v: along(
        grad(lambda *q: sum(g.pow(2).sum() for g in grad(energy(f), places(p))(*q)), places(p)), p, v
    ),
    "grad-of-jvp-of-grad": lambda f, p, v: grad(
        lambda *q: sum(t.pow(2).sum() for t in along(grad(energy(f), places(p)), q, v)), places(p)
    )(*p),
    "grad-of-jvp-of-jvp": lambda f, p, v: grad(
        lambda *q: along(lambda *r: along(f, r, v), q, v).sum(), places(p)
    )(*p),
    "vmap-of-jvp": lambda f, p, v: vmap(lambda *w: along(f, p, w))(*many(v)),
    "vmap-of-jvp-at-points": lambda f, p, v: vmap(lambda *q: along(f, q, v))(*many(p)),
    "jvp-of-vmap": lambda f, p, v: along(vmap(f), many(p), many(v)),
    "jvp-of-vmap-of-grad": lambda f, p, v: along(vmap(grad(energy(f), places(p))), many(p), many(v)),
    "grad-of-vmap-of-jvp": lambda f, p, v: grad(
        lambda *q: vmap(lambda *w: along(f, q, w))(*many(v)).pow(2).sum(), places(p)
    )(*p),
    "vmap-of-jvp-of-grad": lambda f, p, v: vmap(lambda *q: along(grad(energy(f), places(p)), q, v))(*many(p)),
    "jacrev-of-jacfwd": lambda f, p, v: jacrev(jacfwd(energy(f)))(*p),
    "batched-gradients": batched,
    "batched-gradients-twice": batched_twice,
    "jacobian": lambda f, p, v: jacobian(f, p, vectorize=True),
    "jacobian-with-graph": jacobian_with_graph,
    "jacobian-forward": lambda f, p, v: jacobian(f, p, vectorize=True, strategy="forward-mode"),
    "vectorized-hessian": lambda f, p, v: hessian(energy(f), p, vectorize=True),
    "vectorized-hessian-forward": lambda f, p, v: hessian(
        energy(f), p, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}  # fmt: skip
# Where torch's own operators cannot be mapped by the older vmap.
TRUTHS: dict[str, Callable[[Function, Point, Point], Any]] = {
    "jacobian-forward": lambda f, p, v: jacobian(f, p),
    "vectorized-hessian-forward": lambda f, p, v: hessian(energy(f), p),
}


def plain(op: str, per_task: bool) -> Function:
    ranks = {"x": 2 if op == "linear" else 4, "weight": 2 if op == "linear" else 4, "bias": 1, "gamma": 1, "beta": 1}

    def one(x: Tensor, weight: Tensor, bias: Tensor, *affine: Tensor) -> Tensor:
        if op == "conv2d":
            return F.conv2d(x, weight, bias, (1, 2), 1, 1, 2)
        return F.linear(x, weight, bias) if op == "linear" else explicit_block(x, weight, bias, *affine, 1e-5, TINY)

    def all_tasks(*operands: Tensor) -> Tensor:
        return by_task(one, 2, *zip(operands, ranks.values()))

    return all_tasks if per_task else one


def check(name: str, got: Function, want: Function, point: Point) -> None:
    generator = torch.Generator().manual_seed(1)
    way = tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in point)
    mine, truth = TRANSFORMS[name](got, point, way), (TRUTHS.get(name) or TRANSFORMS[name])(want, point, way)
    torch.testing.assert_close(mine, truth, **CLOSE)


@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "per-task"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("op", ["conv2d", "linear", "conv_block"])
def test_a_transform_gives_what_it_gives_of_torchs_own_operators(
    op: str, name: str, per_task: bool, backend: str
) -> None:
    operands = tiny(op, per_task)
    check(name, lambda *p: call(op, dict(zip(operands, p))), plain(op, per_task), tuple(operands.values()))


@pytest.mark.parametrize("way", ["batched", "vmap", "forward over reverse"])
def test_a_block_of_images_under_transforms_of_its_gradient(way: str) -> None:
    """Those that begin when the block has run."""
    operands = {k: v.requires_grad_(k != "x") for k, v in tiny("conv_block", False).items()}
    inputs = [operands[k] for k in ("weight", "gamma", "beta")]
    rows = []
    for y in (call("conv_block", operands), explicit_block(*operands.values(), 1e-5, TINY)):
        torch.manual_seed(1)
        directions = torch.randn(3, *y.shape, dtype=y.dtype)

        def pulled(g: Tensor, y: Tensor = y, **more: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, inputs, g, retain_graph=True, **more)

        if way == "batched":
            rows.append(pulled(directions, is_grads_batched=True))
        elif way == "vmap":
            rows.append(vmap(pulled)(directions))
        else:
            with forward_ad.dual_level():
                found = pulled(forward_ad.make_dual(directions[0], directions[1]))
                duals = [forward_ad.unpack_dual(t) for t in found]
            rows.append(tuple(t for dual in duals for t in (dual.primal, dual.tangent)))
    torch.testing.assert_close(rows[0], rows[1], **CLOSE)
