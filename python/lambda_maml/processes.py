"""The ranks that torchrun started, on torch.distributed: gloo on the CPU, NCCL on CUDA devices."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from .ranks import ALONE, Lost, Ranks, Stopped, T
from .signs import SILENT, Signs, Watch, line

TIMEOUT = 600.0
"""Seconds that a rank waits for another one that lives but does not come."""


def launched() -> bool:
    """Whether this process was started as one of several.

    >>> launched()                                          # torchrun sets RANK and WORLD_SIZE
    False
    """
    return bool(os.environ.get("RANK")) and int(os.environ.get("WORLD_SIZE") or 1) > 1


@contextmanager
def joined(device: str = "cpu", timeout: float | None = None) -> Iterator[Ranks]:
    """The ranks that torchrun started, or `ALONE` where it did not; torch.distributed begins and ends here.

    >>> with joined() as ranks:
    ...     ranks.count
    1

    device: "cpu" (over gloo) or "cuda" (over NCCL; each rank of a node has one, `ranks.device`).
    timeout: seconds to wait for a rank that lives but does not come; None: LAMBDA_MAML_RANK_TIMEOUT, or `TIMEOUT`.

    The ranks leave the block together. One that leaves it with an exception tells the others, which then raise `Lost`;
    outside the block `Lost` also stands for what rank 0 raised too, so that it is said once. SIGTERM, which torchrun
    sends to the ranks that are left, is a KeyboardInterrupt, or `Lost` where a rank has died.

    Raises:
        ValueError: a numbered device, fewer devices than ranks on this node, or a timeout that is not above 0.
        Lost: not all ranks came within `timeout`; another rank left, died or does not answer.
    """
    if not launched():
        yield ALONE
        return
    seconds = float(os.environ.get("LAMBDA_MAML_RANK_TIMEOUT") or TIMEOUT) if timeout is None else timeout
    if not 0 < seconds < math.inf:
        raise ValueError(f"the timeout of ranks is {seconds} s, expected above 0")
    with _sigterm_interrupts():
        group = _Group(_device_of_rank(device), seconds)
        try:
            group.meet()
            yield group
        except BaseException as error:
            _ignore_sigterm()
            group.leave(error)
            raise
        else:
            group.end()
        finally:
            group.signs.end()


def _device_of_rank(text: str) -> torch.device:
    device = torch.device(text)
    if device.type != "cuda":
        return device
    local, there = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if ":" in text:
        raise ValueError(f"device {text}: ranks do not share one; say cuda, and each takes that of its local rank")
    if local >= there:
        raise ValueError(
            f"local rank {local} needs a CUDA device of its own, this node has {there}: start at most as many ranks"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt; where the block raises, it stays as the block left it."""

    def on_signal(number: int, frame: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, on_signal)
    yield
    signal.signal(signal.SIGTERM, before)


def _ignore_sigterm() -> None:
    """torchrun sends it as soon as one rank has failed; this one still has to say why it ends. SIGKILL comes later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Group(Ranks):
    """The ranks of torch.distributed's default group. Small texts go through its store, tensors through collectives."""

    def __init__(self, device: torch.device, timeout: float) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self.device, self.timeout = device, timeout
        self.dist: Any = dist
        store, self.rank, self.count = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        self.store, self._of_torch = (self.dist.PrefixStore(name, store) for name in ("lambda_maml", "torch"))
        self.signs = Signs(self.store, self.rank, self.count)
        self._turns = itertools.count()
        self._gathered = ""  # this rank's key in the last `_gather`
        self._reason: Callable[[], str | None] = lambda: None
        self._stop: str | None = None

    def meet(self) -> None:
        """Wait until all ranks are there, then begin torch.distributed."""
        self.signs.begin()
        for rank in self.signs.others:
            self._await(f"beat/{rank}", f"rank {rank} did not come", rank)
        cuda = self.device is not None and self.device.type == "cuda"
        if cuda:
            # Else NCCL's watchdog ends this process, perhaps in the middle of a save, when another one is missing.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        self.dist.init_process_group(
            "nccl" if cuda else "gloo", store=self._of_torch, rank=self.rank, world_size=self.count,
            timeout=timedelta(seconds=self.timeout + SILENT),
        )  # fmt: skip

    def end(self) -> None:
        """Leave together: torchrun ends those that are left as soon as one has ended with another status than 0."""
        _ignore_sigterm()
        self.signs.leave_word("finished", "", [])
        with suppress(RuntimeError):  # rank 0 has all results, whatever becomes of another one now
            for rank in self.signs.others:
                self._await(f"word/{rank}")
        self.dist.destroy_process_group()

    def leave(self, error: BaseException) -> None:
        """Tell the others why this rank ends. Raises `Lost` in place of an error that another rank is the cause of."""
        if isinstance(error, Lost):
            self.signs.leave_word("lost", str(error), error.ranks)
        elif isinstance(error, KeyboardInterrupt):
            self.signs.leave_word("was interrupted", "", [self.rank])
            if (lost := self.signs.search(words=False)) is not None:
                raise lost from error
        else:
            text = f"{type(error).__name__}: {error}"
            self.signs.leave_word("ended", text, [self.rank])
            end = time.monotonic() + 1
            while self.rank and time.monotonic() < end:
                if (word := self.signs.word_of(0)) is not None:
                    if word[1] == text:
                        raise Lost(str(error), [0], told=True) from error
                    break
                time.sleep(0.05)

    def first(self, compute: Callable[[], T]) -> T:
        key = f"first/{next(self._turns)}"
        if self.rank == 0:
            value, file = compute(), io.BytesIO()
            torch.save(value, file)
            payload = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(self.device)
            self.store.set(key, str(payload.numel()))
            self._run(self.dist.broadcast(payload, 0, async_op=True))
            return value
        self._await(key)
        payload = torch.empty(int(self.store.get(key)), dtype=torch.uint8, device=self.device)
        self._run(self.dist.broadcast(payload, 0, async_op=True))
        found: T = torch.load(io.BytesIO(payload.cpu().numpy().tobytes()), map_location="cpu", weights_only=False)
        return found

    def first_then_all(self, compute: Callable[[], T]) -> T:
        own: list[T] = []
        self.first(lambda: own.append(compute()))
        return own[0] if own else compute()

    def total(self, size: int, fill: Callable[[Tensor], object], dtype: torch.dtype = torch.float64) -> Tensor:
        buffer = torch.zeros(size + 2, dtype=dtype, device=self.device)  # at its end: ranks, and how many have a word
        word: tuple[str, str] | None = None
        try:
            fill(buffer[:size])
        except (FloatingPointError, Stopped) as error:
            buffer.zero_()
            word = ("left" if isinstance(error, Stopped) else "diverged", str(error))
        if word is None and (reason := self._reason()) is not None:
            word = ("stop", reason)
        buffer[size] = 1
        buffer[size + 1] = word is not None
        self._run(self.dist.all_reduce(buffer, async_op=True))
        ranks, words = buffer[size:].tolist()
        if ranks != self.count:
            raise self._lost(f"a sum over {self.count} ranks has the parts of {ranks:g}")
        if words:
            self._heed([json.loads(text) for text in self._gather(json.dumps(word)) if text != "null"])
        return buffer[:size]

    def _heed(self, words: list[tuple[str, str]]) -> None:
        """What the ranks said during a sum: one diverged, or one is to stop, at once or after this iteration."""
        for kind, text in words:
            if kind == "diverged":
                raise FloatingPointError(text)
        self._stop = words[0][1]
        for kind, text in words:
            if kind == "left":
                raise Stopped(text)

    def mean_gradient(self, parameters: Sequence[Tensor], weight: float, compute: Callable[[], float]) -> float:
        numbers = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
        tail = len(numbers) + 1  # behind the gradients: for each parameter whether it has one, and the loss
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype.to_real())

        def fill(own: Tensor) -> None:
            if not weight:
                return
            own[-1] = weight * compute()
            for index, (p, part) in enumerate(zip(parameters, own[:-tail].split(numbers), strict=True)):
                if p.grad is not None:
                    part.add_(_real(p.grad.detach()).reshape(-1), alpha=weight)
                    own[index - tail] = 1

        found = self.total(sum(numbers) + tail, fill, dtype)
        *having, loss = found[-tail:].tolist()
        for p, part, has in zip(parameters, found[:-tail].split(numbers), having, strict=True):
            if has:
                p.grad = torch.empty_like(p) if p.grad is None else p.grad
                real = _real(p.grad)
                real.copy_(part.view(real.shape))
        return float(loss)

    def agreed(self, reason: Callable[[], str | None]) -> str | None:
        if reason != self._reason:
            self._reason, self._stop = reason, None
        return self._stop

    def start_alike(self, tensors: Mapping[str, Tensor]) -> None:
        values = self.first(lambda: {name: tensor.detach() for name, tensor in tensors.items()})
        if self.rank:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(values[name])

    def check_alike(self, tensors: Mapping[str, Tensor]) -> None:
        digests = {name: _digest(tensor) for name, tensor in tensors.items()}
        found = self._gather(blake2b(repr(digests).encode(), digest_size=16).hexdigest())
        if len(set(found)) == 1:
            return
        each = [json.loads(text) for text in self._gather(json.dumps(digests))]
        others = [str(rank) for rank, own in enumerate(each) if own != each[0]]
        name = next(name for own in each for name in own if any(one.get(name) != own[name] for one in each))
        raise RuntimeError(
            f"rank {', '.join(others)} differs from rank 0 in {name}: something changed the network on one rank alone. "
            "Go on from the last checkpoint"
        )

    def own_random_numbers(self, *numbers: int) -> None:
        if self.rank:
            seed = blake2b(repr((*numbers, self.rank)).encode(), digest_size=7).digest()
            torch.manual_seed(int.from_bytes(seed, "little"))

    def is_heir(self, lost: Sequence[int]) -> bool:
        return all(rank in lost for rank in range(self.rank))

    def _gather(self, text: str) -> list[str]:
        """What each rank gives, in their order, through the store."""
        keys = [f"gather/{next(self._turns)}/{rank}" for rank in range(self.count)]
        self.store.set(keys[self.rank], text)
        found = []
        for key in keys:
            self._await(key)
            found.append(self.store.get(key).decode())
        if self._gathered:
            self.store.delete_key(self._gathered)  # all have read it: they have come to this one
        self._gathered = keys[self.rank]
        return found

    def _await(self, key: str, otherwise: str = "", rank: int = 0) -> None:
        """Sleep until the store has the key; as long as all ranks live, or for the timeout if `otherwise` is given."""
        start, watch = time.monotonic(), Watch(self.signs)
        try:
            while not self.store.check([key]):
                waited = time.monotonic() - start
                if otherwise and waited > self.timeout:
                    raise Lost(f"{otherwise} within {self.timeout:g} s", [rank])
                time.sleep(min(0.1, 0.001 + waited / 20))
                watch.look(SILENT, hurried=self._reason() is not None)
        except self.dist.DistError as error:
            raise self._lost(str(error)) from error

    def _run(self, work: Any) -> None:
        """Wait for a collective, asleep; where that takes longer than a second, look for signs of life."""
        self.signs.meetings += 1
        start, watch = time.monotonic(), Watch(self.signs)
        while not work.is_completed():
            waited = time.monotonic() - start
            if waited > self.timeout:
                raise self._lost(f"no answer within {self.timeout:g} s")
            time.sleep(min(0.01, 0.00002 + waited / 20))  # a twentieth of the wait is lost at most
            watch.look(min(SILENT, self.timeout), hurried=self._reason() is not None)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> Lost:
        """The error that names the rank that is missing."""
        if (found := self.signs.search()) is not None:
            return found
        late = self.signs.behind()
        who = f"rank {', '.join(map(str, late))} lives and did not come" if late else "the ranks have lost each other"
        return Lost(f"{who}: {line(why)}", late, told=self.signs.is_told(late))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
