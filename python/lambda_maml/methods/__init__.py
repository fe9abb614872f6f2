"""Methods related to MAML under patterns, each as a part for one of the `places`: one file a method."""

from .alfa import alfa
from .catalogue import METHODS as METHODS
from .descend import backward, descend
from .fisher import fisher
from .forward_gradient import forward_gradient
from .local_losses import local_losses
from .lslr import lslr
from .ntk import ntk
from .objectives import direct, query_loss
from .pruned_context import bootstrap, rescaled, top_gradient
from .remembering import remembering
from .ridge import ridge_head
from .siren import pictures, psnr, sines, siren
from .sources import covering, endless, pool, prioritised
from .sparse_rates import schedule_of, sparse_rates
from .steepest import steepest
from .task_weights import spsa, spsa_track, uncertainty, uniform
from .variational import cut, kl, prune, sparse_conv4, variational

__all__ = [
    "alfa",
    "backward",
    "bootstrap",
    "covering",
    "cut",
    "descend",
    "direct",
    "endless",
    "fisher",
    "forward_gradient",
    "kl",
    "local_losses",
    "lslr",
    "ntk",
    "pictures",
    "pool",
    "prioritised",
    "prune",
    "psnr",
    "query_loss",
    "remembering",
    "rescaled",
    "ridge_head",
    "schedule_of",
    "sines",
    "siren",
    "sparse_conv4",
    "sparse_rates",
    "spsa",
    "spsa_track",
    "steepest",
    "top_gradient",
    "uncertainty",
    "uniform",
    "variational",
]
