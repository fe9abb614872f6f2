"""lambda_maml.data.sample_tasks: what a task is, and that it depends on its seed and number alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lambda_maml import data


def marked(counts, name="marked"):
    """A set whose image i of class k has the pixels (k, i)."""
    rows = [[[[k], [i]]] for k, n in enumerate(counts) for i in range(n)]
    images = np.array(rows, dtype=np.uint8).reshape(-1, 1, 2, 1)
    return data.ImageSet(name, "train", images, tuple(counts), tuple(f"c{k}" for k in range(len(counts))))


def marks(x):
    return [tuple(v) for v in torch.round(x.flatten(1) * 255).long().tolist()]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_tasks_are_what_the_definition_says(draws):
    ways, shots, query = draws.draw(st.integers(1, 6)), draws.draw(st.integers(1, 5)), draws.draw(st.integers(0, 6))
    counts = draws.draw(st.lists(st.integers(shots + query, shots + query + 9), min_size=ways, max_size=ways + 8))
    seed, first = draws.draw(st.integers(0, 2**70)), draws.draw(st.integers(0, 10**9))
    dataset = marked(counts)
    tasks = data.sample_tasks(dataset, 3, ways, shots, query, seed, first)
    for xs, ys, xq, yq in tasks:
        assert xs.dtype == xq.dtype == torch.float32 and ys.dtype == yq.dtype == torch.int64
        assert xs.shape == (ways * shots, 1, 1, 2) and xq.shape == (ways * query, 1, 1, 2)
        assert xs.is_contiguous() and xq.is_contiguous()
        assert ys.tolist() == [k for k in range(ways) for _ in range(shots)]
        assert yq.tolist() == [k for k in range(ways) for _ in range(query)]
        support, rest = marks(xs), marks(xq)
        assert len(set(support + rest)) == ways * (shots + query)
        classes = [support[k * shots][0] for k in range(ways)]
        assert len(set(classes)) == ways
        assert [c for c, _ in support] == [classes[k] for k in ys] and [c for c, _ in rest] == [classes[k] for k in yq]
    later = data.sample_tasks(dataset, 1, ways, shots, query, seed, first + 2)[0]
    assert all(torch.equal(a, b) for a, b in zip(later, tasks[2]))
    prefix = data.sample_tasks(dataset, 2, ways, shots, query, seed, first)
    assert all(torch.equal(a, b) for p, t in zip(prefix, tasks) for a, b in zip(p, t))


def test_draws_are_fixed_and_differ_by_seed_and_number():
    dataset = marked([9] * 30)

    def support(**arguments):
        return [marks(t.xs) for t in data.sample_tasks(dataset, 3, query=2, **arguments)]

    assert support(seed=5) == support(seed=5) != support(seed=6)
    assert len({str(s) for s in support(seed=5)}) == 3
    assert support(seed=5)[0] == PINNED


PINNED = [(25, 7), (9, 0), (26, 7), (12, 1), (28, 8)]  # (class, image) of the support set of task 0, seed 5


def test_every_class_and_image_is_drawn_about_equally_often():
    tasks = data.sample_tasks(marked([4] * 10), 2000, ways=5, shots=1, query=1, seed=1)
    drawn = np.array([m for t in tasks for m in marks(t.xs)])
    table = np.zeros((10, 4))
    np.add.at(table, (drawn[:, 0], drawn[:, 1]), 1)
    assert abs(table / 250 - 1).max() < 0.3  # 250 expected, standard deviation 15
    first_labels = np.bincount([marks(t.xs)[0][0] for t in tasks], minlength=10)
    assert abs(first_labels / 200 - 1).max() < 0.35  # labels do not follow the class order


def test_tasks_do_not_share_memory():
    a, b = data.sample_tasks(marked([9] * 5), 2, query=3)
    a.ys.fill_(7)
    a.xs.fill_(7)
    assert b.ys.max() < 5 and b.xs.max() < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 8}, r"8 ways, but marked train has 7 classes"),
        ({"shots": 5, "query": 15}, r"5 shots and 15 query .* 20 images per class,.* class c6 of marked train has 19"),
        ({"ways": 0}, r"ways is 0, expected at least 1"),
        ({"shots": 0}, r"shots is 0"),
        ({"query": -1}, r"query is -1"),
        ({"n": -1}, r"n is -1"),
        ({"seed": -3}, r"seed is -3"),
        ({"first": -3}, r"first is -3"),
    ],
)
def test_sampler_refuses_with_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.sample_tasks(marked([20] * 6 + [19]), **{"n": 1, **arguments})
