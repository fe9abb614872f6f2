"""What is said in the log, once per process."""

from __future__ import annotations

import logging
from functools import partial

from lambda_kernels import _say

__all__ = ["say_once"]

_said = _say._said
say_once = partial(_say.say_once, log=logging.getLogger("lambda_maml"))
