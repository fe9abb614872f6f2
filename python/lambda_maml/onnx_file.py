"""An exported .onnx as a classifier of image files, by ONNX Runtime."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .export import FORMAT, NOTE
from .extras import wanted
from .images import read_images

__all__ = ["OnnxFile"]


class OnnxFile:
    """The network of a file that `export` wrote with class names; `classify` gives the logits [n, ways] of files.

    >>> OnnxFile(Path("adapted.onnx")).classes
    ['cat', 'dog']

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: ONNX Runtime is not installed.
        ValueError: it cannot take the file, which is another's or says too little.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with wanted("export", path.name):
            runtime = importlib.import_module("onnxruntime")
        try:
            self._session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"{path}: ONNX Runtime cannot take it: {error}") from error
        note = json.loads(self._session.get_modelmeta().custom_metadata_map.get(NOTE, "{}"))
        missing = [name for name in ("classes", "mean", "std") if not note.get(name)]
        if note.get("format") != FORMAT or missing:
            raise ValueError(
                f"{path}: says nothing of {', '.join(missing) or 'its format'}: lambda-maml export writes a file that "
                "says how its images are read"
            )
        self.classes: list[str] = note["classes"]
        self._note = note

    def classify(self, files: Sequence[Path]) -> Tensor:
        """The logits of picture files, read as the support set was."""
        note = self._note
        _, *shape = note["inputs"][0]["shape"]
        if note["normalise"]:
            plain = {"mean": [0.0] * shape[0], "std": [1.0] * shape[0]}
            images = (read_images(files, shape, plain, invert=False) * 255).round().to(torch.uint8)
        else:
            images = read_images(files, shape, note, invert=note["invert"])
        (logits,) = self._session.run(None, {self._session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)
