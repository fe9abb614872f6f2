"""What `make gpu` saves: nothing is measured in its tests; Triton kernels are compiled ahead, many at a time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


def test_without_measuring_a_kernel_takes_its_first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from lambda_kernels.backends.triton import launch

    class Kernel:
        __name__, cache_key = "kernel", "source"

    def never(*_: object) -> float:
        raise AssertionError("it measures")

    tiles = [launch.Tile(16, 16, 16, 4, 2), launch.Tile(32, 16, 16, 4, 2)]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch.Tuner, "_measured", never)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("LAMBDA_KERNELS_MEASURE", "0")
    tuner = launch.Tuner(Kernel)
    assert tuner.tile((1,), tiles, torch.empty(1), print) == tiles[0]
    monkeypatch.delenv("LAMBDA_KERNELS_MEASURE")
    with pytest.raises(AssertionError, match="it measures"):
        tuner.tile((1,), tiles, torch.empty(1), print)
