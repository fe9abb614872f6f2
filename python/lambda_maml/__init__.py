"""Fast adaptation under Lambda patterns: MAML's inner loop, pattern selection, few-shot data and networks.

A name is imported when it is first asked for, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_PLACES = {
    "LambdaMAML": ".maml",
    "Learner": ".learner",
    "Pattern": ".patterns",
    "adapt_tasks": ".adapt",
    "measure_time": ".timing",
    "rules": ".inner.rules",
    "select_pattern": ".select",
}
"""Where names lie that are not in a module of their own name."""
_MODULES = ("data", "models", "rules")


class _Package(ModuleType):
    """The package: reading a public name imports it. `adapt` and `explain` name a function and the module in which it
    lies; the import of the module does not take the function's place."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


def _public(name: str) -> property:
    def read(package: ModuleType) -> Any:
        if name not in package.__dict__:
            module = importlib.import_module(_PLACES.get(name, f".{name}"), __name__)
            package.__dict__[name] = module if name in _MODULES else getattr(module, name)
        return package.__dict__[name]

    def write(package: ModuleType, value: Any) -> None:
        if name in _MODULES or not isinstance(value, ModuleType):
            package.__dict__[name] = value

    return property(read, write)


for _name in __all__:
    setattr(_Package, _name, _public(_name))
sys.modules[__name__].__class__ = _Package
