"""Lambda patterns: which layers the inner loop updates, step by step (arXiv 2206.05930)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import total_ordering
from typing import NamedTuple

import torch
from torch import nn

from lambda_kernels.program import program_for

from .network import layer_costs
from .plan import Layout, moving_steps

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

    Raises:
        ValueError: the text is empty, has other characters than 0 and 1, no 1 at all, or patterns of unequal length.
    """

    __slots__ = ("stages",)

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"a pattern is a text like '00011', got {text!r}")
        stages = tuple(part.strip() for part in text.split(","))
        for part in stages:
            wrong = sorted(set(part) - {"0", "1"})
            if not part:
                raise ValueError(f"pattern {text!r} is empty: give one bit per layer, as in '00011'")
            if wrong:
                raise ValueError(
                    f"pattern {text!r} has {', '.join(map(repr, wrong))}: a bit is 0 (frozen) or 1 (updated)"
                )
            if "1" not in part:
                raise ValueError(f"pattern {text!r} updates no layer: at least one bit of {part!r} must be 1")
            if len(part) != len(stages[0]):
                raise ValueError(
                    f"pattern {text!r} mixes {len(stages[0])} and {len(part)} layers: all steps need the same number"
                )
        self.stages = tuple(s for i, s in enumerate(stages) if i == 0 or any(t != stages[i - 1] for t in stages[i:]))

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

    def at(self, step: int) -> str:
        """The bits of a step, counted from 0."""
        return self.stages[min(step, len(self.stages) - 1)]

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
        return len(self.stages[0])

    def check(self, plan: Layout) -> None:
        """ValueError where the network has another number of layers."""
        if self.layers != len(plan.layers):
            raise ValueError(
                f"pattern {str(self)!r} has {self.layers} bits, {plan.network} has {len(plan.layers)} layers "
                f"({', '.join(layer.name for layer in plan.layers)}): give one bit for each"
            )

    def parameters(self, model: nn.Module, norm: str = "follow", step: int = 0) -> tuple[str, ...]:
        """The names of the parameters that a step updates; `norm` is "follow" or "never" (gamma and beta stay).

        >>> Pattern("00001").parameters(model)
        ('head.weight', 'head.bias')
        """
        plan = Layout(model)
        self.check(plan)
        return plan.updated(self.at(step), norm)

    def cost(self, model: nn.Module, input_shape: tuple[int, ...], step: int = 0) -> Cost:
        """Multiply-adds of an adaptation on a support set [N, C, H, W]: forward, input and weight gradients.

        The first updated layer needs no input gradient, a frozen layer no weight gradient.

        >>> Pattern("00011").cost(model, (5, 1, 28, 28))
        Cost(prefix=987840, step=52440, step_without_reuse=1040280)

        Raises:
            ValueError: the network has other layers than Conv2d and Linear, or code of its own that is not looked into.
        """
        updated = frozenset(self.parameters(model, "follow", step))
        first = next(model.parameters())
        example = torch.zeros(input_shape, dtype=first.dtype, device=first.device)
        program = program_for(model, (example,), {})
        costs = layer_costs(model, program, tuple(input_shape))
        steps, aliases = program.steps, program.aliases
        moving = moving_steps(program, updated)
        slots = {steps[i].slot for i in moving}
        prefix = reused = again = 0
        for index, forward in costs.items():
            own = any(aliases.get(name, name) in updated for name in steps[index].parameters)
            passes = own + (not slots.isdisjoint(steps[index].reads))
            prefix += 0 if index in moving else forward
            reused += (1 + passes) * forward if index in moving else 0
            again += (1 + passes) * forward
        return Cost(prefix, reused, again)

    def __str__(self) -> str:
        return ",".join(self.stages)

    def __repr__(self) -> str:
        return f"Pattern({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.stages == other.stages

    def __lt__(self, other: Pattern) -> bool:
        return self.stages < other.stages if isinstance(other, Pattern) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.stages)
