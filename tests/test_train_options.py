"""The trainer's options, each against the same run in plain PyTorch, and resumed to the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT
from small_runs import TRAIN, VAL, assert_same_bits, network, plain_training, run, small, state
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lambda_kernels import to_torch
from lambda_maml import checkpoint, data, rules
from lambda_maml.evaluate import evaluate
from lambda_maml.schedule import importances, meta_rate
from lambda_maml.train import BEST, Settings

pytestmark = pytest.mark.usefixtures("one_thread")

ITERATIONS = 4


def adamw(decay: float) -> Any:
    return lambda ps: torch.optim.AdamW(ps, lr=5e-3, weight_decay=decay)


def falling(parameters: Sequence[Tensor]) -> Any:
    """Adam whose rate torch's own schedule lets fall, after each step."""
    adam = torch.optim.Adam(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=3, eta_min=1e-3)

    class Falling:
        zero_grad = staticmethod(adam.zero_grad)

        def step(self) -> None:
            adam.step()
            if schedule.last_epoch < 3:
                schedule.step()

    return Falling()


# Each option: what the settings say, and what that is in a plain loop.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "first order": ({"second_order": False}, {"second_order": lambda _: False}),
    "second order after two iterations": ({"first_order_iterations": 2}, {"second_order": lambda i: i >= 2}),
    # MAML++'s annealing within 3 iterations, of 2 steps: 1/2 each, then the last one's share grows
    "multi-step loss": (
        {"multi_step_iterations": 3},
        {"weights": lambda i: [(1 / 2, 1 / 2), (1 / 3, 2 / 3), (1 / 6, 5 / 6), (0.0, 1.0)][i]},
    ),
    "multi-step loss in first order": (
        {"multi_step_iterations": 3, "second_order": False},
        {"weights": lambda i: [(1 / 2, 1 / 2), (1 / 3, 2 / 3), (1 / 6, 5 / 6), (0.0, 1.0)][i],
         "second_order": lambda _: False},
    ),
    "weight decay": ({"weight_decay": 0.3}, {"optimizer": adamw(0.3)}),
    "gradient descent": (
        {"optimizer": "sgd", "meta_lr": 0.1}, {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1)}
    ),
    "clipped norm": (
        {"clip_norm": 0.05, "optimizer": "sgd", "meta_lr": 0.1},
        {"before": lambda ps: nn.utils.clip_grad_norm_(ps, 0.05), "optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1)},
    ),
    "clipped numbers": (
        {"clip_value": 0.01, "optimizer": "sgd", "meta_lr": 0.1},
        {"before": lambda ps: nn.utils.clip_grad_value_(ps, 0.01), "optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1)},
    ),
    "cosine": ({"cosine": 3, "meta_lr_end": 1e-3}, {"optimizer": falling}),
}  # fmt: skip


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name], **GRADIENT) for name in b)


@pytest.fixture(scope="module")
def without() -> dict[str, Tensor]:
    """The plain run without any option."""
    return plain_training(network().double(), ITERATIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_that_of_a_plain_loop(option: str, tmp_path: Path, without: dict[str, Tensor]) -> None:
    changes, plain = OPTIONS[option]
    settings, model = small(**changes), network().double()
    want = plain_training(model, ITERATIONS, settings, **plain)
    run(tmp_path, ITERATIONS, settings, model)
    found = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(found, want, **GRADIENT)
    assert not close(found, without)


RESUMED: dict[str, dict[str, Any]] = {
    **{name: changes for name, (changes, _) in OPTIONS.items()},
    "average": {"average": 0.9},
    "average of learned rates": {"average": 0.9, "learn_lr": "layer-step", "weight_decay": 0.1},
    "reptile": {"outer": "reptile"},
    "patience": {"patience": 20},
    "zero head": {"zero_head": True, "average": 0.9},
}


@pytest.mark.parametrize("option", RESUMED)
def test_an_option_resumes_to_the_same_bits(option: str, tmp_path: Path) -> None:
    settings = small(**RESUMED[option], val_every=1)
    run(tmp_path / "whole", ITERATIONS, settings)
    for end in (1, ITERATIONS):
        run(tmp_path / "parts", end, settings, network(seed=0 if end == 1 else 9), resume=end > 1)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    best = [checkpoint.read_tensors(tmp_path / part / BEST)[0] for part in ("whole", "parts")]
    assert all(torch.equal(best[0][key], best[1][key]) for key in best[0])
    with pytest.raises(ValueError, match="the run to resume has settings "):
        run(tmp_path / "parts", 6, small(val_every=1), resume=True)


def test_weight_decay_leaves_learned_rates_alone(tmp_path: Path) -> None:
    model = network().double()
    rates = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def groups(ps: list[Tensor]) -> torch.optim.Optimizer:
        decayed, kept = {"params": ps[:-1], "weight_decay": 0.3}, {"params": ps[-1:], "weight_decay": 0.0}
        return torch.optim.AdamW([decayed, kept], lr=5e-3)

    want = plain_training(model, 3, rates=[rates], rate=lambda *_: rates, optimizer=groups)
    run(tmp_path, 3, small(weight_decay=0.3, learn_lr="one"), model)
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, want, **GRADIENT)
    torch.testing.assert_close(state(tmp_path)[0]["rule:rate0"], rates.detach(), **GRADIENT)


def test_a_zero_head_stays_zero_and_the_rest_learns_as_in_a_plain_loop(
    tmp_path: Path, without: dict[str, Tensor]
) -> None:
    settings, model, plain = small(zero_head=True, weight_decay=0.3), network().double(), network().double()
    nn.init.zeros_(plain.get_parameter("head.weight"))
    nn.init.zeros_(plain.get_parameter("head.bias"))
    want = plain_training(plain, ITERATIONS, settings, optimizer=lambda ps: adamw(0.3)(ps[:-2]))
    run(tmp_path, ITERATIONS, settings, model)
    found = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(found, want, **GRADIENT)
    assert not close(found, without)
    best = checkpoint.read_tensors(tmp_path / BEST)[0]
    assert [n for n in ("head.weight", "head.bias") if found[n].any() or best[n].any()] == []


@pytest.mark.parametrize("outer", ["reptile", "maml"])
def test_a_zero_head_begins_where_a_checkpoint_had_another(outer: str, tmp_path: Path) -> None:
    run(tmp_path / "first", 1)
    model = network(seed=3)
    run(tmp_path / outer, 2, small(zero_head=True, outer=outer), model, start=tmp_path / "first" / BEST)
    first = checkpoint.read_tensors(tmp_path / "first" / BEST)[0]
    assert first["head.weight"].any() and not model.get_parameter("head.weight").any()
    assert not torch.equal(first["block1.conv.weight"], model.get_parameter("block1.conv.weight"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pattern": "BOIL"}, "pattern 11110 leaves the last layer at zero"),
        ({"pattern": "11110,00010"}, "pattern 11110,00010 leaves the last layer at zero"),
        ({"patterns": "MAML; 2: 00110", "pattern": "MAML"}, "pattern 00110 leaves the last layer at zero"),
        ({"pattern": "11110,00001", "test_steps": 1}, "pattern 11110,00001 leaves the last layer at zero"),
        ({"patterns": "sampled", "pattern": "BOIL"}, "pattern 11110 leaves the last layer at zero"),
    ],
)
def test_a_zero_head_is_not_for_patterns_that_leave_it(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        run(tmp_path, 1, small(zero_head=True, **changes))
    run(tmp_path / "fits", 1, small(zero_head=True, pattern="11110,00001"))
    run(tmp_path / "drawn", 3, small(zero_head=True, patterns="sampled"))


def test_importances_are_those_of_the_authors_code() -> None:
    settings = Settings(steps=5, multi_step_iterations=10)
    for iteration in range(10):
        each = max(1 / 5 - iteration * (1 / 5 / 10), 0.03 / 5)
        last = min(1 / 5 + iteration * 4 * (1 / 5 / 10), 1 - 4 * 0.03 / 5)
        assert importances(settings, iteration) == pytest.approx([each] * 4 + [last])
    assert importances(settings, 10) is None and importances(Settings(), 0) is None


def test_the_cosine_ends_where_it_is_told() -> None:
    settings = Settings(meta_lr=0.1, cosine=100, meta_lr_end=0.02)
    rates = [meta_rate(settings, k) for k in (0, 25, 50, 100, 1000)]
    assert rates == pytest.approx([0.1, 0.06 + 0.04 * math.sqrt(0.5), 0.06, 0.02, 0.02])
    assert meta_rate(Settings(meta_lr=0.1), 1000) == 0.1


def test_reptile_goes_towards_the_mean_of_adapted_weights(tmp_path: Path) -> None:
    settings = small(outer="reptile", optimizer="sgd", meta_lr=0.5, pattern="01111")
    model = network().double()
    twin = to_torch(model)
    slow = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for i in range(2):
        ends = []
        for xs, ys, xq, yq in data.sample_tasks(TRAIN, 2, ways=3, shots=1, query=2, seed=0, first=2 * i):
            fast = {n: p.clone().requires_grad_() for n, p in slow.items()}
            for _ in range(settings.steps):
                x, y = torch.cat([xs, xq]).double(), torch.cat([ys, yq])
                loss = F.cross_entropy(torch.func.functional_call(twin, fast, (x,)), y)
                free = [n for n in fast if not n.startswith("block1.")]
                for n, g in zip(free, torch.autograd.grad(loss, [fast[n] for n in free])):
                    fast[n] = (fast[n] - settings.lr * g).detach().requires_grad_()
            ends.append(fast)
        slow = {n: (p + 0.5 * (sum(end[n] for end in ends) / 2 - p)).detach() for n, p in slow.items()}
    result = run(tmp_path, 2, settings, model)
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, slow, **GRADIENT)
    assert result.history[-1].train_loss is not None and result.history[-1].train_loss < math.log(3)


def test_validation_and_the_best_checkpoint_have_the_average(tmp_path: Path) -> None:
    model, settings = network().double(), small(average=0.8, val_every=4)
    twin = to_torch(model)
    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    def after(parameters: list[Tensor], iteration: int) -> None:
        with torch.no_grad():
            for p, q in zip(twin.parameters(), parameters):
                p.copy_(q)
        averaged.update_parameters(twin)

    want = plain_training(model, 4, settings, after=after)
    result = run(tmp_path, 4, settings, model)
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, want, **GRADIENT)
    best, _ = checkpoint.load(tmp_path / BEST, network().double())
    found = {n: p.detach() for n, p in best.named_parameters()}
    torch.testing.assert_close(found, {n: p.detach() for n, p in averaged.module.named_parameters()}, **GRADIENT)
    assert not close(found, want) and result.best is not None
    tasks = data.sample_tasks(VAL, 6, ways=3, shots=1, query=2, seed=0)
    assert evaluate(best, tasks, pattern="11111", steps=2, lr=0.1).mean == result.best.accuracy


def test_patience_ends_a_run_that_does_not_get_better(tmp_path: Path) -> None:
    settings = small(optimizer="sgd", meta_lr=1e-12, val_every=2, patience=3)  # every validation gives the same
    result = run(tmp_path, 100, settings)
    assert (result.stopped, result.iteration, len(result.history)) == ("patience", 8, 4)
    assert result.best is not None and result.best.iteration == 2
    again = run(tmp_path, 100, settings, resume=True)
    assert (again.stopped, again.iteration) == ("patience", 8)


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(tmp_path: Path) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).register_hook(lambda g: g * math.nan)
    with pytest.raises(
        FloatingPointError, match="gradient of block1.conv.weight is nan at iteration 1 .inner lr 0.1, meta"
    ):
        run(tmp_path, 3, model=model)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outer": "reptile", "learn_lr": "layer"}, "no gradient through the inner steps: leave learn_lr out"),
        ({"outer": "reptile", "multi_step_iterations": 5}, "leave multi_step_iterations out"),
        ({"outer": "protonet"}, "outer is 'protonet', expected 'maml' or 'reptile'"),
        ({"second_order": False, "first_order_iterations": 5}, "no iteration is of second order"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "choose one bound"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0, expected above 0"),
        ({"meta_lr_end": 1e-5}, "say within how many iterations it falls"),
        ({"meta_lr_end": 1.0, "cosine": 5}, "expected at most meta_lr"),
        ({"average": 1.0}, "average is 1.0, expected below 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected at least 0"),
        ({"patience": 0}, "patience is 0, expected at least 1"),
        ({"learn_lr": "block"}, "learn_lr is 'block', expected 'one', 'layer', 'step', 'layer-step' or 'weight'"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**changes)


def test_a_rule_and_learned_rates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give rule=sgd.lr=0.1. or learn_lr='one', not both"):
        run(tmp_path, 1, small(learn_lr="one"), rule=rules.sgd(0.1))
