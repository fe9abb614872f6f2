"""Patterns: their text, their order, the layers that they speak of, what they cost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import loops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import NETWORKS, updated_names
from torch import nn

import lambda_kernels as lk
from lambda_maml import Pattern, models
from lambda_maml.cost import layer_costs
from lambda_maml.models import layer_names


def schedules() -> st.SearchStrategy[str]:
    """Texts of one to four patterns of the same number of layers."""
    bits = st.integers(1, 6).flatmap(
        lambda n: st.lists(st.integers(1, 2**n - 1).map(lambda i: f"{i:0{n}b}"), min_size=1, max_size=4)
    )
    return bits.map(",".join)


@given(schedules())
def test_a_pattern_says_for_every_step_what_its_text_says(text: str) -> None:
    pattern, stages = Pattern(text), text.split(",")
    assert [pattern.at(i) for i in range(6)] == [stages[min(i, len(stages) - 1)] for i in range(6)]
    assert Pattern(str(pattern)) == pattern and hash(Pattern(str(pattern))) == hash(pattern)
    assert Pattern.parse(pattern) is pattern and Pattern.parse(text) == pattern
    assert pattern.layers == len(stages[0])
    for steps in range(6):
        segments = pattern.segments(steps)
        assert [bits for bits, count in segments for _ in range(count)] == [pattern.at(i) for i in range(steps)]
        assert all(count > 0 for _, count in segments)
        assert all(a != b for (a, _), (b, _) in zip(segments, segments[1:]))


def test_texts() -> None:
    assert str(Pattern("00011")) == "00011" and repr(Pattern("01")) == "Pattern('01')"
    assert str(Pattern(" 01 , 10 ")) == "01,10"
    assert Pattern("11,01,01") == Pattern("11,01") != Pattern("11")
    assert str(Pattern("11,01,11")) == "11,01,11"
    assert Pattern("01") != "01"
    assert len({Pattern("01"), Pattern("01,01"), Pattern("10")}) == 2


def test_order_copies_and_pickles() -> None:
    patterns = list(Pattern.all(3))
    assert patterns == sorted(reversed(patterns)) and patterns[0] < patterns[1] <= patterns[1]
    with pytest.raises(TypeError):
        _ = patterns[0] < "1"  # type: ignore[operator]
    for twin in (copy.deepcopy(patterns[2]), pickle.loads(pickle.dumps(patterns[2]))):
        assert twin == patterns[2] and hash(twin) == hash(patterns[2])


def test_all_and_full() -> None:
    assert [str(p) for p in Pattern.all(2)] == ["01", "10", "11"]
    texts = [str(p) for p in Pattern.all(5)]
    assert len(texts) == len(set(texts)) == 31 and texts[0] == "00001" and texts[-1] == "11111" == str(Pattern.full(5))
    with pytest.raises(ValueError, match="at least one layer, got 0"):
        Pattern.all(0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "pattern '' is empty: give one bit per layer, as in '00011'"),
        ("011,", "pattern '011,' is empty: give one bit per layer"),
        ("   ", "is empty"),
        ("00000", "pattern '00000' updates no layer: at least one bit of '00000' must be 1"),
        ("111,000", "pattern '111,000' updates no layer: at least one bit of '000' must be 1"),
        ("0201", r"pattern '0201' has '2': a bit is 0 \(frozen\) or 1 \(updated\)"),
        ("0 1", "pattern '0 1' has ' ': a bit is 0"),
        ("٠١", "a bit is 0"),
        ("11,111", "pattern '11,111' mixes 2 and 3 layers: all steps need the same number"),
        (11, "a pattern is a text like '00011', got 11"),
        (None, "a pattern is a text like '00011', got None"),
    ],
)
def test_wrong_texts(text: str, says: str) -> None:
    for make in (Pattern, Pattern.parse):
        with pytest.raises(ValueError, match=says):
            make(text)


def test_layers_of_conv4() -> None:
    model = models.conv4(ways=5, in_channels=1, width=2, image_size=28)
    assert layer_names(model) == ["block1.conv", "block2.conv", "block3.conv", "block4.conv", "head"]
    assert Pattern("00011").parameters(model) == (
        "block4.conv.weight", "block4.conv.bias", "block4.norm.weight", "block4.norm.bias", "head.weight", "head.bias",
    )  # fmt: skip
    assert Pattern("00011").parameters(model, "never") == (
        "block4.conv.weight", "block4.conv.bias", "head.weight", "head.bias",
    )  # fmt: skip
    assert Pattern("00001,10000").parameters(model, "never", step=3) == ("block1.conv.weight", "block1.conv.bias")


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_counted_from_the_input_and_hold_every_parameter(name: str) -> None:
    case = NETWORKS[name]()
    everything = {n for n, _ in case.network.named_parameters()}
    for model in (case.network, lk.convert(copy.deepcopy(case.network))):
        assert len(layer_names(model)) == len(case.groups)
        for pattern in Pattern.all(len(case.groups)):
            for norm in ("follow", "never"):
                got = pattern.parameters(model, norm)
                assert set(got) == set(updated_names(case.groups, str(pattern), norm)) and len(got) == len(set(got))
        assert set(Pattern.full(len(case.groups)).parameters(model)) == everything


def test_buffers_belong_to_no_layer() -> None:
    assert "offset" not in Pattern("11").parameters(loops.scaled().network)


def test_a_pattern_of_another_length() -> None:
    model = models.conv4(ways=5, in_channels=1, width=2, image_size=28)
    for call in (lambda p: p.parameters(model), lambda p: p.cost(model, (5, 1, 28, 28))):
        with pytest.raises(ValueError, match=r"pattern '011' has 3 bits, Conv4 has 5 layers \(block1.conv, .*, head\)"):
            call(Pattern("011"))


# paper.md, last table: conv4 with 32 channels at 32x32; digits as printed there.
PRINTED = {
    "00001": (2.78, None),
    "00011": (2.68, 37.0),
    "00010": (2.68, 37.0),
    "00111": (2.27, 6.8),
    "01000": (1.56, 1.8),
    "10000": (1.39, 1.4),
    "11110": (1.00, 1.0),
}


@pytest.mark.parametrize("text", PRINTED)
def test_costs_are_those_of_the_papers_notes(text: str) -> None:
    model = models.conv4(ways=5, in_channels=3, width=32, image_size=32)
    full = Pattern("11111").cost(model, (25, 3, 32, 32))
    cost = Pattern(text).cost(model, (25, 3, 32, 32))
    skipping, reuse = PRINTED[text]
    assert full.prefix == 0 and full.step == full.step_without_reuse
    assert f"{full.step / cost.step_without_reuse:.2f}" == f"{skipping:.2f}"
    if reuse is not None:
        digits = 0 if reuse >= 10 else 1
        assert f"{full.step / cost.step:.{digits}f}" == f"{reuse:.{digits}f}"
    else:
        assert cost.step == 2 * 25 * 32 * 2 * 2 * 5  # the head alone: forward and its weight's gradient


def by_hand(text: str) -> tuple[int, int, int]:
    """conv4, width 2, 1 channel, 16x16, 3 images, 2 ways."""
    forward = [3 * 16 * 16 * 2 * 9, 3 * 8 * 8 * 2 * 18, 3 * 4 * 4 * 2 * 18, 3 * 2 * 2 * 2 * 18, 3 * 2 * 2]
    first = text.index("1")
    steps = [f * (1 + (bit == "1") + (i > first)) for i, (f, bit) in enumerate(zip(forward, text))]
    return sum(forward[:first]), sum(steps[first:]), sum(steps)


def test_costs_counted_by_hand() -> None:
    stock = loops.torch_conv4(width=2)
    for model in (stock, models.conv4(ways=2, in_channels=1, width=2, image_size=16)):
        for pattern in Pattern.all(5):
            assert tuple(pattern.cost(model, (3, 1, 16, 16))) == by_hand(str(pattern))
    assert tuple(Pattern("00001,11111").cost(stock, (3, 1, 16, 16), step=1)) == by_hand("11111")


def test_costs_of_tied_weights_and_groups() -> None:
    # a, twice, twice, b with a's weight: 4x4 each; head 4x2. Under 1000 both a and b have a weight gradient.
    cost = Pattern("1000").cost(loops.tied().network, (3, 4))
    layer, head = 3 * 16, 3 * 8
    assert tuple(cost) == (
        0,
        2 * layer + 2 * 2 * layer + 3 * layer + 2 * head,
        2 * layer + 2 * 2 * layer + 3 * layer + 2 * head,
    )
    grouped = nn.Sequential(nn.Conv2d(4, 6, (3, 1), stride=2, groups=2), nn.Flatten(), nn.Linear(6 * 2 * 3, 2))
    assert Pattern("01").cost(grouped, (5, 4, 5, 5)).prefix == 5 * 6 * 2 * 3 * 2 * 3


# Multiply-adds of a forward pass by layer, written out.
COUNTED: dict[str, tuple[nn.Module, Any, list[int]]] = {
    "conv1d": (
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Linear(7, 5)),
        (4, 2, 9),
        [4 * 7 * 18, 4 * 3 * 35],
    ),
    "conv3d": (nn.Sequential(nn.Conv3d(1, 2, (1, 2, 3)), nn.Flatten()), (2, 1, 3, 4, 5), [2 * 3 * 3 * 3 * 2 * 6]),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (5, 4, 3, 3), [5 * 9 * 4 * 3 * 4]),
    "words": (nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)), torch.tensor([1, 2, 6]), [0, 3 * 6]),
    "LSTM": (nn.LSTM(3, 4), (5, 2, 3), [5 * 2 * 4 * (3 * 4 + 4 * 4)]),
    "GRU": (nn.GRU(3, 4, bidirectional=True), (5, 2, 3), [2 * 5 * 2 * 3 * (3 * 4 + 4 * 4)]),
    # projections, queries by keys, weights by values, back: 3 words, 2 batches, 4 features
    "attention": (nn.TransformerEncoderLayer(4, 2, 8), (3, 2, 4), [6 * 48 + 2 * 2 * 9 * 4 + 6 * 16, 6 * 32, 6 * 32]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COUNTED)
def test_costs_of_layers_of_any_kind(name: str, training: bool) -> None:
    model, sample, want = COUNTED[name]
    for network in (model.train(training), lk.convert(copy.deepcopy(model))):
        assert layer_costs(network, sample) == want


def test_what_runs_outside_of_layers_costs_too() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x @ self.a.weight.t()  # the layer's own weight, but not its call
            return self.b((h @ h.t()) @ h)

    model = Raw()
    assert layer_costs(model, (5, 3)) == [5 * 12 + 5 * 5 * 4 + 5 * 5 * 4, 5 * 8]
    # Frozen a, its product with itself: once. Updated b: forward and the gradient of its weight.
    assert tuple(Pattern("01").cost(model, (5, 3))) == (260, 80, 340)
    # Updated a: its weight's gradient; both factors of each product, once more each; b's input.
    assert Pattern("10").cost(model, (5, 3)).step == 2 * 60 + 3 * 100 + 3 * 100 + 2 * 40


def test_what_draws_random_numbers_or_is_written_into_is_run_in_every_step() -> None:
    dropout = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 4), nn.Linear(4, 2))
    assert tuple(Pattern("001").cost(dropout, (5, 3))) == (60, 80 + 2 * 40, 60 + 80 + 2 * 40)
    assert Pattern("001").cost(dropout.eval(), (5, 3)).prefix == 60 + 80
    case = loops.writes_prefix("value")  # h = first(x) * 1; h += second(h * 1): first(x) once, the rest again
    first, second, head = layer_costs(case.network, (3, 1, 4, 4))
    cost = Pattern("010").cost(case.network, (3, 1, 4, 4))
    assert tuple(cost) == (first, 2 * second + 2 * head, first + 2 * second + 2 * head)


def test_costs_that_cannot_be_counted() -> None:
    with pytest.raises(
        ValueError, match=r"cost: Untraceable cannot be counted on an input \[3, 1, 5, 5\]: .*no values"
    ):
        Pattern("01").cost(loops.untraceable().network, (3, 1, 5, 5))
    with pytest.raises(ValueError, match="give the input itself where its shape does not tell its dtype"):
        Pattern("01").cost(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), (4,))
