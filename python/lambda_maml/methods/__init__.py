"""Methods related to MAML under patterns, each as a part for one of the `places`: one file a method."""

from .alfa import alfa
from .descend import backward, descend
from .lslr import lslr
from .ntk import ntk
from .ridge import ridge_head

__all__ = [
    "alfa",
    "backward",
    "descend",
    "lslr",
    "ntk",
    "ridge_head",
]
