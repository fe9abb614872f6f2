"""Methods related to MAML under patterns, each as a part for one of the `places`: one file a method."""

from .alfa import alfa
from .descend import backward, descend
from .lslr import lslr
from .ntk import ntk
from .objectives import direct, query_loss
from .remembering import remembering
from .ridge import ridge_head
from .sources import covering, endless, pool, prioritised
from .task_weights import spsa, spsa_track, uncertainty, uniform

__all__ = [
    "alfa",
    "backward",
    "covering",
    "descend",
    "direct",
    "endless",
    "lslr",
    "ntk",
    "pool",
    "prioritised",
    "query_loss",
    "remembering",
    "ridge_head",
    "spsa",
    "spsa_track",
    "uncertainty",
    "uniform",
]
