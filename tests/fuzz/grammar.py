"""Random networks, written as Python source: pieces in a row, each of which takes any shape that it is given.

A piece draws from a generator of its own, so that leaving one out changes no other: a failing network can be made
shorter.
"""

from __future__ import annotations

import linecache
import math
import random
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["Network", "network"]

HEADER = '''
import collections, dataclasses, functools, math, types
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE, TABLE = 0.9, {"act": "tanh"}
SHIFT = torch.tensor(0.25, dtype=torch.float64)
Pair = collections.namedtuple("Pair", ["main", "side"])


@dataclasses.dataclass
class Config:
    act: str = "relu"
    scale: float = 1.1
    residual: bool = True


def leaky(slope):
    def apply(h):
        return torch.where(h > 0, h, slope * h)
    return apply


class Scaled(nn.Module):
    """A user's layer with a parameter, a buffer and an optional argument."""
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.8, 1.2, size))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, size))
    def forward(self, h, extra=None):
        shape = [1, -1] + [1] * (h.dim() - 2)
        y = h * self.gain.view(shape) + self.shift.view(shape)
        return y if extra is None else y + extra


class Tupled(nn.Module):
    def forward(self, h):
        return Pair(h * 1.05, h.detach().mean())


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 0.5


class OwnLinear(nn.Linear):
    pass
'''


@dataclass
class Network:
    """A network's source and what it is called with."""

    source: str
    shape: tuple[int, ...]  # of one input, without N
    ways: int
    pieces: int
    training: bool
    name: str
    facts: set[str] = field(default_factory=set)  # which pieces it has
    alone: bool = True  # each call of `make` has classes of its own: nothing that was captured of another one holds
    module: Any = None  # the source, run

    def make(self) -> nn.Module:
        """The network in float64, the same in every call."""
        if self.alone or self.module is None:
            self.module = ModuleType(self.name)
            sys.modules[self.name] = self.module  # where dataclasses and pickle look for it
            linecache.cache[self.name] = len(self.source), None, self.source.splitlines(keepends=True), self.name
            exec(compile(self.source, self.name, "exec"), self.module.__dict__)
        model: nn.Module = self.module.make()
        return model


class Writer:
    """The source of a network so far, the shape of its value `h`, and what later pieces may use again."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.init: list[str] = []
        self.forward: list[str] = []
        self.after: list[str] = []  # of `net`, once it is made
        self.arguments = "x"
        self.layers: list[tuple[str, str]] = []  # attribute, constructor
        self.saved: list[tuple[str, tuple[int, ...]]] = []
        self.facts: set[str] = set()
        self.at = 0
        self.rng = random.Random(0)
        self.training = True

    # What pieces are made of.

    @property
    def images(self) -> bool:
        return len(self.shape) == 3

    @property
    def channels(self) -> int:
        return self.shape[0]

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def line(self, text: str) -> None:
        self.forward.append(text)

    def module(self, kind: str, constructor: str) -> str:
        """A submodule; the expression that names it."""
        name = f"{kind}{self.at}_{len(self.init)}"
        self.init.append(f"self.{name} = {constructor}")
        return f"self.{name}"

    def fresh(self) -> None:
        """Makes h memory that no backward pass reads, so that steps in place are allowed."""
        self.line(self.pick("h = h * 1.05", "h = h + 0", "h = h * SCALE", "h = h - 0.1"))

    # Layers.

    def convolution(self, outputs: int | None = None, same: bool = False) -> str:
        """A convolution's attribute; the shape becomes that of its result."""
        pick, (c, height, width) = self.pick, self.shape
        if same:
            kernel, stride, dilation = pick(1, 3), 1, 1
            padding: Any = kernel // 2
        else:
            kernel, stride, dilation, padding = (
                pick(1, 2, 3, 3, (1, 3), (3, 1)),
                pick(1, 1, 1, 2),
                pick(1, 1, 2),
                pick(0, 1, 1),
            )
        groups = pick(1, 1, 1, c) if c <= 4 else 1
        o = outputs or pick(1, 2, 3, 4, 8) * (groups if groups > 1 and c < 4 else 1)
        groups = groups if o % groups == 0 and c % groups == 0 else 1

        def side(size: int, axis: int, s: int, d: int, p: int) -> int:
            k = kernel if isinstance(kernel, int) else kernel[axis]
            return (size + 2 * p - d * (k - 1) - 1) // s + 1

        sizes = [side(n, a, stride, dilation, padding) for a, n in enumerate((height, width))]
        if min(sizes) < 1:
            kernel, stride, dilation, padding = 3, 1, 1, 1
            sizes = [height, width]
        options = (
            f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, bias={pick(True, True, False)}"
        )
        if padding and not same and min(height, width) > 1 and self.rng.random() < 0.1:
            options += f", padding_mode={pick('reflect', 'circular', 'replicate')!r}"
        self.shape = (o, *sizes)
        cls = self.rng.choices(["nn.Conv2d", "lk.Conv2d", "OwnConv"], [12, 1, 1])[0]
        return self.known(cls, f"{c}, {o}, {kernel}, {options}")

    def known(self, cls: str, arguments: str) -> str:
        """A new layer, or now and then one that is there, used again or with its weight shared."""
        constructor = f"{cls}({arguments})"
        twin = [name for name, other in self.layers if other == constructor]
        if twin and self.rng.random() < 0.5:
            if self.rng.random() < 0.5:
                self.facts.add("used twice")
                return twin[0]
            self.facts.add("tied")
            name = self.module("layer", constructor)
            self.init.append(f"{name}.weight = {twin[0]}.weight")
            return name
        name = self.module("conv" if "Conv" in cls else "fc", constructor)
        self.layers.append((name, constructor))
        return name

    def norm(self) -> str:
        size = self.channels
        dims = 2 if self.images else 1
        affine = f"affine={self.pick(True, True, True, False)}"
        momentum = self.pick("", ", momentum=None", ", momentum=0.3")
        options = [
            f"nn.BatchNorm{dims}d({size}, track_running_stats=False, {affine})",
            f"nn.BatchNorm{dims}d({size}, track_running_stats=False)",
            f"nn.BatchNorm{dims}d({size}, eps=0.01{momentum})",
            f"nn.GroupNorm({self.pick(*[g for g in (1, 2, size) if size % g == 0])}, {size}, {affine})",
        ]
        if self.images:
            inner = f"{list(self.shape)}"
            options += [f"nn.InstanceNorm2d({size}, {affine})", f"nn.LayerNorm({inner})", f"nn.RMSNorm({inner})"]
            options += [f"nn.InstanceNorm2d({size}, {affine}, track_running_stats=True)"]
        else:
            options += [f"nn.LayerNorm({size})", f"nn.RMSNorm({size})"]
        values = math.prod(self.shape[1:]) if self.images else 1
        if values < 3:  # too few per image for a variance of their own
            options = [o for o in options if "Instance" not in o and ("Group" not in o or size > 2)]
        return self.module("norm", self.rng.choice(options))

    def activation(self, value: str = "h") -> str:
        relu = self.pick(f"F.relu({value})", f"torch.relu({value})", f"{value}.relu()", None, None)
        if relu is None:
            relu = f"{self.module('relu', self.pick('nn.ReLU()', 'nn.ReLU()', 'nn.ReLU(inplace=True)'))}({value})"
        smooth = self.pick(
            f"torch.tanh({value})", f"F.gelu({value})", f"F.silu({value})", f"{value}.sigmoid()",
            f"F.softplus({value})", f"F.leaky_relu({value}, 0.1)", f"{self.module('act', 'nn.ELU()')}({value})",
        )  # fmt: skip
        return str(self.rng.choices([relu, smooth], [3, 1])[0])

    def pool(self, value: str = "h") -> str | None:
        if not self.images or min(self.shape[1:]) < 2:
            return None
        kernel = self.pick(2, 2, 2, 3) if min(self.shape[1:]) >= 3 else 2
        self.shape = (self.channels, *(n // kernel for n in self.shape[1:]))
        return str(
            self.pick(
                f"F.max_pool2d({value}, {kernel})", f"{self.module('pool', f'nn.MaxPool2d({kernel})')}({value})",
                f"F.avg_pool2d({value}, {kernel})",
            )
        )  # fmt: skip


Piece = Callable[[Writer], None]


def layer(w: Writer) -> None:
    """A layer, and often norm, activation and pool behind it: what a fused block is made of."""
    if w.images:
        w.line(f"h = {w.convolution()}(h)")
    else:
        size = w.pick(2, 3, 5, 8)
        cls = w.rng.choices(["nn.Linear", "lk.Linear", "OwnLinear"], [12, 1, 1])[0]
        name = w.known(cls, f"{w.channels}, {size}, bias={w.pick(True, True, False)}")
        w.shape = (size,)
        w.line(f"h = {name}(h)")
    if w.rng.random() < 0.6:
        w.line(f"h = {w.norm()}(h)")
    if w.rng.random() < 0.8:
        w.line(f"h = {w.activation()}")
    if w.rng.random() < 0.4 and (pool := w.pool()) is not None:
        w.line(f"h = {pool}")


def block(w: Writer) -> None:
    """Exactly what is fused, in a Sequential."""
    if not w.images:
        return layer(w)
    name = w.convolution()
    norm = w.module("bn", f"nn.BatchNorm2d({w.channels}, track_running_stats={w.pick(False, False, True)})")
    value = f"F.relu({norm}({name}(h)))"
    pool = w.pool(value) if w.rng.random() < 0.6 else None
    w.line(f"h = {pool or value}")


def residual(w: Writer) -> None:
    """A skip connection; sometimes in place, sometimes with the shortcut computed first."""
    w.facts.add("residual")
    start = w.shape
    if w.images:
        inside = f"{w.convolution(w.channels, same=True)}(h)"
    else:
        inside = f"{w.known('nn.Linear', f'{w.channels}, {w.channels}')}(h)"
    w.shape = start
    norm = f"{w.norm()}({inside})" if w.rng.random() < 0.7 else inside
    style = w.pick("plain", "add", "skip", "in-place", "act")
    if style == "plain":
        w.line(f"h = h + {norm}")
    elif style == "add":
        w.line(f"h = torch.add(h, {norm})")
    elif style == "skip":
        w.forward += ["skip = h", f"h = {w.activation(norm)}", "h = h + skip"]
    elif style == "in-place":
        w.forward += ["skip = h", f"h = {norm}", "h += skip"]
    else:
        w.line(f"h = {w.activation(f'(h + {norm})')}")


def dense(w: Writer) -> None:
    w.facts.add("dense")
    c, rest = w.channels, w.shape[1:]
    if c > 6:
        return residual(w)
    more = 2
    inside = w.convolution(more, same=True) if w.images else w.known("nn.Linear", f"{c}, {more}")
    w.shape = (c + more, *rest)
    w.line(w.pick(f"h = torch.cat([h, {inside}(h)], 1)", f"h = torch.cat((h, {inside}(h)), dim=1)"))


def in_place(w: Writer) -> None:
    w.facts.add("in place")
    if w.rng.random() < 0.85:
        w.fresh()
    choices = [
        "h.mul_(0.9)", "h += 0.1", "h *= SCALE", "h[:, 0] = 0.3", "h[:, :1] *= 2", "h.clamp_(min=-1.5)",
        "h[0].add_(0.2)",
        "h.select(1, 0).mul_(0.5)", "h.detach().mul_(0.99)", "torch.tanh_(h)", "h[..., -1] = h[..., 0] * 0.5",
        "h.narrow(1, 0, 1).neg_()", "h = h.add_(1)", "h.sub_(h.mean(0, keepdim=True).detach())", "h.data.mul_(0.98)",
        "y = h; y += 0.25", "torch.mul(h, 0.9, out=h) if not torch.is_grad_enabled() else h.mul_(0.9)",
    ]  # fmt: skip
    if w.images:
        choices += [
            "h.view(h.size(0), -1)[:, :3].mul_(0.5)", "h.flatten(1)[:, 1:4] = 0.2", "h.contiguous().mul_(0.9)",
            "h.reshape(len(h), -1)[:, ::2].neg_()", "h.permute(0, 2, 3, 1)[..., 0].mul_(0.7)", "h.ravel().mul_(0.9)",
            "h.flatten(2).transpose(1, 2).add_(0.1)",
        ]  # fmt: skip
    for _ in range(w.pick(1, 1, 2)):
        w.line(w.rng.choice(choices))


def view(w: Writer) -> None:
    """What changes shape, or gives a part, or only looks at the layout."""
    w.facts.add("view")
    c = w.channels
    choices: list[tuple[str, tuple[int, ...]]] = [("h = h.flip(0)", w.shape), ("h = h.roll(1, 1)", w.shape)]
    if c > 1:
        choices += [("h = h[:, 1:]", (c - 1, *w.shape[1:])), ("h = h.narrow(1, 0, 1)", (1, *w.shape[1:]))]
        choices += [("a, h = h[:, :1], h[:, 1:]; h = h + a", (c - 1, *w.shape[1:]))]
    if c % 2 == 0:
        choices += [("a, b = h.chunk(2, 1); h = a * b", (c // 2, *w.shape[1:]))]
        choices += [("a, b = torch.split(h, h.shape[1] // 2, 1); h = a - b", (c // 2, *w.shape[1:]))]
    if w.images:
        _, height, width = w.shape
        choices += [
            ("h = h.transpose(2, 3)", (c, width, height)),
            ("h = h.permute(0, 1, 3, 2).contiguous()", (c, width, height)),
            ("h = h.flatten(2).unflatten(2, h.shape[2:])", w.shape),
            ("n, *rest = h.shape; h = h.view(n, -1).view(n, *rest)", w.shape),
            ("h = h.contiguous(memory_format=torch.channels_last)", w.shape),
            ("h = h * h.stride(1) / 10", w.shape),
            ("h = h + torch.as_strided(h.contiguous(), h.shape, h.contiguous().stride()).mean()", w.shape),
            ("h = h[:, :, ::2]", (c, (height + 1) // 2, width)),
            ("h = F.pad(h, (1, 0, 0, 1))", (c, height + 1, width + 1)),
        ]
    else:
        choices += [("h = h.unsqueeze(1).squeeze(1)", w.shape), ("h = h.t().contiguous().t()", w.shape)]
    text, w.shape = w.rng.choice(choices)
    w.line(text)


def question(w: Writer) -> None:
    """A question that Python asks, of the value, the module, or what lies around."""
    w.facts.add("question")
    c = w.channels
    act = w.pick("tanh", "relu", "gelu")
    scaled = w.module("scaled", f"Scaled({c})")
    choices: list[list[str]] = [
        ["if isinstance(h, Tensor):", "    h = h * 1.1"],
        ["if isinstance(h, nn.Parameter):", "    h = h * 5", "else:", "    h = h - 0.1"],
        ["if hasattr(h, 'shape') and not hasattr(h, 'nodes'):", "    h = h * 0.9"],
        ["h = h * getattr(self, 'absent', 0.8)"],
        ["if getattr(self, 'absent', None) is None:", "    h = torch.tanh(h)"],
        ["h = h * (1.2 if type(h) is Tensor else 7.0)"],
        ["if h.shape[1] > 2:", "    h = h * 0.9", "else:", "    h = h + 0.1"],
        ["if h.size(0) % 2:", "    h = h * 0.9"],
        [f"assert h.dim() == {len(w.shape) + 1}, h.shape"],
        ["assert h.shape[0] > 0 and h.dtype.is_floating_point", "h = h * 1.1"],
        [f"h = {scaled}(h)"],
        [f"h = {scaled}(h, extra=h.mean())"],
        [f"h = {scaled}(h, None) if self.training else {scaled}(h, extra=0.1)"],
        ["n, c, *rest = h.shape", "h = h / math.sqrt(c)"],
        ["h = h * self.config.scale if self.config.residual else h"],
        ["h = getattr(torch, self.config_act)(h)"],
        ["h = getattr(F, self.config.act)(h)"],
        ["h = h * SCALE + SHIFT"],
        ["h = getattr(torch, TABLE['act'])(h)"],
        ["h = self.apply_(h)"],
        ["h = self.partial(h)"],
        ["if self.training:", "    h = h * 1.05", "else:", "    h = h * 0.95"],
        ["if torch.is_grad_enabled():", "    h = h * 1.0", "else:", "    h = h * 1.0"],
        ["with torch.no_grad():", "    norm = h.abs().mean()", "h = h / (1 + norm)"],
        ["h = h + (torch.tanh(h) - h).detach()"],
        ["for k in range(h.shape[1]):", "    h = h * (1 + 0.01 * k)"],
        ["h = sum(part * 0.5 for part in (h, h.flip(0)))"],
        ["h = h + torch.arange(h.shape[1]).view(-1, *[1] * (h.dim() - 2)).to(h) / 10"],
        ["h = h + torch.zeros_like(h).add_(0.1)"],
        ["h = h * torch.linspace(0.9, 1.1, h.shape[-1], dtype=h.dtype)"],
        ["h = h * h.new_ones(1) * 0.9"],
        ["if self.flag > 0:", "    h = h * 0.7"],
        ["if bool(self.flag):", "    h = h * 0.7"],
        ["h = h * self.flag.item()"],
        ["h = h * self.flag"],
        ["h, side = self.tupled(h)", "h = h + side"],
        ["pair = self.tupled(h)", "h = pair.main - pair.side"],
        ["parts = {'a': h, 'b': h * 2}", "h = parts['a'] + parts['b'].tanh()"],
        ["try:", "    h = h * self.missing_", "except AttributeError:", "    h = h * 0.85"],
        ["h = (lambda v: v * 0.95)(h)"],
        ["x_ = x if x.dim() == h.dim() else x.flatten(1)", "h = h + x_.mean()"],
        ["h = h * gain"],
        ["if bias is not None:", "    h = h + bias"],
        ["h = h * len(self.listed)", "for m in self.listed:", "    h = m(h)"],
        ["for i, m in enumerate(self.listed):", "    h = m(h) if i % 2 == 0 else m(h) * 0.9"],
        ["for m in reversed(self.listed):", "    h = m(h) + h"],
        ["for name, m in self.named_acts.items():", "    h = m(h) if name != 'skipped' else h"],
        [f"h = self.named_acts['{act}'](h)"],
        ["h = h * self.plain_tensor"],
        ["h = h + self.offset"],
        ["self.seen = h.shape[0]"],
        ["h = self.helper(h, *[0.1, 0.2])"],
        ["h = torch.where(h > 0, h, 0.2 * h)"],
        ["if h.requires_grad:", "    h = h * 1.0"],
        ["if h.is_contiguous():", "    h = h * 1.1"],
        ["if not (h.detach() > 1e6).any():", "    h = h * 0.9"],
        ["h = F.dropout(h, 0.5, training=False)"],
        ["h = h * float(h.shape[0] > 1)"],
        ["while h.dim() < 2:", "    h = h.unsqueeze(0)"],
    ]
    lines = list(w.rng.choice(choices))
    text = "\n".join(lines)
    if "gain" in text and "h * gain" in text and "gain=" not in w.arguments:
        w.arguments += ", gain=1.1"
    if "bias is not None" in text and "bias=" not in w.arguments:
        w.arguments += ", bias=None"
    w.forward += lines
    needed = {
        "self.config": f"self.config = Config(act={act!r})",
        "self.config_act": f"self.config_act = {w.pick('tanh', 'relu', 'sigmoid')!r}",
        "self.apply_": "self.apply_ = leaky(0.2)",
        "self.partial": "self.partial = functools.partial(F.leaky_relu, negative_slope=0.3)",
        "self.flag": "self.register_buffer('flag', torch.tensor(0.9))",
        "self.tupled": "self.tupled = Tupled()",
        "self.listed": "self.listed = nn.ModuleList([nn.Tanh(), "
        f"{'nn.Identity()' if c == 1 else f'Scaled({c})'}, nn.ReLU()])",
        "self.named_acts": "self.named_acts = nn.ModuleDict({'tanh': nn.Tanh(), 'relu': nn.ReLU(), 'gelu': nn.GELU()})",
        "self.plain_tensor": "self.plain_tensor = torch.tensor(0.9, dtype=torch.float64)",
        "self.offset": "self.offset = nn.Parameter(torch.tensor(0.1))",
    }
    for name, line in needed.items():
        if f"{name}" in text and line.split(" = ")[0] not in "\n".join(w.init) and name not in "\n".join(w.init):
            w.init.append(line)
    if scaled not in text:
        w.init.remove(f"{scaled} = Scaled({c})")


def dropout(w: Writer) -> None:
    """In evaluation mode, alone or with all of the network."""
    name = w.module("drop", w.pick("nn.Dropout(0.5)", "nn.Dropout(0.3, inplace=True)"))
    w.after.append(f"{name.replace('self', 'net', 1)}.eval()")
    w.line(f"h = {name}(h)")


def hook(w: Writer) -> None:
    """A layer with a hook, a parametrisation, or a forward of its own on the instance."""
    w.facts.add("hook")
    if w.images:
        name = w.convolution()
    else:
        name = w.module("fc", f"nn.Linear({w.channels}, 4)")
        w.shape = (4,)
    w.line(f"h = {name}(h)")
    net = name.replace("self", "net", 1)
    w.after.append(
        w.pick(
            f"{net}.register_forward_hook(lambda module, args, result: result * 0.5)",
            f"{net}.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))",
            f"torch.nn.utils.parametrizations.weight_norm({net})",
            f"{net}.weight.register_hook(lambda g: g * 0.5)",
            f"{net}.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 0.7, {net})",
        )
    )


def saved(w: Writer) -> None:
    """A value kept for later, or one that comes back."""
    fits = [name for name, shape in w.saved if shape == w.shape]
    if fits and w.rng.random() < 0.7:
        w.line(f"h = h {w.pick('+', '-')} {w.rng.choice(fits)}")
    else:
        w.saved.append((f"kept{w.at}", w.shape))
        w.line(f"kept{w.at} = h")


PIECES: dict[Piece, int] = {
    layer: 8, block: 5, residual: 4, dense: 2, in_place: 3, view: 3, question: 6, dropout: 1, hook: 1, saved: 2,
}  # fmt: skip


def stacked(w: Writer) -> None:
    """A layer and what often follows it, all of them modules in a row."""
    if w.images and w.rng.random() < 0.2:
        size, pool = w.pick(1, 2, 3), 2 if min(w.shape[1:]) > 1 and w.rng.random() < 0.5 else 1
        w.forward.append(
            w.module("block", f"lk.ConvBlock({w.channels}, {size}, pool={pool}, affine={w.pick(True, False)})")
        )
        w.shape = (size, *(n // pool for n in w.shape[1:]))
        return
    if w.images:
        row = [w.convolution()]
    else:
        size = w.pick(2, 3, 8)
        row, w.shape = [w.known("nn.Linear", f"{w.channels}, {size}")], (size,)
    if w.rng.random() < 0.7:
        row.append(w.norm())
    if w.rng.random() < 0.8:
        acts = (
            "nn.ReLU()",
            "nn.ReLU()",
            "nn.ReLU(inplace=True)",
            "nn.Tanh()",
            "nn.GELU()",
            "nn.LeakyReLU(0.1, inplace=True)",
        )
        row.append(w.module("act", w.pick(*acts)))
    if w.images and min(w.shape[1:]) > 1 and w.rng.random() < 0.5:
        row.append(w.module("pool", w.pick("nn.MaxPool2d(2)", "nn.MaxPool2d(2)", "nn.AvgPool2d(2)")))
        w.shape = (w.channels, *(n // 2 for n in w.shape[1:]))
    if w.rng.random() < 0.2:
        row.append(w.module("more", w.pick("nn.Identity()", "nn.Dropout(0.5)")))
        w.after += ["for m in net.modules():", "    m.train(m.training and not isinstance(m, nn.Dropout))"]
    w.forward += [f"nn.Sequential({', '.join(row)})"] if w.rng.random() < 0.3 else row


def network(seed: int, without: Collection[int] = ()) -> Network:
    """The network of a seed, without some of its pieces."""
    rng = random.Random(f"network {seed}")
    training, tree = rng.random() < 0.6, rng.random() < 0.25
    flat = rng.random() < 0.2
    shape = (
        (rng.choice([2, 3, 5]),)
        if flat
        else (rng.choice([1, 2, 3]), rng.choice([3, 4, 5, 7]), rng.choice([1, 3, 4, 6, 7]))
    )
    count, ways = rng.choice([1, 2, 2, 3, 3, 4, 5, 6]), rng.choice([2, 3])
    w = Writer(shape)
    w.training = training
    kinds = {stacked: 1} if tree else PIECES
    for at in range(count):
        w.at, w.rng = at, random.Random(f"{seed}/{at}")
        if at in without:
            continue
        w.rng.choices(list(kinds), list(kinds.values()))[0](w)
    w.at, w.rng = count, random.Random(f"{seed}/head")
    if w.images:
        c, height, width = w.shape
        size = c * height * width
        wide = ["h = h.flatten(1)", "h = torch.flatten(h, 1)", "h = h.reshape(h.shape[0], -1)",
                "h = h.flatten(start_dim=1)",
                "h = h.reshape(h.size(0), -1)"]  # fmt: skip
        average = [
            "h = h.mean((2, 3))",
            "h = F.adaptive_avg_pool2d(h, 1).flatten(1)",
            "h = h.amax((2, 3))",
            "h = h.sum(dim=[-1, -2])",
        ]
        flatten = tree or (rng.random() < 0.6 and size <= 200)
        w.line("nn.Flatten()" if tree else w.rng.choice(wide if flatten else average))
        w.shape = (size if flatten else c,)
    head = w.module("head", f"nn.Linear({w.channels}, {ways})")
    if tree:
        w.line(head)
    else:
        w.forward += w.pick([f"return {head}(h)"], [f"h = {head}(h)", "return h"])
    source = _tree(w, seed) if tree else _class(w, seed)
    return Network(source, shape, ways, count, training, f"fuzz_network_{seed}", w.facts, seed % 3 == 0)


def _class(w: Writer, seed: int) -> str:
    init = "".join(f"        {line}\n" for line in w.init)
    forward = "".join(f"        {line}\n" for line in w.forward)
    helper = "    def helper(self, h, *terms):\n        for t in terms:\n            h = h + t\n        return h\n"
    body = f"class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n{init}"
    body += helper if "self.helper" in forward else ""
    body += f"    def forward(self, {w.arguments}):\n        h = x\n{forward}"
    return _program(body, "Net()", w, seed)


def _tree(w: Writer, seed: int) -> str:
    init = "".join(f"    {line}\n" for line in w.init)
    row = "".join(f"        {item},\n" for item in w.forward)
    body = f"def build():\n    self = types.SimpleNamespace()\n{init}    return nn.Sequential(\n{row}    )\n"
    return _program(body, "build()", w, seed)


def _program(body: str, made: str, w: Writer, seed: int) -> str:
    after = "".join(f"    {line}\n" for line in w.after)
    return (
        f"# network {seed}, inputs {list(w.shape)}{HEADER}\nimport lambda_kernels as lk\n\n\n{body}\n\ndef make():\n"
        f"    torch.manual_seed({seed})\n    net = {made}.double()\n    with torch.no_grad():\n"
        "        for p in net.parameters():\n            if p.dim() < 2:\n"
        "                p.add_(0.2 * torch.randn_like(p))\n"
        "        for name, b in net.named_buffers():\n            if name.endswith('running_mean'):\n"
        "                b.normal_(0.0, 0.3)\n            if name.endswith('running_var'):\n"
        "                b.uniform_(0.5, 1.5)\n"
        f"    net.train({w.training})\n{after}    return net\n"
    )
