"""What is said in the log, once per process."""

from __future__ import annotations

import logging

__all__ = ["say_once"]

_log = logging.getLogger("lambda_kernels")
_said: set[str] = set()


def say_once(message: str, log: logging.Logger = _log) -> None:
    """Log a warning that was not given before in this process."""
    if message not in _said:
        _said.add(message)
        log.warning(message)
