"""Every registered part under three patterns: its result is that of the general path, or it says why it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT
from small_runs import TRAIN, network, small
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import Pattern, adapt, data, rules
from lambda_maml.methods import METHODS, backward, descend, query_loss, siren, top_gradient, variational
from lambda_maml.parts import Parts

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning"),  # torch's forward mode
]
PATTERNS = ("11111", "00011", "11111,00001")
STEPS, RATE = 2, 0.1
Made = dict[str, Any]


def names(model: nn.Module, pattern: str) -> list[str]:
    moved = [n for step in range(len(Pattern(pattern).stages)) for n in Pattern(pattern).parameters(model, step=step)]
    return list(dict.fromkeys(moved))


def by_estimator(estimator: Any) -> Made:
    return {"solver": descend(rules.sgd(RATE), STEPS, estimator)}


def memory(model: nn.Module, pattern: str) -> Made:
    solver = METHODS["remembering"].make(descend(rules.sgd(RATE), STEPS), model, pattern, tasks=3, beta=0.5)
    return {"solver": solver, "source": METHODS["pool"].make(3)}


def sparse(model: nn.Module, pattern: str) -> Made:
    rule = METHODS["lslr"].make(names(model, pattern), STEPS, RATE)
    xs = torch.zeros(3, 1, 16, 16, dtype=torch.float64)
    return {"rule": rule, "objective": query_loss() + METHODS["sparse_rates"].make(rule, model, xs, weight=0.1)}


def alone(place: str, name: str, *args: Any) -> Callable[[nn.Module, str], Made]:
    return lambda model, pattern: {place: METHODS[name].make(*args)}


MAKE: dict[str, Callable[[nn.Module, str], Made]] = {
    "alfa": lambda m, p: {"rule": METHODS["alfa"].make(names(m, p), STEPS, RATE, 0.01).double()},
    "lslr": lambda m, p: {"rule": METHODS["lslr"].make(names(m, p), STEPS, RATE).double()},
    "sparse_rates": lambda m, p: sparse(m, p),
    "backward": lambda m, p: by_estimator(backward()),
    "forward_gradient": lambda m, p: by_estimator(METHODS["forward_gradient"].make(2)),
    "top_gradient": lambda m, p: by_estimator(backward(top_gradient(0.5))),
    "rescaled": lambda m, p: by_estimator(METHODS["rescaled"].make(top_gradient(0.5))),
    "local_losses": lambda m, p: by_estimator(
        METHODS["local_losses"].make({f"block{i}.conv": 4 for i in range(1, 5)}, 3, groups=2).double()
    ),
    "descend": lambda m, p: {"solver": descend(rules.sgd(RATE), STEPS)},
    "ridge_head": alone("solver", "ridge_head", 1.0, True),
    "ntk": alone("solver", "ntk", 10.0),
    "remembering": memory,
    "fisher": lambda m, p: {"chooser": METHODS["fisher"].make(0.5)},
    "query_loss": alone("objective", "query_loss"),
    "direct": alone("objective", "direct"),
    "bootstrap": lambda m, p: {"objective": query_loss() + METHODS["bootstrap"].make(2, 0.05, 1.0)},
    "kl": lambda m, p: {"objective": query_loss() + METHODS["kl"].make(1e-6)},
    "steepest": alone("objective", "steepest", 0.05),
    "uniform": alone("weights", "uniform"),
    "uncertainty": alone("weights", "uncertainty", 2),
    "spsa": alone("weights", "spsa", 2),
    "spsa_track": alone("weights", "spsa_track", 2),
    "endless": alone("source", "endless"),
    "pool": alone("source", "pool", 3),
    "covering": alone("source", "covering", 12, 3),
    "prioritised": alone("source", "prioritised", 3),
}
FIELDS = ("top_gradient", "rescaled")
"""Methods for networks without batch norms."""
REFUSES = {
    ("ridge_head", "11111"): "the closed form is of the last layer alone",
    ("ridge_head", "00011"): "the closed form is of the last layer alone",
    ("ridge_head", "11111,00001"): "the closed form is of the last layer alone",
    ("ntk", "11111,00001"): "is a schedule, a closed form has no steps",
}


def opaque(a: Tensor, b: Tensor) -> Tensor:
    """Cross-entropy that no chain knows."""
    return F.cross_entropy(a, b)


def outcome(name: str, pattern: str, general: bool) -> list[Tensor]:
    """Gradients of the outer loss over two tasks by all parameters, and one task's adapted parameters."""
    torch.manual_seed(0)
    model = network().double()
    tasks = [data.Task(*(t.double() if t.is_floating_point() else t for t in task)) for task in TASKS]
    if name in FIELDS:
        model = siren(2, 3, width=6, layers=5).double()
        tasks = [data.Task(t.xs[:, 0, 0, :2], t.ys, t.xq[:, 0, 0, :2], t.yq) for t in tasks]
    if name == "kl":
        model = variational(model).double().eval()
    made = MAKE[name](model, pattern)
    loss: Any = opaque if general else F.cross_entropy
    settings = small(pattern=pattern, steps=STEPS, lr=RATE, second_order=name != "forward_gradient")
    rule, chooser, solver = made.pop("rule", None), made.pop("chooser", None), made.get("solver")
    given: Made = {"rule": rule} if rule is not None else {"solver": solver} if solver is not None else {"lr": RATE}
    xs, ys, _, _ = tasks[0]
    with lk.use_backend("reference") if general else lk.use_backend("auto"):
        learner = adapt(model, xs, ys, pattern=chooser or pattern, steps=STEPS, loss=loss, **given)
        own = [p.detach() for p in learner.parameters_dict().values()]
        if chooser is not None:
            return own
        parts = Parts(**made).of_run(rule, settings, 1)
        parts.gradient(model, tasks, [0, 1], settings, 0, loss=loss)
        parts.after_step(0)
    both = [*model.parameters(), *parts.parameters()]
    return [*own, *(torch.zeros_like(p) if p.grad is None else p.grad for p in both), *parts.buffers()]


TASKS = data.sample_tasks(TRAIN, 2, ways=3, shots=2, query=2)


def test_every_method_is_tried() -> None:
    assert MAKE.keys() == METHODS.keys()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MAKE)
def test_the_result_is_that_of_the_general_path(name: str, pattern: str) -> None:
    if words := REFUSES.get((name, pattern)):
        with pytest.raises(ValueError, match=words):
            outcome(name, pattern, general=False)
        pattern = "00001"
    if name == "sparse_rates":
        pattern = pattern.replace("00011", "11111")  # its rule has rates of all layers
    got, want = (outcome(name, pattern, general) for general in (False, True))
    assert len(got) == len(want) and any(bool(t.abs().sum() > 0) for t in got if t.is_floating_point())
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, **GRADIENT)
