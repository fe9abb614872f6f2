"""Whether a pickle stays small: its instructions are read before any is obeyed.

A few bytes of a pickle can take a computer's memory (lists that hold each other many times, an index of the memo far
beyond what is remembered, a length that the file does not have) or end the process (a million lists in each other).
"""

from __future__ import annotations

import gc
import mmap
import pickle
import pickletools
from pathlib import Path

__all__ = ["Budget", "Refused", "check"]

DEEPEST = 100
"""Containers in each other."""
_SPARE = 10_000
"""Instructions that a small pickle may repeat by reference, whatever its own number."""
_REPEATED = 16  # a real set refers to its dtype and to its labels again, which multiplies its instructions by 2
_OBJECT = 64  # bytes of a container, or of a place in the memo

_Node = list[int]  # [containers in each other, objects in it, whether it stands elsewhere too]
_LEAF: _Node = [0, 1, 1]
_NEW = frozenset(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"))
_OF_MARK = frozenset(("TUPLE", "LIST", "DICT", "FROZENSET", "OBJ", "INST"))
_INTO_MARK = frozenset(("APPENDS", "SETITEMS", "ADDITEMS"))
_TAKES = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "STACK_GLOBAL": 2, "BINPERSID": 1,
}  # fmt: skip
_INTO = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_KEEPS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_AGAIN = frozenset(("GET", "BINGET", "LONG_BINGET"))
_NEVER = frozenset(("DUP", "NEXT_BUFFER", "READONLY_BUFFER"))  # no pickler writes these into a file of arrays
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip
_LINES = {"GLOBAL": 2, "INST": 2}  # lines of text that they take; others take one


class Refused(Exception):
    """A pickle that is not read, and why."""


class Budget:
    """Bytes that may be made of a file of `size` bytes beside those that lie in it."""

    def __init__(self, size: int) -> None:
        self.size, self.left = size, self._most(size)

    @staticmethod
    def _most(size: int) -> int:
        return 16 * size + 2**24

    def take(self, count: int) -> None:
        """Refused where it is used up."""
        self.left -= count
        if self.left < 0:
            raise Refused(
                f"its {self.size} bytes would take {self._most(self.size) - self.left} bytes of memory and more"
            )


def check(path: Path) -> None:
    """Go through the instructions of a pickle file with a stack of sizes in place of objects.

    Raises:
        Refused: it nests deeper than `DEEPEST`, repeats itself by reference beyond measure, has far more containers
            than bytes for them, or changes what it has already put elsewhere, as one that holds itself does.
        pickle.UnpicklingError: it ends too early, or is none.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        collecting = gc.isenabled()
        gc.disable()  # it would look at every node again and again, and none is in a circle
        try:
            _Scan(data).run()
        except (IndexError, KeyError) as error:
            raise pickle.UnpicklingError(f"an instruction takes what is not there ({error!r})") from None
        finally:
            if collecting:
                gc.enable()


class _Scan:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.done = data, 0, 0
        self.budget = Budget(len(data))
        self.stack: list[_Node] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Node] = {}

    def run(self) -> None:
        data, names = self.data, _NAMES
        while True:
            if self.at >= len(data):
                raise pickle.UnpicklingError("it has no end")
            code = data[self.at]
            found = names.get(code)
            if found is None:
                raise pickle.UnpicklingError(f"byte {self.at} is no instruction")
            name, takes = found
            self.at += 1
            self.done += 1
            start = self.at
            self._skip(name, takes)
            if name == "STOP":
                return
            self._obey(name, start)

    def _skip(self, name: str, takes: int) -> None:
        """Go behind an instruction's argument."""
        if takes >= 0:
            self.at += takes
        elif takes == pickletools.UP_TO_NEWLINE:
            for _ in range(_LINES.get(name, 1)):
                self.at = self.data.find(b"\n", self.at) + 1
                if self.at == 0:
                    raise pickle.UnpicklingError("a line has no end")
        else:
            width = _LENGTHS[takes]
            self.at += width + int.from_bytes(self.data[self.at : self.at + width], "little")
        if self.at > len(self.data):
            raise pickle.UnpicklingError(f"{name} takes more bytes than there are")

    def _obey(self, name: str, start: int) -> None:
        stack = self.stack
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in _NEW:
            self._push([1, 1, 0])
        elif name in _TAKES:
            self._pack(len(stack) - _TAKES[name])
        elif name in _OF_MARK:
            self._pack(self.marks.pop())
        elif name in _INTO:
            self._put(len(stack) - _INTO[name])
        elif name in _INTO_MARK:
            self._put(self.marks.pop())
        elif name in _KEEPS:
            self.budget.take(_OBJECT)
            index = self._index(name, start)
            if index > self.done:
                raise Refused(f"it remembers an object as number {index} after {self.done} instructions")
            self.memo[index] = stack[-1]
        elif name in _AGAIN:
            node = self.memo[self._index(name, start)]
            node[2] = 1
            stack.append(node)
        elif name == "POP":
            if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            else:
                stack.pop()
        elif name == "POP_MARK":
            del stack[self.marks.pop() :]
        elif name in _NEVER:
            raise Refused(f"it has the instruction {name}")
        elif name == "FRAME":
            if int.from_bytes(self.data[start : self.at], "little") > len(self.data) - self.at:
                raise pickle.UnpicklingError("a frame is longer than the file")
        elif name != "PROTO":
            stack.append(_LEAF)

    def _push(self, node: _Node) -> None:
        self.budget.take(_OBJECT)
        self.stack.append(node)

    def _index(self, name: str, start: int) -> int:
        if name == "MEMOIZE":
            return len(self.memo)
        raw = self.data[start : self.at]
        return int(raw) if name in ("PUT", "GET") else int.from_bytes(raw, "little")

    def _pack(self, start: int) -> None:
        """What stands on the stack from `start` on becomes one object."""
        node = [1, 1, 0]
        self._add(node, self._taken(start))
        self._push(node)

    def _put(self, start: int) -> None:
        """The same goes into the object below it."""
        items = self._taken(start)
        node = self.stack[-1]
        if node[2]:
            if node is _LEAF:
                raise pickle.UnpicklingError("something is put into what is no container")
            raise Refused("it changes an object that it has put elsewhere before")
        self._add(node, items)

    def _taken(self, start: int) -> list[_Node]:
        if start < 0 or start > len(self.stack):
            raise pickle.UnpicklingError("an instruction takes what is not there")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _add(self, node: _Node, items: list[_Node]) -> None:
        for item in items:
            node[0] = max(node[0], item[0] + 1)
            node[1] += item[1]
            item[2] = 1
        if node[0] > DEEPEST:
            raise Refused(f"it has more than {DEEPEST} containers in each other")
        if node[1] > _REPEATED * self.done + _SPARE:
            raise Refused(f"it holds {node[1]} objects in {self.done} instructions")


def _takes(opcode: pickletools.OpcodeInfo) -> int:
    return 0 if opcode.arg is None else opcode.arg.n


_NAMES = {ord(opcode.code): (opcode.name, _takes(opcode)) for opcode in pickletools.opcodes}
