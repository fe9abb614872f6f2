"""lambda_maml.data.unpickle: pickles of arrays, read without trusting them."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

from lambda_maml import data
from lambda_maml.data import unpickle

RNG = np.random.default_rng(0)


def roundtrip(tmp_path, value, protocol):
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps(value, protocol))
    return unpickle.load(path)


ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.asfortranarray(np.arange(24, dtype=np.float64).reshape(2, 3, 4)),
    np.arange(24, dtype=np.int16).reshape(4, 6)[::2, 1::2],
    np.zeros((0, 3), np.float32),
    np.array(3.5),
    np.array([True, False]),
    np.array(["ab", "c"]),
    np.array([b"ab", b"c"]),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_come_back(tmp_path, protocol):
    for array in ARRAYS:
        got = roundtrip(tmp_path, {"a": [array]}, protocol)["a"][0]
        assert got.dtype == array.dtype and np.array_equal(got, array)
    plain = {
        "n": None,
        "t": (1, 2.5, True),
        b"b": [b"\x00\xff", "é", b""],
        3: {1, 2},
        "f": frozenset([1]),
        "big": 2**80,
    }
    assert roundtrip(tmp_path, plain, protocol) == plain
    scalars = roundtrip(tmp_path, [np.int64(7), np.float32(0.5), bytearray(b"xy")], protocol)
    assert scalars == [7, 0.5, b"xy"]


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_a_pickle_of_python_2_is_read(tmp_path, core):
    raw = bytes(range(250, 256))
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"c" + core + b".multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01K\x02K\x03\x86" + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    (tmp_path / "x").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x04name" + b"U\x02n1u.")
    got = unpickle.load(tmp_path / "x")
    assert got["name"] == "n1" and got["data"].dtype == np.uint8
    assert got["data"].tolist() == [[250, 251, 252], [253, 254, 255]]


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, protocol):
    marker = tmp_path / "owned"
    for call in (
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(open, str(marker), "w"),
    ):
        path = tmp_path / "FC100_train.pickle"
        path.write_bytes(pickle.dumps({"data": np.zeros((1, 32, 32, 3), np.uint8), "labels": call}, protocol))
        with pytest.raises(ValueError, match=r"refused, it names \w+\.(system|eval|open)") as error:
            data.load("fc100", tmp_path)
        assert str(path) in str(error.value) and not marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([1, "x"], dtype=object), "object"),
        (np.array([(1, 2.0)], dtype="i4,f8"), "dtype 'V12'"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "dtype 'M8'"),
        (Call(np.load, "x"), "numpy.*load"),
        (Call(getattr, 1, "real"), "getattr"),
        (np.ma.zeros(2), "numpy.ma"),
        (Path("x"), "pathlib"),
    ],
    ids=["objects", "structured", "dates", "numpy.load", "getattr", "masked", "path"],
)
def test_other_globals_and_dtypes_are_refused(tmp_path, value, message):
    with pytest.raises(ValueError, match=f"refused.*{message}"):
        roundtrip(tmp_path, {"data": value}, 2)


DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00%s\x85R"
STREAMS = {
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "names numpy.dtype.__init__"),
    "size": (
        b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(U\x01a" + DTYPE % b"u1" + b"K\x09\x85U\x01CtR.",
        "in 1 bytes",
    ),
    "bytes by length": (
        b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(K\x09" + DTYPE % b"u1" + b"K\x09\x85U\x01CtR.",
        "without dtype or bytes",
    ),
    "object by code": (b"\x80\x02" + DTYPE % b"O8" + b".", "refused.*objects"),
    "codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "refused.*hex"),
    "unfilled": (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.", "without content"),
    "dtype with fields": (
        b"\x80\x02" + DTYPE % b"u1" + b"(K\x03U\x01|NU\x01aU\x01bJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        "refused.*structured",
    ),
    "persistent id": (b"\x80\x02K\x01Q.", "not a sound pickle"),
    "text": (b"hello world", "not a sound pickle"),
    "empty": (b"", "not a pickle: it is empty"),
    "list of a huge range": (
        b"\x80\x02c__builtin__\nlist\nc__builtin__\nxrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
        "refused.*calls builtins.list",
    ),
    "huge bytes": (b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.", "refused.*bytes of a int"),
    "huge bytearray": (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "refused.*bytes of a int"),
    "factory of another kind": (
        b"\x80\x02ccollections\ndefaultdict\nc__builtin__\neval\n\x85R.",
        "refused.*eval",
    ),
}


@pytest.mark.parametrize(("stream", "message"), STREAMS.values(), ids=STREAMS)
def test_crafted_streams(tmp_path, stream, message):
    (tmp_path / "x").write_bytes(stream)
    with pytest.raises(ValueError, match=message):
        unpickle.load(tmp_path / "x")


def test_a_stream_cannot_alter_what_the_next_load_uses(tmp_path):
    # BUILD with a slot state on the global _reconstruct would set an attribute on it
    (tmp_path / "x").write_bytes(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x01aK\x07s\x86b.")
    with pytest.raises(ValueError, match="put into what is no container"):
        unpickle.load(tmp_path / "x")
    assert not hasattr(unpickle._reconstruct, "a")


BOMBS = {
    "a million lists in each other": (b"\x80\x04" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", "bytes of memory"),
    "a million tuples in each other": (b"\x80\x04N" + b"\x85" * 10**6 + b".", "more than 100 containers in each other"),
    "each list twice in the next": (
        b"\x80\x04]\x94" + b"".join(b"]\x94(h%ch%ce" % (k, k) for k in range(40)) + b".", "objects in"
    ),
    "an index of the memo": (b"\x80\x02Nr\xff\xff\xff\x0f.", "number 268435455 after 3 instructions"),
    "a length": (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.", "more bytes than there are"),
    "a frame": (b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.", "a frame is longer"),
    "a list in itself": (b"\x80\x04]\x94h\x00a.", "put elsewhere before"),
    "lists beyond number": (b"\x80\x04(" + b"]" * 10**6 + b"l.", "bytes of memory"),
    "places in the memo": (b"\x80\x04N" + b"\x94" * 10**6 + b".", "bytes of memory"),
    "a set of a range": (
        b"\x80\x02c__builtin__\nset\nc__builtin__\nxrange\nJ\xff\xff\xff\x7f\x85R\x85R.", "137438953408 bytes of memory"
    ),
    "text that becomes bytes a hundred times": (
        b"\x80\x02X" + (2**20).to_bytes(4, "little") + b"a" * 2**20
        + b"q\x00X\x06\x00\x00\x00latin1q\x01c_codecs\nencode\nq\x02(" + b"h\x02h\x00h\x01\x86R" * 100 + b"l.",
        "bytes of memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("stream", "message"), BOMBS.values(), ids=BOMBS)
def test_a_small_pickle_takes_little_memory_and_ends_nothing(tmp_path, stream, message):
    (tmp_path / "x").write_bytes(stream)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        unpickle.load(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(stream) + 2**26


def test_what_is_shared_and_complete_is_read(tmp_path):
    shared, label = np.arange(3), "n01532829"
    rows = {"data": [shared] * 50, "labels": [label] * 5000, "pairs": [(shared, shared)] * 50}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        got = roundtrip(tmp_path, rows, protocol)
        assert got["labels"] == rows["labels"] and len(got["pairs"]) == 50 and got["pairs"][7][1].tolist() == [0, 1, 2]


def test_a_truncated_pickle_is_refused(tmp_path):
    whole = pickle.dumps({"data": RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), "labels": [0, 1, 2]}, 2)
    path = tmp_path / "CIFAR_FS_train.pickle"
    for keep in (1, 20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"CIFAR_FS_train.pickle: not a sound pickle .* cut short"):
            data.load("cifar_fs", tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ranges_and_dicts_of_the_collections_module_come_back(tmp_path, protocol):
    lists = defaultdict(list, a=[1], b=[np.arange(2)])
    others = {"s": defaultdict(set), "o": OrderedDict(x=b""), "r": range(1, 9, 2)}
    got = roundtrip(tmp_path, {"d": lists, **others}, protocol)
    assert type(got["d"]) is dict and got["d"]["a"] == [1] and got["d"]["b"][0].tolist() == [0, 1]
    assert got["s"] == {} and got["o"] == {"x": b""} and got["r"] == range(1, 9, 2)


TAR = b"CIFAR_FS_train.pickle".ljust(257, b"\0") + b"ustar\x0000"
MISTAKEN = {
    "Google Drive's page": (b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded", "web page.*download"),
    "a page with a comment first": (b"\xef\xbb\xbf\r\n<!-- saved --><HTML>", "web page"),
    "a server's refusal": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "server's error message.*again"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(40), "a zip archive: unpack it first"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "a gzip archive: unpack"),
    "tar": (TAR.ljust(1024, b"\0"), "a tar archive: unpack"),
    "npy": (b"\x93NUMPY\x01\0", "a NumPy .npy file: give"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
}


@pytest.mark.parametrize(("content", "message"), MISTAKEN.values(), ids=MISTAKEN)
def test_a_file_of_another_kind_is_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "CIFAR_FS_train.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"CIFAR_FS_train.pickle: not a pickle: it is .*{message}"):
        data.load("cifar_fs", tmp_path)
