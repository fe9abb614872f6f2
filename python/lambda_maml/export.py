"""An adapted network as a file that needs nothing of this package, with a note of what to feed it."""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.agreement import apart
from lambda_kernels.program import program_for
from lambda_kernels.program.structure import flatten

from .extras import wanted
from .files import atomic, written
from .statistics import fold

__all__ = ["FORMAT", "NOTE", "Contents", "check_name", "export"]

FORMAT = "lambda-maml export 1"
NOTE = "lambda_maml.json"
"""Where a file keeps its note: `extra_files` of a .pt2, `metadata_props` of an .onnx."""


class Contents(NamedTuple):
    """What a file says of its network, beside the network."""

    classes: Sequence[str] | None = None  # names, in the order of the logits
    mean: Sequence[float] | None = None  # per channel, of values in [0, 1]
    std: Sequence[float] | None = None
    invert: bool = False  # 255 - pixel is what the network was trained on
    normalise: bool = False  # the file takes pixels and normalises them itself


class _Served(nn.Module):
    """The network as it is called from outside: on normalised images, or on pixels, uint8 [N, C, H, W]."""

    def __init__(self, network: nn.Module, contents: Contents, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.contents, self.dtype = network, contents, dtype
        if contents.normalise:
            for name, values in (("mean", contents.mean), ("std", contents.std)):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Any) -> Any:
        if self.contents.normalise:
            pixels = 255 - images if self.contents.invert else images
            images = ((pixels.to(torch.float32) / 255 - self.mean) / self.std).to(self.dtype)
        return self.network(images)


@torch.no_grad()
def export(network: nn.Module, xs: Any, path: str | Path, contents: Contents) -> None:
    """Write a network whose norms have fixed statistics to `path`, in evaluation mode and on the CPU: `network`, whose
    own that is, is changed.

    Norms are folded into the layers ahead of them where these can be told. The file holds operators of ATen or ONNX
    alone and takes any number of images from 1 on. An .onnx is in float32, the one type in which ONNX Runtime
    convolves on a CPU; a .pt2 is in the network's own.

    Args:
        xs: at least one image [N, C, H, W], or whatever the network takes, with the images along the first axis.
        path: NAME.pt2 (`torch.export.save`) or NAME.onnx.

    Raises:
        ValueError: torch.export or torch.onnx cannot take the network, or `contents` does not fit it.
        ModuleNotFoundError: what is needed for ONNX is not installed.
        OSError: the file cannot be written; an earlier one stays as it was.
    """
    path = Path(path)
    check_name(path)
    kind = torch.float32 if path.suffix == ".onnx" else None
    network = network.eval().to("cpu", kind)
    tensors, again = flatten(xs)
    tensors = [t.detach().to("cpu", kind if t.is_floating_point() else None) for t in tensors]
    xs = again(tensors)
    _check(contents, tensors, network(xs))
    if program_for(network, (xs,), {}).untraceable is None:
        fold(network, xs)
    served = _Served(lk.to_torch(network), contents, tensors[0].dtype).eval()
    if contents.normalise:
        tensors = [torch.arange(t.numel()).remainder(256).view(t.shape).to(torch.uint8) for t in tensors]
    try:
        program = _traced(served, tensors, again)
        _compare(program, served, tensors, again)
    except Exception as error:
        raise ValueError(f"{type(network).__name__} cannot be exported: {_short(error)}") from error
    note = json.dumps(_note(contents, tensors), allow_nan=False)
    data = _pt2(program, note) if path.suffix == ".pt2" else _onnx(program, note, type(network).__name__)
    with written(path), atomic(path) as part:
        part.write_bytes(data)


def check_name(path: Path) -> None:
    """Raises ValueError for another ending, ModuleNotFoundError where what writes the file is not installed."""
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path}: the name ends in .pt2 (torch.export) or .onnx")
    if path.suffix == ".onnx":
        with wanted("export", path.name):
            for name in ("onnx", "onnxscript"):
                importlib.import_module(name)


def _check(contents: Contents, tensors: Sequence[Tensor], logits: Any) -> None:
    """What is said of the network fits it."""
    ways = logits.shape[-1] if isinstance(logits, Tensor) else 0
    if contents.classes is not None and len(contents.classes) != ways:
        raise ValueError(f"{len(contents.classes)} classes are named, the network has {ways}")
    images = len(tensors) == 1 and tensors[0].dim() == 4
    for name, values in (("mean", contents.mean), ("std", contents.std)):
        if values is None:
            if contents.normalise:
                raise ValueError(f"normalise=True needs mean and std, one number a channel each: {name} is None")
        elif not images or len(values) != tensors[0].shape[1]:
            taken = ", ".join(str(list(t.shape)) for t in tensors)
            raise ValueError(f"{name} has {len(values)} numbers, the network takes {taken}: one number a channel")
    if contents.std is not None and not min(contents.std) > 0:
        raise ValueError(f"std must be positive, got {list(contents.std)}")


def _traced(served: nn.Module, tensors: Sequence[Tensor], again: Any) -> torch.export.ExportedProgram:
    """The program for any number of images. It keeps the example that it was traced by: zeros, nobody's images."""
    images = torch.export.Dim("images", min=1)
    zeros = again([t.new_zeros((2, *t.shape[1:])) if t.dim() else t for t in tensors])
    sizes = again([{0: images} if t.dim() else {} for t in tensors])
    with _quiet():
        return torch.export.export(served, (zeros,), dynamic_shapes=(sizes,), strict=False)


def _compare(program: Any, served: nn.Module, tensors: Sequence[Tensor], again: Any) -> None:
    """The program gives what the network gives, for all images and for one."""
    module = program.module()
    for count in (None, 1):
        xs = again([t[:count] if t.dim() else t for t in tensors])
        for got, want in zip(flatten(module(xs))[0], flatten(served(xs))[0]):
            if (off := apart(got, want)) is not None:
                raise ValueError(f"the exported program differs from the network by {off:.1e} of its result")


def _note(contents: Contents, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What a user of the file has to know; values are pixels / 255."""
    inputs = [
        {"dtype": str(t.dtype).removeprefix("torch."), "shape": ["images", *t.shape[1:]] if t.dim() else []}
        for t in tensors
    ]
    value = "(255 - pixel)" if contents.invert else "pixel"
    feed = f"({value} / 255 - mean) / std of each channel" if contents.mean else "as the network was trained"
    told = {name: None if values is None else list(values) for name, values in contents._asdict().items()
            if name in ("classes", "mean", "std")}  # fmt: skip
    return {
        "format": FORMAT, "inputs": inputs, "feed": "pixels" if contents.normalise else feed, **told,
        "invert": contents.invert, "normalise": contents.normalise, "output": "logits [images, classes]",
    }  # fmt: skip


def _pt2(program: torch.export.ExportedProgram, note: str) -> bytes:
    data = io.BytesIO()  # by a buffer the archive's folder has one name, whatever the file is called
    torch.export.save(program, data, extra_files={NOTE: note})
    return data.getvalue()


def _onnx(program: torch.export.ExportedProgram, note: str, name: str) -> bytes:
    try:
        with _quiet():
            made = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
            )
    except Exception as error:
        raise ValueError(f"{name} cannot be exported to ONNX: {_short(error)}") from error
    assert made is not None
    made.model.metadata_props[NOTE] = note
    data: bytes = made.model_proto.SerializeToString()
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say of torch's own code and of packages that nobody asked for."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def _short(error: Exception) -> str:
    """The first lines of what torch says, without those of its frames."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
