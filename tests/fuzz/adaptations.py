"""A random network, adapted in every way to random tasks, beside a plain loop: `torch.func.functional_call` and
`torch.autograd.grad` on contiguous copies, task by task, in float64."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import lambda_kernels as lk
from lambda_maml import LambdaMAML, Pattern, adapt, adapt_tasks
from lambda_maml.network import layers_of

from .grammar import Network, network

__all__ = ["ALLOWED", "Found", "check", "describe"]

ALLOWED = 1e-9
"""The worst allowed difference, relative to the greatest value of what is compared (1 at least). A step rounds to about
1e-16 of it, a few steps through norms with small variances to 1e-13; the least error of a wrong formula or of a step
left out that these networks show is some 1e-5."""
UNSTABLE = 1e-3
"""A network of which a change of the inputs by 1e-13 changes the truth by more than ALLOWED * UNSTABLE stands on a kink
or in chaos: no comparison means anything there."""

Values = dict[str, Tensor]


class Task(NamedTuple):
    xs: Tensor
    ys: Tensor
    xq: Tensor
    yq: Tensor


class Setting(NamedTuple):
    """What a network is adapted with."""

    pattern: str
    steps: int
    lr: Any  # a number, or [steps][layers]
    norm: str
    second_order: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    converted: bool
    layout: torch.memory_format
    tasks: list[Task]


class Found(NamedTuple):
    """What came of a seed: "ok", "skipped" (with the reason), or a failure."""

    verdict: str  # "ok", "skipped", "WRONG", "RAISES"
    told: str = ""


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - F.one_hot(labels, logits.shape[1])).square().mean()


def setting(net: Network, seed: int, model: nn.Module) -> Setting:
    """The setting of a seed; `model` says how many layers there are."""
    rng = random.Random(f"setting {seed}")
    layers = len(layers_of(model))

    def bits() -> str:
        number = rng.choice([1, 2**layers - 1, rng.randrange(1, 2**layers)])
        return format(number, f"0{layers}b")

    steps = rng.choice([1, 2, 2, 3, 3, 5])
    pattern = ",".join(bits() for _ in range(rng.choice([1, 1, 1, 2])))
    lr: Any = rng.choice([0.02, 0.05, 0.1, 0.3])
    if rng.random() < 0.15:
        lr = [[rng.choice([0.0, 0.02, 0.1]) for _ in range(layers)] for _ in range(steps)]
    generator = torch.Generator().manual_seed(seed)
    images, query = net.ways * rng.choice([1, 2, 2, 3]), rng.choice([1, 2, 5])
    layout = torch.contiguous_format
    if len(net.shape) == 3 and rng.random() < 0.1 and not net.facts & {"in place", "view", "question"}:
        layout = torch.channels_last

    def values(n: int) -> Tensor:
        return torch.randn(n, *net.shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)

    tasks = [
        Task(
            values(images),
            torch.randperm(images, generator=generator) % net.ways,
            values(query),
            torch.randint(net.ways, (query,), generator=generator),
        )
        for _ in range(rng.choice([1, 2, 2, 3]))
    ]
    loss: Any = rng.choice([F.cross_entropy, F.cross_entropy, F.cross_entropy, squared])
    norm, second = rng.choice(["follow", "follow", "never"]), rng.random() < 0.4
    return Setting(pattern, steps, lr, norm, second, loss, rng.random() < 0.5, layout, tasks)


def describe(seed: int, without: Collection[int] = ()) -> str:
    """The source of a seed's network and its setting."""
    net = network(seed, without)
    s = setting(net, seed, net.make())
    shapes = f"{len(s.tasks)} task(s), xs {list(s.tasks[0].xs.shape)}, xq {list(s.tasks[0].xq.shape)}"
    order = "second order" if s.second_order else "first order"
    loss = "cross_entropy" if s.loss is F.cross_entropy else "squared"
    return (
        f"{net.source}\n# {shapes}, {s.layout}\n# pattern={s.pattern!r}, steps={s.steps}, lr={s.lr}, norm={s.norm!r}, "
        f"{order}, loss={loss}, {'converted' if s.converted else 'as it is'}, "
        f"{'training' if net.training else 'evaluation'} mode"
    )


class Result(NamedTuple):
    """What is compared, task by task; gradients are those of the sum of all tasks' query losses."""

    parameters: list[Values] | None
    adapted_buffers: list[Values] | None  # before the query
    logits: list[Tensor]
    gradients: Values


def truth(net: Network, s: Setting, tasks: list[Task]) -> Result:
    """The plain loop."""
    model = net.make()
    layers = layers_of(model)
    layer_of = {n: i for i, layer in enumerate(layers) for n in layer.weights + layer.norm}
    meta = dict(model.named_parameters())
    for p in meta.values():
        p.requires_grad_()
    found: list[tuple[Values, Values, Tensor]] = []
    outer = torch.zeros((), dtype=torch.float64)
    for task in tasks:
        xs, xq = (
            task.xs.clone(memory_format=torch.contiguous_format),
            task.xq.clone(memory_format=torch.contiguous_format),
        )
        fast: Values = dict(meta)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        for step in range(s.steps):
            names = Pattern(s.pattern).parameters(model, s.norm, step)
            rates = {n: s.lr if isinstance(s.lr, float) else s.lr[step][layer_of[n]] for n in names}
            names = tuple(n for n in names if rates[n])
            # A step's gradient is by the present values, not by what they were to earlier steps.
            fast.update({n: fast[n].view_as(fast[n]) for n in names})
            loss = s.loss(functional_call(model, {**fast, **buffers}, (xs,)), task.ys)
            if not names:
                continue
            grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=s.second_order, allow_unused=True)
            if all(g is None for g in grads):
                raise RuntimeError("no updated parameter has a gradient")
            fast.update({n: fast[n] - rates[n] * g for n, g in zip(names, grads) if g is not None})
        adapted = {n: b.clone() for n, b in buffers.items()}
        logits = functional_call(model, {**fast, **buffers}, (xq,))
        outer = outer + s.loss(logits, task.yq)
        found.append(({n: t.detach() for n, t in fast.items()}, adapted, logits.detach()))
    grads = torch.autograd.grad(outer, list(meta.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(meta.items(), grads)}
    return Result([f[0] for f in found], [f[1] for f in found], [f[2] for f in found], gradients)


def _gradients(model: nn.Module, outer: Tensor) -> Values:
    outer.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def _learners(s: Setting, model: nn.Module, tasks: list[Task], learner_of: Callable[[Task], Any]) -> Result:
    parameters, buffers, logits = [], [], []
    outer = torch.zeros((), dtype=torch.float64)
    for task in tasks:
        learner = learner_of(task)
        parameters.append({n: t.detach().clone() for n, t in learner.parameters_dict().items()})
        own = copy.copy(learner).named_buffers() if hasattr(learner, "named_buffers") else ()
        buffers.append({n: b.clone() for n, b in own})
        logits.append(learner(task.xq))
        outer = outer + s.loss(logits[-1], task.yq)
    return Result(parameters, buffers, [z.detach() for z in logits], _gradients(model, outer))


def by_adapt(s: Setting, model: nn.Module, tasks: list[Task]) -> Result:
    given: dict[str, Any] = dict(
        pattern=s.pattern, steps=s.steps, lr=s.lr, norm=s.norm, second_order=s.second_order, loss=s.loss
    )
    return _learners(s, model, tasks, lambda task: adapt(model, task.xs, task.ys, **given))


def by_clones(s: Setting, model: nn.Module, tasks: list[Task]) -> Result:
    maml = LambdaMAML(model, s.lr, first_order=not s.second_order, pattern=s.pattern, norm=s.norm)

    def adapted(task: Task) -> Any:
        clone = maml.clone()
        for _ in range(s.steps):
            clone.adapt(s.loss(clone(task.xs), task.ys))
        return clone

    return _learners(s, model, tasks, adapted)


def at_once(s: Setting, model: nn.Module, tasks: list[Task]) -> Result:
    given: dict[str, Any] = dict(
        pattern=s.pattern, steps=s.steps, lr=s.lr, norm=s.norm, second_order=s.second_order, loss=s.loss
    )
    xs, ys, xq, yq = (torch.stack(part) for part in zip(*tasks))
    logits = adapt_tasks(model, xs, ys, xq, **given)
    outer = torch.stack([s.loss(z, y) for z, y in zip(logits, yq)]).sum()
    return Result(None, None, [z.detach() for z in logits], _gradients(model, outer))


WAYS: dict[str, Callable[[Setting, nn.Module, list[Task]], Result]] = {
    "adapt": by_adapt, "adapt_tasks": at_once, "LambdaMAML": by_clones,
}  # fmt: skip


def apart(got: Result, want: Result) -> dict[str, float]:
    """How far each part of a result is from the truth, relative to the greatest value of it, or to 1."""
    off: dict[str, float] = {}

    def note(what: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        if missing := set(b) - set(a):
            off[f"{what} {sorted(missing)} missing"] = float("inf")
        scale = max([1.0, *(float(t.abs().max()) for t in b.values() if t.numel())])
        for n in set(a) & set(b):
            far = float((a[n].double() - b[n].double()).abs().max()) / scale if b[n].numel() else 0.0
            off[what] = max(off.get(what, 0.0), far if far == far else float("inf"))

    for name in ("parameters", "adapted_buffers"):
        mine, true = getattr(got, name), getattr(want, name)
        for a, b in zip(mine or [], true or []):
            note(name, a, b)
    note("logits", dict(enumerate_(got.logits)), dict(enumerate_(want.logits)))
    note("gradients", got.gradients, want.gradients)
    return off


def enumerate_(tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(str(i), t) for i, t in enumerate(tensors)]


def _copies(tasks: list[Task]) -> list[Task]:
    return [Task(*(t.clone() for t in task)) for task in tasks]


def check(seed: int, without: Collection[int] = (), allowed: float = ALLOWED) -> Found:
    """Adapt the network of a seed in all ways, and say what came of it."""
    net = network(seed, without)
    try:
        s = setting(net, seed, net.make())
        want = truth(net, s, s.tasks)
    except (RuntimeError, ValueError, IndexError) as error:  # stock PyTorch refuses the network: nothing to compare
        return Found("skipped", f"stock: {type(error).__name__}: {_line(error)}")
    finite = all(t.isfinite().all() for t in (*want.logits, *want.gradients.values()))
    if not finite or max(float(t.abs().max()) for p in want.parameters or [] for t in p.values()) > 1e6:
        return Found("skipped", "stock: it diverges")
    told = []
    for way, run in {"convert": None, **WAYS}.items():
        try:
            problem = _forward(net, s, allowed) if run is None else _way(net, s, run, want, allowed)
        except Exception as error:
            told.append(f"{way} RAISES {type(error).__name__}: {_line(error)}")
            continue
        if problem:
            told.append(f"{way} WRONG {problem}")
    if not told:
        return Found("ok")
    verdict = "WRONG" if any(" WRONG " in t for t in told) else "RAISES"
    if verdict == "WRONG" and unstable(net, s, want, allowed):
        return Found("skipped", "unstable: a change of the inputs by 1e-13 changes the truth too")
    return Found(verdict, "; ".join(told))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def unstable(net: Network, s: Setting, want: Result, allowed: float) -> bool:
    moved = [task._replace(xs=task.xs * (1 + 1e-13), xq=task.xq * (1 + 1e-13)) for task in s.tasks]
    return any(far > allowed * UNSTABLE for far in apart(truth(net, s, moved), want).values())


def _way(
    net: Network, s: Setting, run: Callable[[Setting, nn.Module, list[Task]], Result], want: Result, allowed: float
) -> str:
    model = lk.convert(net.make()) if s.converted else net.make()
    for p in model.parameters():
        p.requires_grad_()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    drawn = torch.get_rng_state()
    off = apart(run(s, model, _copies(s.tasks)), want)
    if not torch.equal(drawn, torch.get_rng_state()):
        return "random numbers are drawn"
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    if changed:
        return f"the model's own {', '.join(changed)} changed"
    wrong = {name: far for name, far in off.items() if not far <= allowed}
    return ", ".join(f"{name} by {far:.1e}" for name, far in wrong.items())


def _forward(net: Network, s: Setting, allowed: float) -> str:
    """`convert(model)(x)` beside `model(x)`, at its first call and its second, with gradients and without."""
    stock, ours = net.make(), lk.convert(net.make())
    wrong = []
    for number, task in enumerate([s.tasks[0]] * 2):
        for graph in (False, True):
            with torch.set_grad_enabled(graph):
                want, got = stock(task.xs.contiguous().clone()), ours(task.xs.clone())
            far = float((want - got).abs().max()) / max(1.0, float(want.abs().max()))
            if not far <= allowed:
                wrong.append(f"call {number + 1}{' with' if graph else ' without'} gradients by {far:.1e}")
    for (name, a), b in zip(stock.state_dict().items(), ours.state_dict().values()):
        if float((a.double() - b.double()).abs().max()) > allowed * max(1.0, float(a.double().abs().max())):
            wrong.append(f"state {name}")
    return ", ".join(wrong)
