"""Convolutions of 3x3 pixels by Winograd's algorithm: exactness, memory layouts, threads, every instruction set."""

from __future__ import annotations

import importlib
import os
import re
from itertools import product
from typing import Any

import pytest
import torch
from cases import EXACT, STEPS, layouts
from loops import conv4_groups, plain_loop, torch_conv4
from machine import fresh, on_threads
from torch import Tensor
from winograd_cases import (
    CASES,
    EPS,
    FROZEN,
    OPS,
    PADDINGS,
    SHARING,
    Case,
    check_convolution,
    check_frozen,
    frozen_operands,
    last,
    no_operator,
    operands,
    winograd,
)

from lambda_kernels.backends import native
from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec
from lambda_maml import adapt, models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
def test_as_torch(name: str) -> None:
    check_convolution(CASES[name])


@pytest.mark.parametrize("name", ["1x16to64-7x7-padding1x1", "2x32to5-6x9-padding1x1-tasks333"])
def test_memory_layouts_change_nothing(name: str) -> None:
    case = CASES[name]
    x, weight, gy = (t.float() for t in operands(case))
    want = winograd(case, (x, weight, gy))
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    for label, other in {**layouts(weight), "transposed": turned, "mirrored": weight.mT.contiguous().mT}.items():
        assert torch.equal(other, weight)
        for key, value in winograd(case, (x, other, gy)).items():
            assert torch.equal(value, want[key]), (label, key)
    for (label, images), gradient in zip(layouts(x).items(), layouts(gy).values()):
        for key, value in winograd(case, (images, weight, gradient)).items():
            assert torch.equal(value, want[key]), (label, key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    for name in ("1x48to48-33x47-padding1x1", "1x8to8-33x47-padding0x2", "75x16to64-7x7-padding1x1",
                 "1x32to5-21x21-padding2x2", "2x16to64-7x7-padding1x1-tasks313"):  # fmt: skip
        case, found = CASES[name], []
        given = [t.to(dtype) for t in operands(case)]
        for threads in (1, 2):
            with on_threads(threads):
                found.append(winograd(case, given))
        for key in found[0]:
            assert torch.equal(found[0][key], found[1][key]), (name, key)


def test_results_are_channels_last_and_whole_after_a_run_of_nan() -> None:
    """Scratch memory comes from an arena that earlier calls have written to."""
    for case in CASES.values():
        if max(case.size) > 21 or max(case.inputs, case.outputs) > 64:
            continue
        given = [t.float() for t in operands(case)]
        want = winograd(case, given)
        assert all(want[key].permute(0, 1, 3, 4, 2).is_contiguous() for key in ("y", "gx"))
        winograd(case, [torch.full_like(t, torch.nan) for t in given])
        for key, value in winograd(case, given).items():
            assert torch.equal(value, want[key]), (case.name, key)


def test_tracing_sees_the_shapes_and_the_memory_layout() -> None:
    tests = ("test_schema", "test_faketensor")
    case = CASES["2x32to5-6x9-padding1x1-tasks333"]
    for tasks in SHARING:
        x, weight, gy = operands(case._replace(tasks=tasks))
        torch.library.opcheck(OPS.winograd.default, (x, weight, case.padding), test_utils=tests)
        sized = (gy, weight, list(x.shape), case.padding)
        torch.library.opcheck(OPS.winograd_input_grad.default, sized, test_utils=tests)
        sized = (gy, x, list(weight.shape), case.padding)
        torch.library.opcheck(OPS.winograd_weight_grad.default, sized, test_utils=tests)
    for frozen in (FROZEN["33x47"], FROZEN["rgb-48"], FROZEN["stride"], FROZEN["dilation-pair"]):
        geometry = native._geometry(BlockSpec(frozen.spec, EPS, frozen.pool))
        given = frozen_operands(frozen, torch.float32, 2, shared=True)
        torch.library.opcheck(OPS.frozen_block.default, (*given, geometry, EPS), test_utils=tests)


def takes(x: Tensor, weight: Tensor, spec: ConvSpec, pool: int) -> bool:
    """Whether the frozen block has a kernel: an error says that it has none, any other error is one."""
    ones = x.new_ones(1, weight.shape[1])
    try:
        OPS.frozen_block(x, weight, ones, ones, native._geometry(BlockSpec(spec, EPS, pool)), EPS)
    except RuntimeError as error:
        assert "no kernel for a weight" in str(error), error
        return False
    return True


def test_the_rule_is_the_same_in_python_and_in_the_kernels() -> None:
    agreed = set()
    channels = ((1, 8), (3, 16), (4, 4), (7, 64), (8, 8), (8, 64), (8, 128), (15, 80), (16, 16), (16, 63), (16, 64),
                (31, 33), (32, 32), (33, 31), (64, 15), (100, 8))  # fmt: skip
    kernels = ((3, 3), (1, 1), (5, 5), (3, 2))
    constants = [ConvSpec((1, 1), padding, (1, 1), 1) for padding in (*PADDINGS, (3, 1))]
    constants += [ConvSpec((2, 1), (1, 1), (1, 1), 1), ConvSpec((1, 1), (1, 1), (1, 2), 1)]
    sizes = ((1, 2, 2), (1, 3, 3), (1, 7, 7), (1, 1, 9), (1, 32, 32), (1, 33, 33), (4, 16, 16), (5, 16, 16))
    for (inputs, outputs), kernel, spec, (images, *size), pool in product(channels, kernels, constants, sizes, (1, 2)):
        reach = [spec.dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
        if (kernel != (3, 3) and spec != constants[1]) or outputs * inputs * images * size[0] * size[1] > 2**18:
            continue
        if any((size[a] + 2 * spec.padding[a] - reach[a]) // spec.stride[a] + 1 < pool for a in (0, 1)):
            continue
        x, weight = torch.zeros(1, images, inputs, *size), torch.zeros(1, outputs, inputs, *kernel)
        filters = pool == 2 and native._filters(x.shape, weight.shape, spec, x.dtype)
        expected = filters or not Native().image_refusals(x, weight, BlockSpec(spec, 1e-5, pool))
        assert takes(x, weight, spec, pool) == expected, (inputs, outputs, kernel, spec, images, size, pool)
        agreed.add((filters, expected))
    assert agreed == {(True, True), (False, True), (False, False)}


REFUSED = {
    "few-channels": ((2, 8, 33, 33), (16, 8, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 1)),
    "stride": ((2, 32, 9, 9), (32, 32, 3, 3), ConvSpec((2, 2), (1, 1), (1, 1), 1)),
    "dilation": ((2, 32, 9, 9), (32, 32, 3, 3), ConvSpec((1, 1), (2, 2), (2, 2), 1)),
    "groups": ((2, 64, 9, 9), (64, 32, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 2)),
    "kernel": ((2, 32, 9, 9), (32, 32, 5, 5), ConvSpec((1, 1), (2, 2), (1, 1), 1)),
    "padding": ((2, 32, 9, 9), (32, 32, 3, 3), ConvSpec((1, 1), (3, 3), (1, 1), 1)),
    "one-row": ((2, 32, 1, 5), (32, 32, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 1)),
    "no-images": ((0, 32, 9, 9), (32, 32, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 1)),
}
FILTERS = ("winograd", "winograd_input_grad", "winograd_weight_grad", "frozen_block")


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_atens(name: str) -> None:
    sizes, kernel, spec = REFUSED[name]
    x, weight = torch.randn(1, *sizes, dtype=torch.float64), torch.randn(1, *kernel, dtype=torch.float64)
    x = last(x)
    bias, gamma, beta = (torch.randn(1, kernel[0], dtype=torch.float64) for _ in range(3))
    y = Reference().conv2d(x, weight, bias, spec)
    gy = last(torch.randn_like(y))
    pooled = bool(x.numel()) and min(y.shape[-2:]) >= 2
    with no_operator(*FILTERS):
        have = Native().conv2d(x, weight, bias, spec)
        gx = Native().conv2d_input_grad(gy, weight, x.shape, spec)
        gw = Native().conv2d_weight_grad(gy, x, weight.shape, spec)
        blocks = Native().block(x, weight, gamma, beta, BlockSpec(spec, EPS, 2)) if pooled else ()
    torch.testing.assert_close(have, y, **EXACT)
    torch.testing.assert_close(gx, Reference().conv2d_input_grad(gy, weight, x.shape, spec), **EXACT)
    torch.testing.assert_close(gw, Reference().conv2d_weight_grad(gy, x, weight.shape, spec), **EXACT)
    if pooled:
        for value, want in zip(blocks, Reference().block(x, weight, gamma, beta, BlockSpec(spec, EPS, 2))):
            torch.testing.assert_close(value, want, **EXACT)


def test_half_precision_and_images_that_are_not_channels_last_are_atens() -> None:
    case = CASES["1x48to48-21x21-padding1x1"]
    x, weight, gy = operands(case)
    with no_operator(*FILTERS):
        Native().conv2d(x, weight, None, case.spec)
        Native().conv2d_input_grad(gy, weight, x.shape, case.spec)
        Native().conv2d_weight_grad(gy, x, weight.shape, case.spec)
        Native().conv2d(last(x).bfloat16(), weight.bfloat16(), None, case.spec)


@pytest.mark.parametrize("tasks", SHARING)
def test_the_backend_takes_them_for_channels_last_images(tasks: tuple[int, int, int]) -> None:
    case = Case(32, 48, (6, 9), (1, 1), images=2, tasks=tasks)
    x, weight, gy = operands(case)
    bias = torch.randn(tasks[1], 48, dtype=torch.float64)
    want = (
        Reference().conv2d(x, weight, bias, case.spec),
        Reference().conv2d_input_grad(gy, weight, x.shape, case.spec),
        Reference().conv2d_weight_grad(gy, x, weight.shape, case.spec),
    )
    with no_operator("convolution", "convolution_backward"):
        have = (
            Native().conv2d(last(x), weight, bias, case.spec),
            Native().conv2d_input_grad(last(gy), weight, x.shape, case.spec),
            Native().conv2d_weight_grad(last(gy), last(x), weight.shape, case.spec),
        )
    for value, truth in zip(have, want):
        torch.testing.assert_close(value, truth, **EXACT)


# Each is run in a process of its own by its place: some have killed the process.
IMAGE, KERNEL, RESULT, VECTOR = (1, 2, 16, 7, 7), (1, 64, 16, 3, 3), (1, 2, 64, 7, 7), (1, 64)
SIX, TWO, THREE, FIFTEEN = (1, 2, 64, 6, 7), (2, *IMAGE[1:]), (3, *KERNEL[1:]), (1, 64, 15, 3, 3)
ONE, NONE = [1, 1, 1, 1, 1, 1, 2], [1, 1, 0, 0, 1, 1, 2]
WRONG: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "channels": ("winograd", (IMAGE, FIFTEEN, [1, 1]), r"\[64, 15, 3, 3\].*\[2, 16, 7, 7\]"),
    "kernel": ("winograd", (IMAGE, (1, 64, 16, 5, 5), [1, 1]), r"weight must be .*3, 3\].*\[1, 64, 16, 5, 5\]"),
    "dimensions": ("winograd", (IMAGE, KERNEL[1:], [1, 1]), r"weight must be \[1 or .*\[64, 16, 3, 3\]"),
    "one padding": ("winograd", (IMAGE, KERNEL, [1]), r"padding must be 2 numbers, got 1"),
    "no row": ("winograd", ((1, 2, 16, 2, 2), KERNEL, [0, 0]), r"\[2, 16, 2, 2\].*\[64, 16, 3, 3\]"),
    "no image": ("winograd", ((1, 0, 16, 7, 7), KERNEL, [1, 1]), r"\[1, 0, 16, 7, 7\]"),
    "tasks": ("winograd", (TWO, THREE, [1, 1]), r"x must be \[1 or 3, .*\[2, 2, 16, 7, 7\]"),
    "input: rows": ("winograd_input_grad", (SIX, KERNEL, IMAGE, [1, 1]), r"\[1, 2, 64, 6, 7\]"),
    "input: outputs": ("winograd_input_grad", ((1, 2, 63, 7, 7), KERNEL, IMAGE, [1, 1]), r"\[1, 2, 63, 7, 7\]"),
    "input: images": ("winograd_input_grad", ((1, 1, 64, 7, 7), KERNEL, IMAGE, [1, 1]), r"\[1, 1, 64, 7, 7\]"),
    "input: channels": ("winograd_input_grad", (RESULT, KERNEL, (1, 2, 15, 7, 7), [1, 1]), r"3\].*\[2, 15, 7, 7\]"),
    "weight: rows": ("winograd_weight_grad", (SIX, IMAGE, KERNEL, [1, 1]), r"\[1, 2, 64, 6, 7\]"),
    "weight: outputs": ("winograd_weight_grad", ((1, 2, 63, 7, 7), IMAGE, KERNEL, [1, 1]), r"\[1, 2, 63, 7, 7\]"),
    "weight: images": ("winograd_weight_grad", ((1, 1, 64, 7, 7), IMAGE, KERNEL, [1, 1]), r"\[1, 1, 64, 7, 7\]"),
    "weight: tasks": ("winograd_weight_grad", ((3, *RESULT[1:]), TWO, KERNEL, [1, 1]), r"\[(3, 2, 64|2, 2, 16), 7,"),
    "block: channels": ("frozen_block", (IMAGE, FIFTEEN, VECTOR, VECTOR, ONE), r"\[64, 15, 3, 3\].*\[2, 16, 7"),
    "block: numbers": ("frozen_block", (IMAGE, KERNEL, VECTOR, VECTOR, ONE[:6]), r"geometry must be 7 numbers, got 6"),
    "block: no image": ("frozen_block", ((1, 0, 16, 7, 7), KERNEL, VECTOR, VECTOR, ONE), r"\[1, 0, 16, 7, 7\]"),
    "block: gamma": ("frozen_block", (IMAGE, KERNEL, (1, 63), VECTOR, ONE), r"\[1, 63\]"),
    "block: beta": ("frozen_block", (IMAGE, KERNEL, VECTOR, (1, 65), ONE), r"\[1, 65\]"),
    "block: beta without a task axis": ("frozen_block", (IMAGE, KERNEL, VECTOR, (64,), ONE), r"\[64\]"),
    "block: tasks": ("frozen_block", (TWO, THREE, VECTOR, VECTOR, ONE), r"x must be \[1 or 3, .*\[2, 2, 16,"),
    "block: tasks of gamma": ("frozen_block", ((3, *IMAGE[1:]), KERNEL, (2, 64), VECTOR, ONE), r"\[2, 64\]"),
    "block: no row": ("frozen_block", ((1, 2, 1, 2, 2), (1, 8, 1, 3, 3), (1, 8), (1, 8), NONE),
                      r"\[2, 1, 2, 2\].*\[8, 1, 3, 3\]"),
    "block: no kernel": ("frozen_block", (IMAGE, KERNEL, VECTOR, VECTOR, [*ONE[:6], 3]), r"\[1, 64, 16, 3, 3\].* 3"),
}  # fmt: skip


def attempt(name: str) -> None:
    """Prints the error that a call with these sizes gives."""
    operator, shapes, _ = WRONG[name]
    arguments = [torch.zeros(s) if isinstance(s, tuple) else s for s in shapes]
    if operator in ("winograd_input_grad", "winograd_weight_grad"):
        arguments[2] = list(shapes[2])
    if operator == "frozen_block":
        arguments.append(EPS)
    try:
        getattr(OPS, operator)(*arguments)
    except (RuntimeError, IndexError) as error:
        print(str(error).replace("\n", " "))


ATTEMPTS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_winograd as t
for name in t.WRONG:
    if not (child := os.fork()):
        print(name, end="\\t", flush=True)
        t.attempt(name)
        sys.stdout.flush()
        os._exit(0)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print("ended by signal", -code, flush=True)
    else:
        print(flush=True)
"""
HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    printed = fresh(ATTEMPTS, HERE, OMP_NUM_THREADS="1")  # a process with more of them must not be forked
    lines = (line.split("\t") for line in printed.splitlines() if "\t" in line)
    return {name: text for name, text in lines}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sizes_are_errors_that_name_them(name: str, errors: dict[str, str]) -> None:
    assert re.search(WRONG[name][2], errors[name]), errors[name] or "no error"


def check_adaptation() -> None:
    """A network whose blocks go through the first block's kernel, Winograd's, and the few pixels' path."""
    network = torch_conv4(3, 2, 32, 21)
    model = models.conv4(3, 2, 32, 21).double()
    model.load_state_dict(network.state_dict())
    generator = torch.Generator().manual_seed(1)
    xs, xq = (torch.randn(n, 2, 21, 21, generator=generator, dtype=torch.float64) for n in (6, 4))
    ys, yq = torch.arange(6) % 3, torch.arange(4) % 3
    for pattern in ("11111", "00011"):
        want = plain_loop(network, conv4_groups(), pattern, xs, ys, xq, yq, steps=3, lr=0.1)
        adapted = adapt(model, xs, ys, pattern=pattern, steps=3, lr=0.1)
        with torch.no_grad():
            torch.testing.assert_close(adapted(xq), want.logits, **STEPS)
        for name, value in adapted.parameters_dict().items():
            torch.testing.assert_close(value.detach(), want.parameters[name], **STEPS)


def check_instruction_set() -> None:
    torch.set_num_threads(1)
    names = ("1x8to8-7x7-padding0x0", "1x16to64-33x47-padding1x1", "1x32to5-1x9-padding2x2", "1x48to48-2x2-padding1x1",
             "1x100to100-7x7-padding1x1", "75x32to5-2x2-padding1x1", "2x16to64-7x7-padding1x1-tasks133")  # fmt: skip
    for name in names:
        check_convolution(CASES[name])
    for name in FROZEN:
        check_frozen(FROZEN[name], 2, shared=False)
    check_adaptation()
    print(importlib.import_module("lambda_kernels._C").isa())


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_is_exact(isa: str) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_winograd as t; t.check_instruction_set()"
    assert fresh(program, HERE, LAMBDA_KERNELS_ISA=isa, OMP_NUM_THREADS="1").strip() == isa
