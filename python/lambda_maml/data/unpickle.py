"""Read pickles of arrays without trusting them.

A pickle names the callables that rebuild its objects. Here NumPy's names lead to stand-ins that check every field and
build plain arrays from bytes; nothing of NumPy's own state machinery, and no callable outside `_ADMITTED`, is ever
reached.
"""

from __future__ import annotations

import codecs
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .bounded import Budget, Refused, check
from .mistaken import mistaken


def load(path: Path) -> Any:
    """The object in a pickle of arrays (no object arrays), numbers, text, bytes, ranges and plain containers.

    Containers are lists, tuples, dicts and sets; a defaultdict comes as a dict. Pickles of Python 2 are read too; their
    byte strings come as latin-1 text.

    >>> load(Path("CIFAR_FS_train.pickle")).keys()
    dict_keys(['data', 'labels'])

    Raises:
        ValueError: the file names another global, holds an object or structured array, would take far more memory than
            its own size (`bounded.check`), is cut short or damaged, or is no pickle at all, such as a web page; the
            text says what it is if its first bytes tell.
        OSError: the file cannot be opened.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is no file' if path.exists() else 'there is no such file'}")
    with path.open("rb") as file:
        try:
            check(path)
            return _finish(_Unpickler(file, path.stat().st_size).load())
        except Refused as error:
            raise ValueError(
                f"{path}: refused, {error}; only arrays and plain containers are read: save the file again as a dict "
                "of NumPy arrays and lists"
            ) from None
        except OSError:
            raise
        except Exception as error:  # a damaged stream can fail in any opcode
            what = mistaken(path)
            if what is not None:
                raise ValueError(f"{path}: not a pickle: {what}") from error
            raise ValueError(
                f"{path}: not a sound pickle ({type(error).__name__}: {error}); it may be cut short: copy it again"
            ) from error


class _DType:
    """Stand-in for numpy.dtype: booleans, numbers, byte and text strings of fixed length."""

    def __init__(self, code: str, *_: Any) -> None:
        try:
            self.dtype = np.dtype(str(code))
        except TypeError:
            raise Refused(f"it holds an array of dtype {code!r}") from None
        if self.dtype.kind not in "biufSU":
            raise Refused(f"it holds an array of dtype {code!r}" + (" (objects)" if self.dtype.kind == "O" else ""))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names, fields = state[1:5]
        if subarray is not None or names is not None or fields is not None:
            raise Refused("it holds a structured array")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for an array under reconstruction: NumPy pickles it as an empty one and a state."""

    array: np.ndarray[Any, Any] | None = None

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):
            raise Refused("it holds an array of objects")
        self.budget.take(len(data) if isinstance(data, str) else 0)
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray, str)):
        raise pickle.UnpicklingError("an array without dtype or bytes")
    raw = data.encode("latin1") if isinstance(data, str) else data
    size = math.prod(shape) * dtype.dtype.itemsize
    if any(n < 0 for n in shape) or size != len(raw):
        raise pickle.UnpicklingError(f"an array of shape {shape} and dtype {dtype.dtype} in {len(raw)} bytes")
    flat = np.frombuffer(raw, dtype.dtype) if raw else np.empty(0, dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _DType, data: Any) -> Any:
    return _array(data, dtype, (1,), "C")[0]


def _reconstruct(*_: Any) -> type[_Array]:
    return _Array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Python 3 writes bytes this way into pickles that Python 2 can read."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise Refused(f"it calls _codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _bytes(*parts: Any) -> bytes:
    """Python 3 calls bytes and bytearray with bytes, or with text and its encoding; never with a size to fill."""
    if not parts:
        return b""
    if isinstance(parts[0], str):
        return _encode(*parts)
    if not isinstance(parts[0], (bytes, bytearray)):
        raise Refused(f"it makes bytes of a {type(parts[0]).__name__}")
    return bytes(parts[0])


def _bytearray(*parts: Any) -> bytearray:
    return bytearray(_bytes(*parts))


def _dict(*factory: Any) -> dict[Any, Any]:
    """For collections.defaultdict, whose factory is of no use to a reader."""
    return {}


def _list(*content: Any) -> list[Any]:
    """For builtins.list, which is named only as a defaultdict's factory."""
    if content:
        raise Refused("it calls builtins.list")
    return []


def _nothing(*_: Any) -> None:
    """For numpy.ndarray, which is named only as an argument of `_reconstruct`."""


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _nothing,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _dict,
    ("builtins", "range"): range,
    ("__builtin__", "xrange"): range,
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ADMITTED[_core + ".multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[_core + ".multiarray", "scalar"] = _scalar
    _ADMITTED[_core + ".numeric", "_frombuffer"] = _array
for _builtins in ("builtins", "__builtin__"):
    _ADMITTED[_builtins, "set"], _ADMITTED[_builtins, "frozenset"] = set, frozenset
    _ADMITTED[_builtins, "bytes"], _ADMITTED[_builtins, "bytearray"] = _bytes, _bytearray
    _ADMITTED[_builtins, "list"] = _list


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self.budget = Budget(size)

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise Refused(f"it names {module}.{name}")
        return lambda *args: self._called(admitted, args)  # a fresh one: a stream can alter nothing that outlives it

    def _called(self, admitted: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What a call makes; its bytes are counted."""
        if admitted in (set, frozenset, OrderedDict):
            self.budget.take(sum(64 * len(arg) for arg in args))
        made = admitted(*args)
        if made is _Array:
            return _Array(self.budget)
        if isinstance(made, (bytes, bytearray)):
            self.budget.take(len(made))
        elif isinstance(made, (np.ndarray, np.str_)):
            self.budget.take(made.nbytes)
        return made


def _finish(value: Any) -> Any:
    """`value` with every stand-in replaced by its array."""
    if isinstance(value, _Array):
        if value.array is None:
            raise pickle.UnpicklingError("an array without content")
        return value.array
    if isinstance(value, _DType):
        return value.dtype
    if isinstance(value, dict):
        return {_finish(k): _finish(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_finish(v) for v in value)
    return value
