"""Other packages' networks: higher patches every module and hands the parameters over in each call.

Its patched layers are classes of their own, which no block is fused from. So a fused network that higher has patched
runs as its unpatched twin: the same attributes and buffers, and higher's fast weights as parameters.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["unpatched"]

_TWINS: MutableMapping[nn.Module, _Twin] = WeakIdKeyDictionary()
_OWN = frozenset(
    "_parameters _modules _param_mapping _being_modified_internally _track_higher_grads _root_ref _fast_params "
    "_param_names _original_params".split()
)  # what the twin has of its own, and what higher keeps in a module


class _Twin:
    """The modules of a patched network without higher's classes, in the order in which it counts fast weights."""

    def __init__(self, root: Any) -> None:
        # By identity: a patched module keeps its attributes, and the twin keeps none of the patched ones alive.
        self.modules: dict[int, nn.Module] = {}
        for module in root.modules():
            self.modules[id(module)] = object.__new__(type(module).__mro__[1])
        for module in root.modules():
            children = {name: self.modules[id(child)] for name, child in module._modules.items()}
            self.modules[id(module)].__dict__.update(_parameters={}, _modules=children)

    def refreshed(self, root: Any) -> None:
        """Take over the attributes, buffers, modes and fast weights of the moment."""
        weights = iter(root._expand_params(root.fast_params))
        for _, module in root.named_modules(remove_duplicate=False):  # higher counts a shared module's weights twice
            twin = self.modules[id(module)].__dict__
            twin.update((name, value) for name, value in module.__dict__.items() if name not in _OWN)
            names = set(module._param_names)
            own = {name: next(weights) if name in names else value for name, value in module._parameters.items()}
            twin["_parameters"].update(own)


def unpatched(module: Any) -> nn.Module:
    """A module that higher has patched, as it was before, with the fast weights of the moment; any other, itself.

    with higher.innerloop_ctx(model, optimizer) as (patched, _):
        unpatched(patched)                      # a module of the model's class
    """
    patch = sys.modules.get("higher.patch")
    if patch is None or not isinstance(module, patch._MonkeyPatchBase):
        return module
    root: Any = module.root
    twin = _TWINS.get(root)
    if twin is None:
        twin = _TWINS[root] = _Twin(root)
    twin.refreshed(root)
    return twin.modules[id(module)]
