"""What the Triton backend launches for a four-block network, recorded from its calls and specialised by triton itself.

Nothing runs: a driver without a device stands where triton looks for a GPU. Not to be used with TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

# What an int argument may be: a constant, of 32 bits, known as a multiple of 16, of 64 bits.
ONE, ODD, SIXTEENS, LARGE = 1, 17, 32, 2**31 + 1


class Call(NamedTuple):
    """A launch as the backend asks for it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, int]


class Launch(NamedTuple):
    """A kernel by its module and name, with what triton.jit makes of the arguments: it compiles each of these once."""

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    def constant(self, name: str) -> Any:
        """The value of a constant; None where the kernel has none of that name."""
        return self.constants.get((list(self.signature).index(name),)) if name in self.signature else None


class NoDevice:
    """Triton's driver for a GPU that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def specialised(call: Call) -> Launch:
    """The launch as triton.jit compiles it: ones are constants, multiples of 16 and aligned pointers known as such."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found = []

    def instead(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, *_: Any
    ):
        found.append((signature, constants, {place: value for place, value in attributes.items() if value}))

    driver.set_active(NoDevice())
    with mock.patch.object(JITFunction, "_do_compile", instead):
        call.kernel.run(*call.arguments, grid=(1,), warmup=True, enable_fp_fusion=True, **call.options)
    name = call.kernel.fn.__name__
    return Launch(call.kernel.fn.__module__.rpartition(".")[2], name, *found[0], call.options)


class Recorded(NamedTuple):
    """What was launched, each specialisation once, and the keys and how many tiles were timed for each of them."""

    calls: list[Call]
    tiles: dict[Any, int]


@contextmanager
def recording(dtype: str, every_tile: bool) -> Iterator[Recorded]:
    """The backend's launches are kept, not run; without `every_tile` with the first tile of each product.

    `dtype`: torch's name, or tf32.
    """
    from lambda_kernels.backends.triton import head as heads
    from lambda_kernels.backends.triton import launch, loss, norm, products, update

    found: list[Launch] = []
    recorded = Recorded([], {})

    def keep(kernel: Any, programs: int, where: torch.Tensor, *arguments: Any, **options: int) -> None:
        call = Call(kernel, arguments, options)
        one = specialised(call)
        if one not in found:
            found.append(one)
            recorded.calls.append(call)

    def tile(self: Any, key: Any, tiles: Any, where: Any, run: Any) -> Any:
        key = (self.kernel.fn.__name__, *key)
        if key not in recorded.tiles:
            recorded.tiles[key] = len(tiles)
            for one in tiles if every_tile else tiles[:1]:
                run(one)
        return tiles[0]

    def arithmetic(operand: torch.Tensor, kind: str) -> tuple[str, bool, Any]:
        import triton.language as tl

        return "tf32" if dtype == "tf32" else "ieee", False, tl.float64 if dtype == "float64" else tl.float32

    with (
        mock.patch.object(launch.Tuner, "tile", tile),
        mock.patch.object(products, "_arithmetic", arithmetic),
        mock.patch.object(products, "launch", keep),
        mock.patch.object(norm, "launch", keep),
        mock.patch.object(heads, "launch", keep),
        mock.patch.object(loss, "launch", keep),
        mock.patch.object(update, "launch", keep),
    ):
        yield recorded


def calls(dtype: str, every_tile: bool, rare: bool = False) -> list[Call]:
    """What the backend launches for first and inner blocks, a head and their gradients.

    `rare`: convolutions with bias and with strides too, whose kernels differ from the others by their constants alone.
    """
    from lambda_kernels.backends.triton import head as heads
    from lambda_kernels.backends.triton import loss, norm, products, update
    from lambda_kernels.spec import ConvSpec

    kind = getattr(torch, {"tf32": "float32"}.get(dtype, dtype))
    spec, strided = ConvSpec((1, 1), (1, 1), (1, 1), 1), ConvSpec((2, 2), (1, 1), (1, 1), 1)
    tasks, images, width, size, ways = 4, 25, 64, 20, 5
    with recording(dtype, every_tile) as recorded:
        gamma = torch.empty(tasks, width, dtype=kind)
        for channels in (3, width):
            x = torch.empty(tasks, images, size, size, channels, dtype=kind).permute(0, 1, 4, 2, 3)
            weight = torch.empty(tasks, width, channels, 3, 3, dtype=kind)
            z, y, index, mean, rstd = norm.conv_block(x, weight, gamma, gamma, spec, 1e-5, 2)
            norm.block(x, weight, gamma, gamma, spec, 1e-5, 2)
            products.conv2d_weight_grad(z, x, weight.shape, spec)
            if channels == 3 and rare:
                products.conv2d(x, weight[:1], gamma[:1], spec)
                products.conv2d_input_grad(z[..., :10, :10], weight, x.shape, strided)
        products.conv2d_input_grad(z, weight, x.shape, spec)
        norm.norm_relu_pool(z, gamma, gamma, 1e-5, 2)  # of so many pixels that their moments are merged in groups
        norm.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, 2, True)
        features = y.flatten(2)
        head = torch.empty(tasks, ways, features.shape[2], dtype=kind)
        g = products.linear(features, head, gamma[:, :ways])
        products.linear(features, head[:1], None)  # of all tasks' images at a time
        products.linear(g.mT, features.mT, None)
        products.linear(g, head.mT, None)
        update.sgd_([gamma, head], [gamma, head], [0.01, 0.02])
        labels = torch.zeros(tasks, images, dtype=torch.int64)
        loss.cross_entropy_grad(g, labels[:1])
        heads.head_grad(features, head, gamma[:, :ways], labels, (True, True, True))
        heads.head_grad(features[:1, :1, :1], head[:1, :1, :1], gamma[:1, :1], labels[:1, :1], (False, False, True))
    return recorded.calls


def adaptation(pattern: str, tasks: int) -> Recorded:
    """What the steps of one adaptation of conv4 launch, in TF32: 64 channels, 84x84, 25 images of 5 classes."""
    from lambda_kernels.backends.triton import Triton
    from lambda_kernels.spec import BlockSpec, ConvSpec

    block = BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2)
    shapes: list[tuple[int, ...]] = [
        shape for channels in (3, 64, 64, 64) for shape in ((64, channels, 3, 3), (64,), (64,))
    ]
    shapes += [(5, 64 * 25), (5,)]
    updated = [bit == "1" for bit, count in zip(pattern, (3, 3, 3, 3, 2)) for _ in range(count)]
    parameters = [torch.zeros(tasks if moves else 1, *shape) for moves, shape in zip(updated, shapes)]
    x, labels = torch.zeros(tasks, 25, 3, 84, 84), torch.zeros(tasks, 25, dtype=torch.int64)
    with recording("tf32", every_tile=True) as recorded:
        Triton().inner_loop(x, labels, parameters, updated, [block] * 4, 2, [0.01])  # the other steps repeat the second
    return recorded


def variants(call: Call, alone: bool) -> Iterator[tuple[str, Call]]:
    """The call with other ints: all of one kind; with `alone`, each as the only constant and the only int64."""
    kinds = {"one": ONE, "odd": ODD, "multiples of 16": SIXTEENS, "64 bits": LARGE}
    places = [place for place, _ in _ints(call)]
    for what, value in kinds.items():
        yield f"all {what}", _with_ints(call, dict.fromkeys(places, value), aligned=value == SIXTEENS)
    for place in places if alone else ():
        name = call.kernel.arg_names[place[0]] + "".join(f"[{i}]" for i in place[1:])
        for what in ("one", "64 bits"):
            ints = dict.fromkeys(places, ODD) | {place: kinds[what]}
            yield f"{name} {what}", _with_ints(call, ints, aligned=False)


def _ints(call: Call) -> Iterator[tuple[tuple[int, ...], int]]:
    """The ints that are no constants of the kernel, each with its place, also in a tuple."""
    for place, (parameter, value) in enumerate(zip(call.kernel.params, call.arguments, strict=True)):
        for path, one in (
            [((place, i), v) for i, v in enumerate(value)] if type(value) is tuple else [((place,), value)]
        ):
            if type(one) is int and not parameter.is_constexpr:
                yield path, one


def _with_ints(call: Call, ints: dict[tuple[int, ...], int], aligned: bool) -> Call:
    def changed(value: Any, place: tuple[int, ...]) -> Any:
        if type(value) is tuple:
            return tuple(changed(v, (*place, i)) for i, v in enumerate(value))
        if isinstance(value, torch.Tensor):
            return value.new_empty(17)[0 if aligned else 1 :]
        return ints.get(place, value)

    return call._replace(arguments=tuple(changed(value, (i,)) for i, value in enumerate(call.arguments)))
