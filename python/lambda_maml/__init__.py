"""Fast adaptation under Lambda patterns: MAML's inner loop, pattern selection, few-shot data and networks."""

from . import data, models
from .adapt import adapt, adapt_tasks
from .explain import explain
from .inner import rules
from .learner import Learner
from .maml import LambdaMAML
from .patterns import Pattern
from .select import select_pattern
from .timing import measure_time

__all__ = [
    "LambdaMAML",
    "Learner",
    "Pattern",
    "adapt",
    "adapt_tasks",
    "data",
    "explain",
    "measure_time",
    "models",
    "rules",
    "select_pattern",
]
