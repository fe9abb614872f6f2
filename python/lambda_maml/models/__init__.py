"""Networks by name, and the settings from which each is built anew."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import lambda_kernels as lk

from ..network import layers_of
from .conv4 import Conv4, conv4
from .resnet12 import ResNet12, resnet12

__all__ = [
    "NAMES", "Conv4", "ResNet12", "build", "config_of", "conv4", "create", "image_shape", "layer_names", "resnet12"
]  # fmt: skip

_NETWORKS: dict[str, tuple[type[nn.Module], Callable[..., nn.Module]]] = {
    "conv4": (Conv4, conv4),
    "resnet12": (ResNet12, resnet12),
}
NAMES = tuple(_NETWORKS)
"""The built-in networks."""


def config_of(model: nn.Module) -> dict[str, Any]:
    """The settings from which `build` makes the same network anew.

    >>> config_of(conv4(ways=5, in_channels=1, width=32, image_size=28))
    {'network': 'conv4', 'ways': 5, 'in_channels': 1, 'width': 32, 'image_size': 28}

    Raises:
        ValueError: neither a function of this module nor `build` made the network.
    """
    for name, (kind, function) in _NETWORKS.items():
        if isinstance(model, kind):
            settings = {key: getattr(model, key) for key in inspect.signature(function).parameters}
            # JSON has no tuples
            return {"network": name, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}
    if model not in _BUILT:
        raise ValueError(
            f"the settings of {type(model).__name__} are not known, so that a checkpoint could not build it anew: make "
            "it with models.create('MODULE:FUNCTION', ways=..., in_channels=..., image_size=...)"
        )
    return copy.deepcopy(_BUILT[model])


def image_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images that the network of some settings is for.

    >>> image_shape({"network": "conv4", "ways": 5, "in_channels": 1, "width": 32, "image_size": 28})
    (1, 28, 28)

    Raises:
        ValueError: the settings do not say it; names what is missing.
    """
    missing = [key for key in ("in_channels", "image_size") if key not in config]
    if missing:
        raise ValueError(
            f"the settings of {config.get('network')} have no {' and no '.join(missing)}, so that images cannot be "
            "read for it: make it with models.create('MODULE:FUNCTION', ways=..., in_channels=..., image_size=...)"
        )
    size = config["image_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config["in_channels"], height, width


def create(network: str, **settings: Any) -> nn.Module:
    """A network by its name, one of `NAMES`, and what its function takes.

    >>> create("resnet12", ways=5, in_channels=1, image_size=28, widths=[8, 8, 8, 8])(xs).shape
    torch.Size([5, 5])

    A network of your own is named by the function that makes it: create("my_networks:resnet", ways=5, in_channels=3,
    image_size=84, args={"depth": 12}) imports `my_networks` and gives the result of `resnet(ways=5, in_channels=3,
    image_size=84, depth=12)`, converted by `lambda_kernels.convert`. A function that has no parameter `image_size` is
    called without it.

    Raises:
        ValueError: there is no such network or function, it takes other arguments, or gives no module.
    """
    if isinstance(network, str) and ":" in network:
        return _of_function(network, settings)
    if network not in _NETWORKS:
        raise ValueError(
            f"there is no network {network!r}: choose {' or '.join(NAMES)}, or name your function as MODULE:FUNCTION"
        )
    function = _NETWORKS[network][1]
    try:
        inspect.signature(function).bind(**settings)
    except TypeError as error:
        raise ValueError(f"settings of {network}: {error}") from None
    return function(**settings)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of settings as `config_of` gives them.

    >>> build({"network": "conv4", "ways": 5, "in_channels": 1, "width": 32, "image_size": 28})(xs).shape
    torch.Size([5, 5])

    Raises:
        ValueError: as `create`.
    """
    settings = dict(config)
    return create(settings.pop("network", None), **settings)


_BUILT: MutableMapping[nn.Module, dict[str, Any]] = WeakIdKeyDictionary()  # the settings of networks of functions


def _of_function(name: str, settings: dict[str, Any]) -> nn.Module:
    """The module that MODULE:FUNCTION makes."""
    where, _, attribute = name.partition(":")
    try:
        made_by: Any = importlib.import_module(where)
        for part in attribute.split("."):
            made_by = getattr(made_by, part)
    except ImportError as error:
        raise ValueError(
            f"network {name}: {where} cannot be imported ({error}): its folder must be the current one or in PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ValueError(f"network {name}: {error}") from error
    given = {**settings, **settings.get("args", {})}
    given.pop("args", None)
    try:
        signature = inspect.signature(made_by)
        takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        if not takes_all and "image_size" not in signature.parameters:
            given.pop("image_size", None)
        signature.bind(**given)
    except (TypeError, ValueError) as error:
        told = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"network {name}: it cannot be called with {told} ({error})") from error
    model = made_by(**given)
    if not isinstance(model, nn.Module):
        raise ValueError(f"network {name}: it gave a {type(model).__name__}, expected a torch.nn.Module")
    model = lk.convert(model)
    _BUILT[model] = {"network": name, **copy.deepcopy(settings)}
    return model


def layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that a pattern's bits stand for, input first."""
    return [layer.name for layer in layers_of(model)]
