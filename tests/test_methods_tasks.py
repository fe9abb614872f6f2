"""Which tasks are drawn, what they weigh, and what is remembered of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, all_close
from small_runs import TRAIN
from torch import Tensor, nn

from lambda_maml import Pattern, adapt, data, rules
from lambda_maml.methods import (
    covering,
    descend,
    direct,
    endless,
    pool,
    prioritised,
    query_loss,
    remembering,
    spsa,
    spsa_track,
    uncertainty,
    uniform,
)
from lambda_maml.places import Problem, Turn
from lambda_maml.solved import learned_by, posed

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
LR, BETA = 0.1, 0.3


def likely(counts: Any, expected: Any) -> bool:
    """Whether counts come about by chance (chi-square, p above 0.001)."""
    counts, expected = torch.as_tensor(counts).double(), torch.as_tensor(expected).double()
    square = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), square / 2)) > 1e-3


def twin(part: nn.Module, fresh: nn.Module) -> nn.Module:
    """A new part with the state of another one, as a resumed run has it."""
    fresh.load_state_dict(part.state_dict())
    return fresh


@pytest.mark.parametrize("kind", [spsa, spsa_track])
def test_the_weights_squares_go_to_the_losses(kind: type[spsa]) -> None:
    weights = kind(4)
    for n in range(500):
        weights.update(LOSSES, n)
    torch.testing.assert_close(weights.weights.abs(), LOSSES.sqrt(), rtol=3e-3, atol=0.0)  # as was computed beforehand


def test_the_published_gains_pull_all_weights_to_zero_alike() -> None:
    weights = spsa.published(4)
    for n in range(600):
        weights.update(LOSSES, n)
    own = weights.weights.abs()
    assert float(own.max()) < 0.21 and float(own.max() / own.min()) < 1.05  # from 0.25; of the roots it would be 2


@pytest.mark.parametrize("kind", [spsa, spsa_track, uncertainty, uniform])
def test_one_task_of_weight_one_is_plain_maml(kind: Any) -> None:
    weights = kind() if kind is uniform else kind(1)
    losses = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    loss = weights.combine(losses, 0)
    assert torch.equal(loss, losses[0]) and torch.equal(torch.autograd.grad(loss, losses)[0], torch.ones(1).double())


def test_weights_by_gradient_have_the_slope_of_j() -> None:
    weights = uncertainty(4).double()
    with torch.no_grad():
        weights.weights.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    w = weights.weights.detach()
    (slope,) = torch.autograd.grad(weights.combine(LOSSES, 0), weights.weights)
    torch.testing.assert_close(slope, (-2 * LOSSES / w**3 + 2 / w) / 4)


@pytest.mark.parametrize("kind", [spsa, spsa_track])
def test_a_resumed_run_has_the_same_weights(kind: type[spsa]) -> None:
    steady, broken = kind(4, renormalise=7, seed=5), kind(4, renormalise=7, seed=5)
    for n in range(20):
        losses = LOSSES * (1 + n % 3)
        steady.update(losses, n)
        torch.rand(1)  # the global generator has no part in it
        broken.update(losses, n)
        if n == 9:
            broken = twin(broken, kind(4, renormalise=7, seed=5))  # type: ignore[assignment]
    assert torch.equal(steady.weights, broken.weights) and not torch.equal(steady.weights, torch.ones(4).double())
    with pytest.raises(ValueError, match="task weights are for 4 tasks, the meta-batch has 3"):
        steady.combine(LOSSES[:3], 0)
    with pytest.raises(ValueError, match="gains and start above 0"):
        kind(4, gains=(0.0, 1.0))


@pytest.mark.parametrize(
    ("classes", "ways", "size"), [(5, 2, 14), (10, 2, 31), (20, 5, 24), (64, 5, 85), (100, 5, 135)]
)
def test_a_cover_has_as_many_tasks_as_the_formula_says(classes: int, ways: int, size: int) -> None:
    assert covering(classes, ways).size == size
    assert covering(classes, classes).size == 1


def test_a_cover_misses_a_class_as_often_as_it_says_and_draws_all_alike() -> None:
    ways, miss, seeds = 5, 0.2, 300
    count = covering(TRAIN.num_classes, ways, miss).size
    assert count is not None
    counts, missed = torch.zeros(TRAIN.num_classes), 0
    for seed in range(seeds):
        drawn = torch.tensor([classes_of(seed, k, ways) for k in range(count)]).flatten()
        counts += torch.bincount(drawn, minlength=TRAIN.num_classes)
        missed += 0 not in drawn
    expected = (1 - ways / TRAIN.num_classes) ** count
    assert abs(missed / seeds - expected) < 4 * math.sqrt(expected * (1 - expected) / seeds)
    assert abs(expected - miss) < 0.05  # as near as whole tasks come
    assert likely(counts, counts.double().mean().expand_as(counts))


def classes_of(seed: int, k: int, ways: int) -> list[int]:
    words = data.episodes._draw(TRAIN, ways, 2, seed, k)
    return [int(torch.searchsorted(torch.as_tensor(TRAIN.starts), int(row[0]), right=True)) - 1 for row in words]


def test_an_endless_source_and_a_cover_in_turn() -> None:
    assert [endless().draw(i, 3) for i in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert covering(5, 2).draw(3, 5) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="1 to 5 ways"):
        covering(5, 6)


def test_a_pool_draws_its_tasks_alike_and_none_twice() -> None:
    drawn = [pool(7, seed=3).draw(i, 4) for i in range(500)]
    assert all(len(set(numbers)) == 4 for numbers in drawn) and drawn[:3] != drawn[3:6]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=7)
    assert likely(counts, counts.double().mean().expand_as(counts))
    with pytest.raises(ValueError, match="a meta-batch of 4 tasks is more than the pool has, 3"):
        pool(3).draw(0, 4)


def test_a_buffer_is_drawn_from_by_its_scores() -> None:
    source = prioritised(3, share=0.5, temperature=2.0)
    source.report([10, 11, 12, 13], torch.tensor([1.0, 3.0, 0.5, 2.0]), 0)
    assert sorted(source.numbers.tolist()) == [10, 11, 13]  # the lowest has left
    source.report([10], torch.tensor([0.0]), 0)  # what is reported again has its new score
    want = {10: 1.0, 11: math.exp(1.5), 13: math.exp(1.0)}
    counts = dict.fromkeys(want, 0)
    for iteration in range(600):
        fresh, old = source.draw(iteration, 2)
        assert fresh == iteration
        counts[old] += 1
    expected = [600 * want[k] / sum(want.values()) for k in counts]
    assert likely(list(counts.values()), expected)
    even = prioritised(3, temperature=2.0)
    even.report([1, 2, 3], torch.ones(3), 0)
    torch.testing.assert_close(even.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="prioritised: size of at least 1"):
        prioritised(0)


def test_a_buffer_of_hard_tasks_holds_more_of_them_than_chance() -> None:
    share = []
    for seed in range(8):
        source = prioritised(8, share=0.5, seed=seed)
        for iteration in range(30):
            numbers = source.draw(iteration, 4)  # every fourth task is a hard one
            source.report(numbers, torch.tensor([2.0 if n % 4 == 0 else 1.0 for n in numbers]), iteration)
        share.append(float((source.numbers % 4 == 0).double().mean()))
    assert min(share) > 0.5


def test_a_resumed_buffer_draws_the_same() -> None:
    steady, broken = prioritised(4, seed=2), prioritised(4, seed=2)
    for iteration in range(12):
        torch.rand(1)
        numbers = steady.draw(iteration, 3)
        assert broken.draw(iteration, 3) == numbers
        for source in (steady, broken):
            source.report(numbers, torch.tensor([float(n % 5) for n in numbers]), iteration)
        if iteration == 5:
            broken = twin(broken, prioritised(4, seed=2))  # type: ignore[assignment]


def memory(pattern: str, **given: Any) -> remembering:
    return remembering(descend(rules.sgd(LR), 1), CONV4.network, pattern, **{"tasks": 3, "beta": BETA, **given})


def visit(solver: Any, pattern: str, iteration: int = 0, key: int | None = 1, second_order: bool = True) -> Any:
    xs, ys, _, _ = CONV4.task(seed=1 if key is None else 1 + key)
    return adapt(
        CONV4.network, xs, ys, pattern=pattern, solver=solver, second_order=second_order,
        turn=Turn(iteration=iteration, key=key),
    )  # fmt: skip


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("pattern", ["11111", "00011", "11111,00001"])
def test_a_memory_that_keeps_nothing_is_maml(pattern: str, second_order: bool) -> None:
    _, _, xq, yq = CONV4.task()
    solver, plain = memory(pattern, beta=1.0), descend(rules.sgd(LR), 1, estimator=backward_pass)
    leaves = list(CONV4.network.parameters())
    for _ in range(2):  # also with something in the memory
        got, want = (visit(s, pattern, second_order=second_order) for s in (solver, plain))
        grads = [torch.autograd.grad(F.cross_entropy(learner(xq), yq), leaves) for learner in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads))
        assert all(torch.equal(p, want.parameters_dict()[n]) for n, p in got.parameters_dict().items())
    whole = memory(pattern, beta=1.0, version=2, tasks=2, batch=2)
    all_close(visit(whole, pattern, second_order=second_order).parameters_dict(), want.parameters_dict(), "version 2")


def backward_pass(problem: Problem, params: Any, step: int) -> Any:
    loss = problem.loss(params)
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=problem.second_order)
    return loss, dict(zip(params, grads))


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
def test_the_meta_gradient_carries_beta(second_order: bool) -> None:
    pattern, direction = "00011", torch.randn(98, dtype=torch.float64)
    found, weight = [], CONV4.network.get_parameter("block4.conv.weight")
    for beta in (0.3, 0.6):
        learner = visit(memory(pattern, beta=beta), pattern, second_order=second_order)
        moved = torch.cat([learner.parameters_dict()[n].flatten() for n in Pattern(pattern).parameters(CONV4.network)])
        found.append(torch.autograd.grad((moved * direction).sum(), weight)[0])
    torch.testing.assert_close(2 * found[0], found[1])
    assert float(found[0].norm()) > 0


def test_a_memory_is_an_average_of_what_was_found() -> None:
    solver, pattern = memory("00011"), "00011"
    end = visit(descend(rules.sgd(LR), 1), pattern).parameters_dict()
    names = Pattern(pattern).parameters(CONV4.network)
    own = {n: CONV4.network.get_parameter(n).detach().clone() for n in names}
    put({n: p + 0.1 for n, p in own.items()})
    visit(solver, pattern, second_order=False)  # from elsewhere
    put(own)
    start = {n: solver._memory("own", n)[1].clone() for n in names}
    for visits in range(1, 12):
        visit(solver, pattern)
        for n in names:
            want = end[n] + (1 - BETA) ** visits * (start[n] - end[n])
            torch.testing.assert_close(solver._memory("own", n)[1], want.detach())
    new = visit(solver, pattern, key=None).parameters_dict()
    plain = visit(descend(rules.sgd(LR), 1), pattern, key=None).parameters_dict()
    all_close(new, plain, "a task that is in no pool")


def test_version_two_moves_all_sets_at_the_cost_of_one() -> None:
    pattern, tasks, batch = "00001", 3, 2
    solver = memory(pattern, version=2, tasks=tasks, batch=batch)
    names = Pattern(pattern).parameters(CONV4.network)
    start = {n: CONV4.network.get_parameter(n).detach().clone() for n in names}
    mean, sets = dict(start), dict[int, dict[str, Tensor]]()
    for iteration, keys in enumerate([(0, 1), (1, 2), (0, 2), (0, 1), (1, 2), (0, 1), (0, 1), (2, 0)]):
        w = {n: p + 0.05 * iteration for n, p in start.items()}
        put(w)
        found = {k: visit(descend(rules.sgd(LR), 1), pattern, key=k).parameters_dict() for k in keys}
        for k in keys:
            sets.setdefault(k, {n: mean[n] + found[k][n] - w[n] for n in names})
        for k, own in sets.items():
            for n in names:
                own[n] = ((1 - BETA) * own[n] + BETA * w[n]).detach()
                if k in keys:
                    own[n] += (BETA * tasks / batch * (found[k][n] - w[n])).detach()
        mean = {n: (1 - BETA) * mean[n] + BETA * w[n] for n in names}
        for k in keys:
            got = visit(solver, pattern, iteration, k).parameters_dict()
            # sums in another order
            torch.testing.assert_close({n: got[n].detach() for n in names}, sets[k], rtol=1e-10, atol=1e-12)
    put(start)


def put(values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for n, value in values.items():
            CONV4.network.get_parameter(n).copy_(value)


@pytest.mark.parametrize("version", [1, 2])
def test_a_resumed_memory_goes_on_as_it_was(version: int) -> None:
    given: dict[str, Any] = {"version": version, "batch": 1 if version == 2 else None}
    solver = memory("00011", **given)
    for iteration in range(2):
        visit(solver, "00011", iteration)
    again = twin(solver, memory("00011", **given))
    got, want = (visit(s, "00011", 4).parameters_dict() for s in (again, solver))
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_what_a_memory_does_not_hold_is_said() -> None:
    with pytest.raises(ValueError, match="the pattern updates .*: make it for 00011"):
        visit(memory("00001"), "00011")
    with pytest.raises(ValueError, match=r"the task has the key 5, the memory 3 tasks: draw from pool\(3\)"):
        visit(memory("00001"), "00001", key=5)
    for wrong in ({"beta": 0.0}, {"version": 3}, {"version": 2}, {"batch": 2}, {"version": 2, "batch": 4}):
        with pytest.raises(ValueError, match="remembering: "):
            memory("00001", **wrong)


def test_outer_losses_add_and_the_direct_one_is_that_of_the_network() -> None:
    xs, ys, xq, yq = CONV4.task()
    _, problem = posed(
        CONV4.network, xs, ys, "00011", "follow", False, F.cross_entropy, descend(rules.sgd(LR), 2), Turn()
    )
    learned = learned_by(descend(rules.sgd(LR), 2), problem)
    want = F.cross_entropy(CONV4.network(torch.cat([xs, xq])), torch.cat([ys, yq]))
    torch.testing.assert_close(direct()(problem, learned, xq, yq), want)
    adapted = adapt(CONV4.network, xs, ys, pattern="00011", steps=2, lr=LR)
    both = query_loss() + direct()
    torch.testing.assert_close(both(problem, learned, xq, yq), F.cross_entropy(adapted(xq), yq) + want)
