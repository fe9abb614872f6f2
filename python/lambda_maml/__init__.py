"""Fast adaptation under Lambda patterns: MAML's inner loop, pattern selection, few-shot data and networks."""

from . import data, models
from .adapt import Learner, adapt, adapt_tasks
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
    "measure_time",
    "models",
    "select_pattern",
]
