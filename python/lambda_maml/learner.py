"""A network with parameters of its own, adapted ones, in the shape of the model that it came from."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lambda_kernels._torch import being_traced, for_good, stand_ins_made
from lambda_kernels.evaluated import Evaluated
from lambda_kernels.norms import exact_norms
from lambda_kernels.program import OwnState, aliases_of, modes_of, program_for, replace, shadow, snapshot_of, tensors_of
from lambda_kernels.program.structure import flatten

from .export import Contents, export
from .inner.state import Outcome
from .plan import Plan, plan_of
from .statistics import fold as folded
from .statistics import freeze, norms_of_batches, warn_of_few

__all__ = ["AdaptedNetwork", "Learner", "learner_of", "network_of", "support_of"]

_CONTENTS = ("_parameters", "_buffers", "_modules")


def _opened(name: str) -> property:
    """What nn.Module keeps under this name, which is the network's own, made when it is first read."""

    def get(self: AdaptedNetwork) -> Any:
        if "_held" in self.__dict__:
            self._open()
        return self.__dict__[name]

    def put(self: AdaptedNetwork, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


class AdaptedNetwork(nn.Module):
    """A model's twin with other parameters; the model is left as it is.

    It is a module as the model is: `parameters()`, `state_dict()`, `eval()`, `to()`, layers and methods are those of
    the twin, under the model's own names. The twin (`module`) is made when it is first needed; until then a call
    runs the model's program with the adapted parameters. Modes are those of the model at the time of adapting.
    """

    _always_classifies = False  # else a call with gradients may be an inner step
    _parameters = _opened("_parameters")
    _buffers = _opened("_buffers")
    _modules = _opened("_modules")

    def __init__(self, model: nn.Module, modes: Mapping[str, bool], outcome: Outcome) -> None:
        super().__init__()
        self.__dict__.update(
            training=model.training,
            _network=None,
            _shown=False,
            _held=(model, modes, outcome),
            _bound={},
            _parts={},
            _exported=None,
            _support=None,
            _chain=Evaluated(),
            _built=None if being_traced() else snapshot_of(model),
        )

    @property
    def module(self) -> nn.Module:
        """The adapted network, of the model's class. It holds the adapted tensors, which may be part of a graph."""
        network = self._open()
        if network.training is not self.training:
            network.training = self.training
        return network

    def _open(self) -> nn.Module:
        found: nn.Module | None = self.__dict__["_network"]
        if found is not None:
            return found
        model, modes, outcome = self.__dict__["_held"]
        self._check_model(model)
        network = for_good(lambda: shadow(model, outcome.state, modes))
        self.__dict__.update(_network=network, _bound={})
        self.__dict__.update({name: network.__dict__[name] for name in _CONTENTS})
        return network

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, nn.Module, Mapping[str, Tensor]]:
        """What a call runs: a plan, the network whose modules it uses, and the state."""
        model, modes, outcome = self.__dict__["_held"]
        if self.__dict__["_network"] is None and modes_of(model) == modes:
            self._check_model(model)
            return plan_of(model, program_for(model, args, kwargs)), model, outcome.state
        network = self.module
        program = program_for(network, args, kwargs)
        # What cannot be looked into runs on the learner's own network, which holds what was set on it.
        state = self._state() if program.untraceable is None else OwnState(network)
        return plan_of(network, program), network, state

    def _check_model(self, model: nn.Module) -> None:
        """RuntimeError where the model, of which this is a twin to be, has another structure by now."""
        built: Any = self.__dict__["_built"]
        present = snapshot_of(model)
        if built is None or present is built:
            return
        if (what := built.rebuilt(model)) is not None:
            raise RuntimeError(
                f"{type(model).__name__} was changed after the adaptation: {what}. A learner keeps the layers that it "
                "was adapted with once its `module` was read: read it before the change, or adapt anew"
            )
        self.__dict__["_built"] = present or built

    def _state(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, as adapted so far."""
        _, _, outcome = self.__dict__["_held"]
        if self.__dict__["_network"] is None:
            state: dict[str, Tensor] = outcome.state
            return state
        parameters, buffers = tensors_of(self.module)
        return {**parameters, **buffers}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted network's result, for what the model itself is called with."""
        if being_traced():
            return self._compiled(*args, **kwargs)
        plan, network, state = self._call(args, kwargs)
        if len(args) == 1 and not kwargs:
            if plan.normalises_batches and (self._always_classifies or not torch.is_grad_enabled()):
                warn_of_few(args[0])
            logits = plan.classify(state, args[0])
            logits = self._evaluated(plan, network, state, args[0]) if logits is None else logits
            if logits is not None:
                return logits
        with exact_norms():
            return plan.program.evaluate(self._bind(plan, network), state, *args, **kwargs)

    def _evaluated(self, plan: Plan, network: nn.Module, state: Mapping[str, Tensor], x: Any) -> Tensor | None:
        """The logits by one operation, where the norms have fixed statistics; those are folded anew after a change."""
        chain = plan.evaluated(network)
        if chain is None:
            return None
        evaluated: Evaluated = self.__dict__["_chain"]
        return evaluated(chain, state, x)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """What torch.compile, torch.export and torch.jit trace: the network's own forward. By Dynamo's hand
        torch.export takes for parameters what `named_parameters` gave it."""
        if torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling():
            return self.__dict__["_exported"](*args, **kwargs)
        return self.module(*args, **kwargs)

    def _bind(self, plan: Plan, network: nn.Module) -> Mapping[str, nn.Module]:
        """The modules that the plan's steps use, one binding per learner: what a forward writes to them stays."""
        bound: dict[Any, Mapping[str, nn.Module]] = self.__dict__["_bound"]
        key = plan.program if plan.program.untraceable is None else ""
        modules = bound.get(key)
        if modules is None:
            modules = plan.program.bind(network)
            if not stand_ins_made():
                bound[key] = modules
        return modules

    def parameters_dict(self) -> dict[str, Tensor]:
        """All parameters by name, the adapted ones in place of the model's.

        >>> list(adapt(model, xs, ys, pattern="00001").parameters_dict())[-2:]
        ['head.weight', 'head.bias']
        """
        state = self._state()
        self.__dict__["_shown"] = True
        return {name: state[name] for name, _ in self.__dict__["_held"][0].named_parameters()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """As the model's, with the adapted tensors, which may be part of a graph. torch.export, which takes no such
        tensor for a parameter, gets parameters that share their values."""
        asks = sys._getframe(1).f_globals.get("__name__", "")
        if asks.startswith(("torch.export.", "torch._export.")):
            return self._to_export().named_parameters(*args, **kwargs)
        return super().named_parameters(*args, **kwargs)

    def _to_export(self) -> nn.Module:
        """The network around parameters that are part of no graph: the same ones as long as the network has its own."""
        parameters, buffers = tensors_of(self.module)
        known: dict[int, tuple[Tensor, Tensor]] = {}
        for p in parameters.values():
            given, own = self.__dict__["_parts"].get(id(p), (None, None))
            if given is not p:
                own = p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            known[id(p)] = p, own
        tensors = {n: known[id(p)][1] for n, p in parameters.items()}
        twin = for_good(lambda: shadow(self.module, {**tensors, **buffers}))
        self.__dict__.update(_parts=known, _exported=twin)
        return twin

    def to_module(self) -> nn.Module:
        """A copy of the network with the adapted parameters and buffers as its own; no graph leads out of it.

        >>> network = adapt(model, xs, ys, pattern="00001").to_module()
        >>> type(network) is type(model), network.head.weight.is_leaf
        (True, True)
        """
        learned = {n: p.requires_grad for n, p in self.__dict__["_held"][0].named_parameters(remove_duplicate=False)}
        parameters, buffers = tensors_of(self.module)
        own: dict[int, Tensor] = {}  # shared tensors stay shared
        for name, p in parameters.items():
            flag = learned.get(name, p.requires_grad)
            own.setdefault(id(p), nn.Parameter(p.detach().clone(), requires_grad=flag))
        own.update({id(b): b.detach().clone() for b in buffers.values()})
        twin = shadow(self.module, {n: own[id(t)] for n, t in (*parameters.items(), *buffers.items())})
        for part in twin.modules():  # old-style hooks make what they keep here anew: the weight of weight_norm, say
            kept = {n: t.detach() for n, t in part.__dict__.items() if isinstance(t, Tensor) and t.grad_fn is not None}
            part.__dict__.update(kept)
        return twin

    def train(self, mode: bool = True) -> Any:
        """As the model's own `train`, of this network."""
        network = self.module.train(mode)
        self.__dict__["training"] = network.training
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """What the network has, and tensors and layers, are set on the network, whose forward looks for them there."""
        own = name in self.__dict__ or hasattr(type(self), name)
        if own or not (isinstance(value, (Tensor, nn.Module)) or hasattr(self._network or self._held[0], name)):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    # What nn.Module would do in place, on tensors that are part of a graph or the model's own.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        replace(self.module, {key: fn(tensor) for key, tensor in own.items()})
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Cuts all parameters off from the graph that they are part of (False), or makes leaves of those without
        one."""
        on = (lambda t: t if t.requires_grad else t.detach().requires_grad_()) if requires_grad else Tensor.detach
        buffers = {id(b) for b in self.module.buffers()}
        return self._apply(lambda t: t if id(t) in buffers else on(t))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, with the adapted tensors: `model.load_state_dict(learner.state_dict())`."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads into tensors of its own; the model keeps its values."""
        self._own()
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # where it is a part of what is loaded
        self._own()
        super()._load_from_state_dict(*args, **kwargs)

    def _own(self) -> None:
        self._apply(lambda t: t.detach().clone().requires_grad_(t.requires_grad))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_held" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(self.module, name)
        except AttributeError:
            model = type(self.__dict__["_held"][0]).__name__
            raise AttributeError(f"neither {type(self).__name__} nor its network, a {model}, has {name!r}") from None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A learner of its own: the same values and modes, with leaves as parameters."""
        network = self.to_module()
        twin = copy.copy(self)
        twin.__dict__.update(_network=network, **{name: network.__dict__[name] for name in _CONTENTS})
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _chain=Evaluated())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return learner_of, (self.to_module(),)


class Learner(AdaptedNetwork):
    """A network adapted to one task: `learner(xq)` are its logits.

    >>> learner = adapt(model, xs, ys, pattern="00011")
    >>> learner(xq).shape
    torch.Size([75, 5])
    >>> sorted(learner.state_dict()) == sorted(model.state_dict())
    True
    >>> learner                                  # learner.module prints as the model does
    Learner(Conv4, adapted: block4.conv, block4.norm, head)

    Its frozen parameters are the model's own: a later change of them shows here. `to_module` gives a copy of its own.
    It refers to the support set, for `freeze_statistics`.
    """

    _always_classifies = True

    def __repr__(self) -> str:
        model, _, outcome = self.__dict__["_held"]
        parts = list(dict.fromkeys(name.rpartition(".")[0] for name in outcome.updated))
        if len(parts) > 6:
            parts[2:-2] = [f"... {len(parts) - 4} more ..."]
        return f"Learner({type(model).__name__}{', adapted: ' if parts else ''}{', '.join(parts)})"

    def freeze_statistics(self, xs: Any = None) -> Learner:
        """Take the norms' statistics from one pass of the adapted network over the support set, for good.

        A prediction is then of its own image, whatever images are classified beside it. By default a batch norm without
        running statistics normalises all query images together, and one image alone by itself.

        >>> learner = adapt(model, xs, ys, pattern="00011").freeze_statistics()
        >>> torch.allclose(learner(xq)[:1], learner(xq[:1]), atol=1e-5)                        # roundings
        True

        The norms hold these statistics as `running_mean` and `running_var` and are in evaluation mode (`train()` takes
        them back to the batch's own). Statistics are constants: no gradient goes through them.

        Args:
            xs: the support set; None: that of `adapt`, as it was.

        Raises:
            ValueError: the support set is not known any more (a copied or loaded learner) or was changed in place (as
                far as torch counts writes: not those through `.data` or `.numpy()`); a norm is called several times; a
                result still depends on the images beside it.
        """
        freeze(self.module, self._support_set(xs))
        self.__dict__["_bound"] = {}
        return self

    def to_module(self, fold: bool = False) -> nn.Module:
        """As of any adapted network; with `fold` norms with fixed statistics are part of the layers ahead of them.

        A folded chain of blocks is one operation in each call without gradients. It sees whatever changes its
        parameters.

        >>> network = adapt(model, xs, ys, pattern="00011").freeze_statistics().to_module(fold=True)
        >>> network.block1.norm
        Identity()

        Raises:
            ValueError: `fold`, and a norm takes its statistics from each batch, the network cannot be looked into, or
                the support set, by which it is, is not known any more.
        """
        network = super().to_module()
        if fold:
            folded(network, self._support_set(None))
        return network

    def export(
        self, path: str | Path, *, classes: Sequence[str] | None = None, mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None, invert: bool = False, normalise: bool = False, example: Any = None,
    ) -> None:  # fmt: skip
        """Write the network to a file that needs nothing of this package: .pt2 (`torch.export.load`) or .onnx.

        It takes any number of images and classifies each by itself, in evaluation mode: norms that would use a batch's
        statistics get those of the support set, as by `freeze_statistics`. The learner stays as it is.

        >>> learner.export("adapted.pt2", classes=["cat", "dog"], mean=[0.5], std=[0.25])
        >>> torch.export.load("adapted.pt2").module()(xq).shape
        torch.Size([75, 2])

        Args: see `lambda_maml.export.export`. example: images [N, C, H, W] to trace by; None: the support set.

        Raises:
            ValueError: torch.export or torch.onnx cannot take the network, or what is said of it does not fit it.
            OSError: the file cannot be written; an earlier one stays as it was.
        """
        network = super().to_module()
        if norms_of_batches(network):
            freeze(network, self._support_set(None))
        xs = self._support_set(None) if example is None else example
        export(network, xs, path, Contents(classes, mean, std, invert, normalise))

    def _support_set(self, xs: Any) -> Any:
        if xs is not None:
            self.__dict__["_support"] = support_of(xs)
            return xs
        if (support := self.__dict__["_support"]) is None:
            raise ValueError("the support set of this learner is not known: give it, freeze_statistics(xs)")
        xs, versions = support
        if support_of(xs)[1] != versions:
            raise ValueError("the support set was changed in place since `adapt`: give it, freeze_statistics(xs)")
        return xs

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = super().__deepcopy__(memo)
        twin.__dict__["_support"] = None
        return twin


def support_of(xs: Any) -> tuple[Any, list[int]]:
    """A support set, and how often each of its tensors was written to."""
    tensors = [xs] if isinstance(xs, Tensor) else flatten(xs)[0]
    return xs, [0 if t.is_inference() else t._version for t in tensors]


def learner_of(network: nn.Module) -> Learner:
    """A learner around a network that is adapted already, its own from now on; its support set is not known."""
    parameters, buffers = tensors_of(network)
    return Learner(network, modes_of(network), Outcome({**parameters, **buffers}, {}, (), aliases_of(network), True))


def network_of(model: nn.Module) -> nn.Module:
    """The network to adapt: a learner's adapted one, or the model itself.

    Raises:
        TypeError: it is no module, or one whose parameters cannot be replaced.
    """
    if isinstance(model, AdaptedNetwork):
        return model.module
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {model!r}: an instance, not its class or a function")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(model).__name__} is a module of torch.jit, whose parameters cannot be replaced: adapt the module "
            "that it was made of, and script or trace learner.to_module()"
        )
    return model
