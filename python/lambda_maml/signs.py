"""Signs of life and last words, by which ranks find out which one of them is missing. They lie in a store."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ranks import Lost

BEAT = 1.0
"""Seconds between two signs of life."""
SILENT = 60.0
"""Seconds without one after which a rank counts as dead."""
SILENT_BROKEN = 5.0
"""The same where a connection broke or this process is told to end."""


class Signs:
    """What a rank leaves in the store, and what it finds of the others there.

    beat/RANK holds host, process, a number that grows every second, and how often the rank has come to a meeting;
    word/RANK why it has left, and which ranks are the cause.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self.store, self.rank = store, rank
        self.others = [other for other in range(count) if other != rank]
        self.meetings = 0
        self._ended = threading.Event()

    def begin(self) -> None:
        """Give signs of life from now on, in a thread of their own."""
        store = self.store.clone()  # a connection that no other call holds while it waits
        self._beat(store, 0)
        threading.Thread(target=self._go_on, args=(store,), name="signs of life", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _beat(self, store: Any, number: int) -> None:
        store.set(f"beat/{self.rank}", json.dumps([socket.gethostname(), os.getpid(), number, self.meetings]))

    def _go_on(self, store: Any) -> None:
        for number in itertools.count(1):
            if self._ended.wait(BEAT):
                return
            try:
                self._beat(store, number)
            except RuntimeError:
                return  # the main thread finds out by itself

    def leave_word(self, kind: str, text: str, ranks: Sequence[int]) -> None:
        try:
            self.store.set(f"word/{self.rank}", json.dumps([kind, text, list(ranks)]))
        except RuntimeError:
            return  # with the store, all who could read this are gone

    def word_of(self, rank: int) -> tuple[str, str, list[int]] | None:
        if not self.store.check([f"word/{rank}"]):
            return None
        kind, text, ranks = json.loads(self.store.get(f"word/{rank}"))
        return kind, text, ranks

    def beat_of(self, rank: int) -> str:
        return self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else ""

    def search(self, words: bool = True) -> Lost | None:
        """Look for the rank that is missing until it is found, or surely none is. words: also one that says so."""
        watch, end = Watch(self), time.monotonic() + SILENT_BROKEN + 2 * BEAT
        try:
            while time.monotonic() < end:
                if words:
                    watch.raise_for_words()
                elif all(self.word_of(rank) is not None for rank in self.others):
                    return None
                watch.raise_for_dead(SILENT_BROKEN, gone=True)
                time.sleep(0.1)
        except Lost as lost:
            return lost
        except RuntimeError as error:
            told = self.rank != 1  # the lowest of the others says it
            return Lost(f"rank 0's node is lost: the store there does not answer ({line(error)})", [0], told=told)
        return None

    def behind(self) -> list[int]:
        """The ranks that live and have come to fewer meetings than this one; asked for a while after the last."""
        beats = {rank: self.beat_of(rank) for rank in self.others}
        return [rank for rank, beat in beats.items() if beat and json.loads(beat)[3] < self.meetings]

    def is_told(self, lost: Sequence[int]) -> bool:
        """Whether a lower rank says that these are lost: the first one that has not died in silence."""
        able = [r for r in range(self.rank) if r not in lost or self.word_of(r) is not None]
        return bool(able)


class Watch:
    """What a waiting rank sees of the others from the moment on at which it begins to wait."""

    def __init__(self, signs: Signs) -> None:
        self.signs = signs
        self.looked = time.monotonic()
        self.beats: dict[int, tuple[str, float]] = {}  # the last sign of life, and when it was new here

    def look(self, silent: float, *, hurried: bool = False) -> None:
        """Once a second: raise `Lost` if a rank has left, or has given no sign of life for `silent` seconds."""
        if time.monotonic() - self.looked < BEAT:
            return
        self.looked = time.monotonic()
        self.raise_for_words()
        self.raise_for_dead(SILENT_BROKEN if hurried else silent, gone=hurried)

    def raise_for_words(self) -> None:
        for rank in self.signs.others:
            kind, text, ranks = self.signs.word_of(rank) or ("finished", "", [])
            if kind == "finished":
                continue
            if kind == "lost":
                raise Lost(text, ranks, told=True)
            raise self._lost(f"rank {rank} {kind}" + (f": {line(text)}" if text else ""), rank)

    def raise_for_dead(self, silent: float, *, gone: bool) -> None:
        """gone: a process of this host that is no more counts at once."""
        now = time.monotonic()
        for rank in self.signs.others:
            beat = self.signs.beat_of(rank)
            if beat != self.beats.get(rank, (None, 0.0))[0]:
                self.beats[rank] = (beat, now)
            quiet = now - self.beats[rank][1]
            if not beat or self.signs.word_of(rank) is not None:
                continue
            host, pid, *_ = json.loads(beat)
            if gone and host == socket.gethostname() and _is_gone(pid):
                raise self._lost(f"rank {rank} died (process {pid} on {host})", rank)
            if quiet > silent:
                raise self._lost(
                    f"rank {rank} has given no sign of life for {quiet:.0f} s (process {pid} on {host})", rank
                )

    def _lost(self, text: str, rank: int) -> Lost:
        return Lost(text, [rank], told=self.signs.is_told([rank]))


def _is_gone(pid: int) -> bool:
    """Whether a process of this host has ended, also where nobody has asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return Path("/proc/self/stat").exists()


def line(text: object) -> str:
    """A text as one line of bounded length."""
    return " ".join(str(text).split())[:300]
