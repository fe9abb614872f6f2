"""The bounded cache, and the question whether a mode of torch is on."""

from __future__ import annotations

import threading

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lambda_kernels import _torch
from lambda_kernels.cache import Bounded


def test_what_was_used_last_stays() -> None:
    cache: Bounded[int] = Bounded(3)
    for key in "abc":
        cache.put(key, ord(key))
    assert cache.get("a") == ord("a")
    cache.put("d", 1)
    assert list(cache) == ["c", "a", "d"] and len(cache) == 3 and "b" not in cache and cache.get("b") is None
    cache.put("c", 2)
    assert cache.get("c") == 2 and list(cache) == ["a", "d", "c"]
    assert cache.setdefault("a", 3) == ord("a") and cache.setdefault("e", 4) == 4
    assert list(cache) == ["c", "a", "e"]
    cache.clear()
    assert len(cache) == 0 and cache.get("a") is None


def test_threads_that_make_the_same_get_one() -> None:
    cache: Bounded[object] = Bounded(2)
    got: list[object] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        got.append(cache.setdefault("key", object()))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 and all(value is got[0] for value in got)


def test_modes_of_torch_are_named() -> None:
    assert _torch.mode_active() is None and _torch.transform_active("cpu") is None

    def inside(x: torch.Tensor) -> torch.Tensor:
        assert _torch.mode_active() == _torch.transform_active("cpu") == "a transform of torch.func is active"
        return x

    torch.func.vmap(inside)(torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert _torch.mode_active() == "autocast is on" and _torch.mode_active("cuda") is None
    with torch.inference_mode():
        assert _torch.mode_active() == "inference mode is on" and _torch.transform_active("cpu") is None
    for mode in (TorchFunctionMode, TorchDispatchMode):
        with mode():
            assert _torch.mode_active() == "a mode of torch looks at its operators"
            assert _torch.transform_active("cpu") is None
    assert _torch.mode_active() is None
