"""Methods related to MAML under patterns, each as a part for one of the `places`: one file a method."""

from .descend import backward, descend
from .ntk import ntk
from .ridge import ridge_head

__all__ = [
    "backward",
    "descend",
    "ntk",
    "ridge_head",
]
