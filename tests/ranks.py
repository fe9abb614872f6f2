"""Ranks as torchrun starts them, for tests: real processes over gloo, forked from one that has imported everything."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from machine import PATIENCE

from lambda_maml.processes import joined

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "torch._dynamo", "lambda_maml.train", "lambda_maml.select", "test_ranks"])


class End(NamedTuple):
    """How a rank ended: what its job gave or raised (inside of the block of `joined`, and out of it), its exit status,
    and the seconds from the start of all ranks on."""

    value: Any = None
    inside: BaseException | None = None
    error: BaseException | None = None
    status: int = 0
    seconds: float = 0.0


def launch(count: int, job: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[End]:
    """Run job(ranks, *arguments) in `count` processes and wait for all. The store is this process's, as torchrun's is
    its own."""
    import torch.distributed as dist

    store: Any = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    start = time.monotonic()
    ends: dict[int, End] = {}
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in range(count):
        mine, theirs = CONTEXT.Pipe(duplex=False)
        given = (rank, count, store.port, timeout, list(sys.path), theirs, job, arguments)
        process = CONTEXT.Process(target=_rank, args=given)
        process.start()
        theirs.close()
        pipes[mine] = rank
        processes.append(process)
    while pipes:
        ready = wait(list(pipes), timeout=PATIENCE)
        assert ready, "ranks hang"
        for pipe in ready:
            rank = pipes.pop(pipe)  # type: ignore[call-overload]
            try:
                ends[rank] = End(*torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))  # type: ignore[union-attr]
            except EOFError:
                ends[rank] = End()
            processes[rank].join(PATIENCE)
            status = processes[rank].exitcode
            ends[rank] = ends[rank]._replace(status=-1 if status is None else status, seconds=time.monotonic() - start)
    return [ends[rank] for rank in range(count)]


def _rank(
    rank: int, count: int, port: int, timeout: float, path: list[str], pipe: Connection, job: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:  # fmt: skip
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    torch.set_num_threads(1)
    value = inside = failed = None
    try:
        with joined(timeout=timeout) as ranks:
            try:
                value = job(ranks, *arguments)
            except BaseException as error:
                inside = error
                raise
    except BaseException as error:
        failed = error
    file = io.BytesIO()  # a tensor that is sent as such would lie in memory that ends with this process
    torch.save((value, inside, failed), file)
    pipe.send_bytes(file.getvalue())
    pipe.close()
