"""Lambda patterns: which layers the inner loop updates, step by step (arXiv 2206.05930)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import total_ordering
from typing import Any, NamedTuple

from torch import nn

from .cost import layer_costs, operations_of
from .groups import bits_by_path, bits_of, checked, is_bits
from .network import Layer, layers_of, module_of

__all__ = ["Cost", "Pattern"]


class Cost(NamedTuple):
    """Multiply-adds of convolutions and linear layers on the support set, forward and backward."""

    prefix: int  # once per adaptation: what no updated parameter reaches
    step: int  # in each inner step, the prefix left out
    step_without_reuse: int  # in each inner step where the prefix is run again, as `requires_grad=False` alone has it


@total_ordering
class Pattern:
    """Which layers the inner loop updates: one bit per layer, input first, `1` updated and `0` frozen.

    "11111" is MAML on a network of five layers, "00001" ANIL (Raghu et al. 2020), "11110" BOIL (Oh et al. 2021). A
    schedule is a pattern for each step, separated by commas; the last one holds for all later steps:
    "11111,00001" updates all layers in step 1 and the last one from step 2 on.

    >>> Pattern("11111,00001").segments(5)        # bits, and how many steps have them
    [('11111', 1), ('00001', 4)]

    In place of bits a name may stand, which becomes bits where the pattern meets a network: "MAML" is all layers,
    "ANIL" or "head" the last one, "BOIL" all but the last. "PATH:0011" has a bit for each child of the module PATH that
    holds layers, and 0 for all other layers; "stages:0011" is that of the innermost module that holds all layers,
    unless the network has a module called `stages`. "MAML,ANIL" is a schedule too.

    Raises:
        ValueError: the text is empty, is neither bits nor a name, has no 1 at all, or patterns of unequal length.
    """

    __slots__ = ("rows", "stages")

    rows: tuple[tuple[str, tuple[int, ...]], ...]
    """The output channels of layers of which only some are updated, by the layer's path; see `channels`."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(
                f"a pattern is a text like '00011', got {text!r}: Pattern.of(model, ...) takes bits by path"
            )
        stages = tuple(checked(part.strip(), text) for part in text.split(","))
        lengths = [len(part) for part in stages if is_bits(part)]
        for length in lengths:
            if length != lengths[0]:
                raise ValueError(
                    f"pattern {text!r} mixes {lengths[0]} and {length} layers: all steps need the same number"
                )
        self.rows = ()
        self.stages = tuple(s for i, s in enumerate(stages) if i == 0 or any(t != stages[i - 1] for t in stages[i:]))

    @classmethod
    def of(cls, model: nn.Module, pattern: str | Pattern | Mapping[str, int]) -> Pattern:
        """The pattern of a network in bits: from its text or name, or from bits by the paths of modules.

        A path stands for all layers below that module, the longest one decides, and layers that none names get 0.

        >>> str(Pattern.of(model, {"block4": 1, "head": 1})), str(Pattern.of(model, "BOIL"))
        ('00011', '11110')

        Raises:
            ValueError: a path holds no layer, a bit is neither 0 nor 1, none is 1, or the pattern has another number of
                bits than the network layers.
        """
        layers = layers_of(model)
        if isinstance(pattern, Mapping):
            return cls(bits_by_path(pattern, [layer.name for layer in layers], type(model).__name__))
        return cls.parse(pattern).on(layers, type(model).__name__)

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """A pattern or schedule from its text; a Pattern is returned as it is.

        >>> Pattern.parse("11111,00001").layers
        5
        """
        return text if isinstance(text, Pattern) else cls(text)

    @classmethod
    def all(cls, layers: int) -> Iterator[Pattern]:
        """The 2^layers - 1 patterns of that many layers, in the order of the binary numbers.

        >>> [str(pattern) for pattern in Pattern.all(2)]
        ['01', '10', '11']
        """
        if layers < 1:
            raise ValueError(f"a network has at least one layer, got {layers}")
        return (cls(f"{number:0{layers}b}") for number in range(1, 2**layers))

    @classmethod
    def full(cls, layers: int) -> Pattern:
        """All layers updated: MAML."""
        return cls("1" * layers)

    def channels(self, model: nn.Module, chosen: Mapping[str, Iterable[int]]) -> Pattern:
        """The pattern that updates only some output channels of layers, the rows of their weight and bias.

        Under norm="follow" the same rows of their norms' gamma and beta are updated. Only these rows of the weight
        gradient are computed. `adapt`, `adapt_tasks` and `explain` take such a pattern; its steps run by autograd.
        `parameters`, `describe` and `cost` speak of whole layers.

        >>> pattern = Pattern("00011").channels(model, {"block4.conv": range(4)})
        >>> pattern.rows
        (('block4.conv', (0, 1, 2, 3)),)

        Args:
            chosen: channels, counted from 0, by the path of a layer that the pattern updates, a Conv1d, Conv2d, Conv3d
                or Linear without groups. Layers that it leaves out are updated as a whole.

        Raises:
            ValueError: a path is no layer, or one with the bit 0; there are no channels, or some that it has not; when
                it is adapted: a layer of another class, with groups or hooks, or shared.
        """
        layers = layers_of(model)
        pattern = self.on(layers, type(model).__name__)
        places = {layer.name: i for i, layer in enumerate(layers)}
        rows: dict[str, tuple[int, ...]] = {}
        for name, numbers in chosen.items():
            if name not in places:
                raise ValueError(f"channels: {name!r} is no layer of {type(model).__name__}: {', '.join(places)} are")
            if all(bits[places[name]] == "0" for bits in pattern.stages):
                raise ValueError(f"channels: {name} has the bit 0 in {pattern.whole()}: give it the bit 1")
            own = list(numbers)
            count = len(model.get_parameter(layers[places[name]].weights[0]))
            wrong = [n for n in own if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < count]
            if wrong or not own or len(set(own)) < len(own):
                raise ValueError(
                    f"channels of {name}: each of some numbers from 0 to {count - 1} once expected, got {own}"
                )
            rows[name] = tuple(sorted(own))
        found = Pattern(",".join(pattern.stages))
        found.rows = tuple(sorted(rows.items()))
        return found

    def whole(self) -> Pattern:
        """The same of whole layers.

        >>> str(Pattern("00011").channels(model, {"head": [0]}).whole())
        '00011'
        """
        return self if not self.rows else Pattern(",".join(self.stages))

    def at(self, step: int) -> str:
        """The bits of a step, counted from 0."""
        return self._bits()[min(step, len(self.stages) - 1)]

    def _bits(self) -> tuple[str, ...]:
        """The stages, all of them bits."""
        for stage in self.stages:
            if not is_bits(stage):
                raise ValueError(f"{stage!r} stands for bits of a network: Pattern.of(model, {str(self)!r}) has them")
        return self.stages

    def segments(self, steps: int) -> list[tuple[str, int]]:
        """The bits of the first `steps` steps and how many steps in succession have them."""
        runs: list[tuple[str, int]] = []
        for step in range(steps):
            bits = self.at(step)
            runs[-1:] = [(bits, runs[-1][1] + 1)] if runs and runs[-1][0] == bits else [*runs[-1:], (bits, 1)]
        return runs

    @property
    def layers(self) -> int:
        """The number of layers that the pattern speaks of."""
        return len(self._bits()[0])

    def on(self, layers: Sequence[Layer], network: str) -> Pattern:
        """The same in bits, for a network of that name with these layers; see `of`.

        Raises:
            ValueError: it has another number of bits than the network layers, or names what the network has not.
        """
        names = [layer.name for layer in layers]
        stages = [stage if is_bits(stage) else bits_of(stage, names, network) for stage in self.stages]
        for stage in stages:
            if len(stage) != len(layers):
                raise ValueError(
                    f"pattern {str(self)!r} has {len(stage)} bits, {network} has {len(layers)} layers "
                    f"({', '.join(names)}): give one bit for each"
                )
        return self if all(map(is_bits, self.stages)) else Pattern(",".join(stages))

    def parameters(self, model: nn.Module, norm: str = "follow", step: int = 0) -> tuple[str, ...]:
        """The names of the parameters that a step updates; `norm` is "follow" or "never" (gamma and beta stay).

        >>> Pattern("00001").parameters(model)
        ('head.weight', 'head.bias')
        """
        layers = layers_of(model)
        bits = self.on(layers, type(model).__name__).at(step)
        return tuple(n for bit, layer in zip(bits, layers) if bit == "1" for n in layer.adapted(norm))

    def describe(self, model: nn.Module, sample: Any = None, norm: str = "follow") -> str:
        """A legend: for each layer its bit, path, kind, number of parameters, and share of them or of the cost.

        >>> print(Pattern("00011").describe(model, (5, 1, 28, 28)))
        bit  layer        kind                 parameters  share of cost
        0    block1.conv  Conv2d, BatchNorm2d          96          27.8%
        0    block2.conv  Conv2d, BatchNorm2d         600          55.7%
        0    block3.conv  Conv2d, BatchNorm2d         600          13.9%
        1    block4.conv  Conv2d, BatchNorm2d         600           2.6%
        1    head         Linear                       45           0.0%
        norm='follow': gamma and beta of norms follow their layer's bit

        Args:
            sample: an input or its shape, as in `cost`: the share is then that of the forward pass's multiply-adds.
            norm: "follow" or "never", as in `adapt`.

        Raises:
            ValueError: the pattern does not fit the network, or the network cannot be run without values.
        """
        layers = layers_of(model)
        pattern = self.on(layers, type(model).__name__)
        counts = [sum(model.get_parameter(n).numel() for n in layer.weights + layer.norm) for layer in layers]
        costs = counts if sample is None else layer_costs(model, sample)
        total = max(1, sum(costs))
        rows = [("bit", "layer", "kind", "parameters", f"share of {'parameters' if sample is None else 'cost'}")]
        for bits, layer, count, cost in zip(zip(*pattern.stages), layers, counts, costs):
            rows.append((",".join(bits), layer.name, _kind(model, layer), f"{count:,}", f"{cost / total:.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(cell.rjust(w) if i > 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        says = "follow their layer's bit" if norm == "follow" else "are never updated"
        return "\n".join([*lines, f"norm={norm!r}: gamma and beta of norms {says}"])

    def cost(self, model: nn.Module, sample: Any, step: int = 0) -> Cost:
        """Multiply-adds of an adaptation on a support set: forward, input and weight gradients.

        Counted is what `torch.utils.flop_counter` has formulas for: convolutions and all products of matrices, so also
        attention and recurrent layers. The first updated layer needs no input gradient, a frozen layer no weight
        gradient.

        >>> Pattern("00011").cost(model, (5, 1, 28, 28))
        Cost(prefix=987840, step=52440, step_without_reuse=1040280)

        Args:
            sample: the support set's shape, [N, C, H, W], or its inputs, where the dtype is not the parameters' or they
                are more than one tensor.

        Raises:
            ValueError: the pattern does not fit the network, or the network cannot be run without values.
        """
        return Cost(*operations_of(model, sample).costs(self.parameters(model, "follow", step)))

    def __str__(self) -> str:
        told = "; ".join(f"{name}: {', '.join(map(str, numbers))}" for name, numbers in self.rows)
        return ",".join(self.stages) + (f" [channels of {told}]" if told else "")

    def __repr__(self) -> str:
        own = f"Pattern({','.join(self.stages)!r})"
        return f"{own}.channels(model, {dict(self.rows)!r})" if self.rows else own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and (self.stages, self.rows) == (other.stages, other.rows)

    def __lt__(self, other: Pattern) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        return (self.stages, self.rows) < (other.stages, other.rows)

    def __hash__(self) -> int:
        return hash((self.stages, self.rows))


def _kind(model: nn.Module, layer: Layer) -> str:
    """The classes of a layer and of its norms."""
    modules = dict(model.named_modules())
    paths = [
        n.partition(".parametrizations.")[0] if ".parametrizations." in n else n.rpartition(".")[0] for n in layer.norm
    ]
    kinds = [module_of(model, layer), *(modules[path] for path in paths)]
    return ", ".join(dict.fromkeys(type(module).__name__ for module in kinds))
