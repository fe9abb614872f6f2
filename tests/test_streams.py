"""On a GPU: work goes to the current stream of the tensors' device, and a recording's memory is its own.

A stream is stalled, the real operands are written behind the stall, and the operation runs there: a launch on another
stream, or on another device's, reads the zeros that stood there before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import all_close, close
from test_recorded import CONV4, conv4, tasks
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import backends, cuda_graph
from lambda_kernels.backends.autotune import Autotune
from lambda_kernels.backends.clock import cuda_clock
from lambda_kernels.backends.table import Table
from lambda_kernels.spec import BlockSpec, ConvSpec
from lambda_maml import adapt, adapt_tasks
from lambda_maml.inner import recorded

pytestmark = pytest.mark.gpu
STALL = 100_000_000  # cycles, about 50 ms
BLOCKS = [BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2)] * 2
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = ["cuda:0", pytest.param("cuda:1", marks=two_devices)]
Operation = Callable[..., list[Tensor]]


def inner_loop(backend: Any, x: Tensor, labels: Tensor, *parameters: Tensor) -> list[Tensor]:
    found = backend.inner_loop(x, labels, list(parameters), [True] * len(parameters), BLOCKS, 2, [0.1])
    return [found.rows, *found.updated]


def block(backend: Any, x: Tensor, labels: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, *_: Tensor) -> Any:
    z, y, index, mean, rstd = backend.conv_block(x, weight, gamma, beta, BLOCKS[0])
    dz, dgamma, dbeta = backend.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, BLOCKS[0], True)
    spec = BLOCKS[0].conv
    gw = backend.conv2d_weight_grad(dz, x, weight.shape, spec)
    gx = backend.conv2d_input_grad(dz, weight, x.shape, spec)
    return [y, dgamma, dbeta, gw, gx, *backend.block(x, weight, gamma, beta, BLOCKS[0])]


def first_block(backend: Any, x: Tensor, labels: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, *_: Any) -> Any:
    if why := backend.image_refusals(x, weight, BLOCKS[0]):
        pytest.skip("; ".join(why))
    moments = backend.image_moments(x, (3, 3), BLOCKS[0].conv)
    y, index, mean, rstd = backend.image_block(x, weight, gamma, beta, moments, BLOCKS[0])
    return [y, *backend.image_block_grad(y, x, weight, gamma, index, mean, rstd, moments, BLOCKS[0])]


def head(backend: Any, x: Tensor, labels: Tensor, *parameters: Tensor) -> list[Tensor]:
    weight, bias = parameters[-2:]
    logits = backend.linear(x.flatten(2)[..., : weight.shape[-1]], weight, bias)
    own = [weight.clone()]
    backend.sgd_(own, [weight * 2], [0.25])
    return [logits, *backend.cross_entropy_grad(logits, labels), *own]


OPERATIONS: dict[str, Operation] = {"loop": inner_loop, "block": block, "first block": first_block, "head": head}


def drawn(device: str) -> list[Tensor]:
    """x, labels and the parameters of two blocks and a head, for two tasks."""
    shapes = [(6, 3, 3, 3), (6,), (6,), (6, 6, 3, 3), (6,), (6,), (3, 24), (3,)]
    parameters = [torch.randn(2, *shape) / 4 for shape in shapes]
    given = [torch.randn(2, 6, 3, 9, 8), torch.arange(3).repeat(2, 2), *parameters]
    return [t.to(device, torch.float64 if t.is_floating_point() else None) for t in given]


def backend_of(name: str) -> Any:
    """A backend; "auto" as of a first call, with nothing measured."""
    if name == "auto":
        usable = [b for b in backends._candidates(torch.device("cuda")) if not b.reasons()]
        tables: dict[torch.device, Table] = {}
        return Autotune(usable, lambda device: tables.setdefault(device, Table(None)))
    if why := backends.reasons(name):
        pytest.skip("; ".join(why))
    return backends._BACKENDS[name]


def written_late(device: str, operands: Sequence[Tensor]) -> list[Tensor]:
    """The operands, zero until the device's current stream comes past a stall."""
    late = [torch.zeros_like(t) for t in operands]
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        torch.cuda._sleep(STALL)
        for mine, real in zip(late, operands):
            mine.copy_(real)
    return late


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["cuda", "triton", "reference", "auto"])
def test_operations_run_on_the_current_stream(name: str, operation: str, device: str) -> None:
    backend, run, operands = backend_of(name), OPERATIONS[operation], drawn(device)
    want = run(backend, *operands)  # kernels are compiled and tiles measured, which would wait for the stall
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        got = run(backend, *written_late(device, operands))
    torch.cuda.synchronize(device)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)  # float64


@two_devices
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["cuda", "triton", "reference", "auto"])
def test_operations_run_on_the_tensors_device(name: str, operation: str) -> None:
    backend, run, operands = backend_of(name), OPERATIONS[operation], drawn("cuda:1")
    with torch.cuda.device(0):
        got = run(backend, *operands)  # the first one, which measures
        late = run(backend, *written_late("cuda:1", operands))
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        want = run(backend, *operands)
    assert all(t.device == torch.device("cuda:1") for t in got)
    torch.testing.assert_close([got, late], [want, want], rtol=1e-10, atol=1e-10)  # float64


def plain(device: str) -> tuple[Tensor, ...]:
    return tasks(CONV4, range(2), device)


@pytest.mark.parametrize("device", DEVICES)
def test_adaptations_run_on_the_current_stream_of_their_device(device: str) -> None:
    recorded.RECORDINGS.clear()
    model = conv4(device)
    given: dict[str, Any] = {"pattern": "11111", "steps": 3, "lr": 0.1}
    xs, ys, xq, _ = plain(device)
    with torch.no_grad(), lk.use_backend("reference"):
        want = adapt(model, xs[0], ys[0], **given).parameters_dict()
        logits = adapt_tasks(model, xs, ys, xq, **given)
    side = torch.cuda.Stream(device)
    for inside in (True, False):  # with this device current, and with the first one
        for _ in range(3):  # eager, recorded, replayed
            with torch.no_grad(), torch.cuda.stream(side if inside else None):
                late = written_late(device, [xs, ys, xq])
                got = adapt(model, late[0][0], late[1][0], **given).parameters_dict()
                late = written_late(device, [xs, ys, xq])
                found = adapt_tasks(model, *late, **given)
            torch.cuda.synchronize(device)
            all_close(got, want, device)
            close(found, logits, "logits")


@two_devices
def test_two_devices_at_once() -> None:
    recorded.RECORDINGS.clear()
    given: dict[str, Any] = {"pattern": "00011", "steps": 3, "lr": 0.1}
    xs, ys, _, _ = plain("cpu")
    want = [adapt(conv4("cpu"), xs[i], ys[i], **given).parameters_dict() for i in range(2)]
    failures: list[BaseException] = []

    def adapts(device: str) -> None:
        try:
            model = conv4(device)
            for turn in range(8):
                i = turn % 2
                got = adapt(model, xs[i].to(device), ys[i].to(device), **given).parameters_dict()
                all_close({n: t.cpu() for n, t in got.items()}, want[i], device)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=adapts, args=(device,)) for device in ("cuda:0", "cuda:1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# Recordings.


def chain_of_products(x: Tensor) -> tuple[Tensor, ...]:
    return ((x @ x).relu() @ x, x.sum(0))


def square(size: int = 256) -> Tensor:
    return torch.randn(size, size, device="cuda") / size**0.5


def test_two_streams_take_turns_in_one_recording() -> None:
    recording = cuda_graph.Recording(chain_of_products, [square()])
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [square() for _ in range(6)]
    got = []
    torch.cuda.synchronize()
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            torch.cuda._sleep(STALL // 10 if i % 2 else 1000)
            got.append(recording(x))
    torch.cuda.synchronize()
    torch.testing.assert_close(got, [chain_of_products(x) for x in inputs])


def test_a_replay_computes_all_of_its_results() -> None:
    recording, x = cuda_graph.Recording(chain_of_products, [square()]), square()
    for t in recording._graph.results:
        t.zero_()
    torch.testing.assert_close(recording(x), chain_of_products(x))


def test_a_replay_writes_into_no_memory_of_others() -> None:
    x = square(1024)
    recording = cuda_graph.Recording(chain_of_products, [x])
    want = recording(x)
    torch._C._cuda_clearCublasWorkspaces()  # as inductor does around its own recordings
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]  # 256 MB
    got = recording(x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(bool((t == 7.0).all()) for t in others)


def grows(x: Tensor) -> tuple[Tensor, ...]:
    return ((x.expand(1 << 24, -1) * 2).sum(0),)  # 128 MB on the way


def test_recordings_share_their_memory() -> None:
    recordings = cuda_graph.Recordings(4)
    x = torch.ones(2, device="cuda")
    taken = []
    for key in "ab":
        for _ in range(2):
            recording = recordings.get(key, key, grows, (x,))
        assert recording is not None
        assert torch.equal(recording(x)[0], torch.full((2,), 2.0**25, device="cuda"))
        taken.append(recordings._memory[x.device].bytes)
    assert taken[0] >= 1 << 27 and taken[1] - taken[0] < 1 << 25
    held = torch.cuda.memory_reserved()
    del recording
    recordings.clear()
    torch.cuda.empty_cache()
    assert held - torch.cuda.memory_reserved() >= 1 << 27


def test_memory_that_does_not_suffice_ends_nothing() -> None:
    recordings = cuda_graph.Recordings(4)
    x = torch.ones(3, device="cuda")

    def too_large(x: Tensor) -> tuple[Tensor, ...]:
        return (x, torch.empty(1 << 50, dtype=torch.uint8, device="cuda"))

    for key, function, made in (("large", too_large, False), ("small", lambda x: (x * 2,), True)):
        for _ in range(2):
            recording = recordings.get(key, key, function, (x,))
        assert (recording is not None) == made
    assert recording is not None and torch.equal(recording(x)[0], x * 2)


def test_the_clock_ranks_by_the_devices_time() -> None:
    small, large = square(64), square(4096)
    times = cuda_clock({"small": lambda: small @ small, "large": lambda: large @ large, "loss": lambda: F.relu(small)})
    assert 0 < times["small"] < times["large"]
    assert times["small"] < 0.1  # ms: without what Python needs
