"""LambdaMAML: learn2learn's verbs, clone() and adapt(loss), with a pattern, a rule and prefix reuse."""

from __future__ import annotations

import cmath
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels._torch import being_traced, saving_by_hooks, stand_ins_made
from lambda_kernels.chain import backend_in_force
from lambda_kernels.program import aliases_of, flatten, modes_of, replace, tensors_of

from .inner import autograd, checks, outer
from .inner.adaptation import named
from .inner.rates import DEFAULT_LR, Rate
from .inner.rule import Params, Rule, Step
from .inner.rules import rule_of
from .inner.state import Outcome, tied, version_of
from .learner import AdaptedNetwork, network_of
from .patterns import Pattern
from .plan import Frozen, Layout, Part, Plan, with_copies

__all__ = ["LambdaMAML", "TaskLearner"]


_LEARN2LEARNS = ("first_order", "allow_unused", "allow_nograd")


def _by_name(positional: tuple[Any, ...]) -> dict[str, Any]:
    """What follows the rate by its place: learn2learn's switches, where a pattern may stand for the first."""
    if len(positional) > len(_LEARN2LEARNS):
        raise TypeError(
            f"LambdaMAML takes model, lr and up to three more by their places ({', '.join(_LEARN2LEARNS)}), got "
            f"{len(positional)} more: name them"
        )
    first = "pattern" if positional and isinstance(positional[0], (str, Pattern)) else _LEARN2LEARNS[0]
    return dict(zip((first, *_LEARN2LEARNS[1:]), positional))


def _check_switches(**switches: bool | None) -> None:
    for name, value in switches.items():
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


class LambdaMAML(nn.Module):
    """A model to be meta-trained, whose clones adapt to one task each (Finn et al. 2017).

    >>> maml = LambdaMAML(model, lr=0.03, pattern="00011")
    >>> task = maml.clone()
    >>> for _ in range(5):
    ...     task.adapt(loss_fn(task(xs), ys))
    >>> loss_fn(task(xq), yq).backward()          # reaches model.parameters(), frozen layers too

    Args:
        model: any module; it becomes the submodule `module`, and its methods are this module's too.
        lr: inner learning rate, as in `adapt`; a parameter given here is learned with the model's.
        positional: up to three of learn2learn's arguments in its order, first_order, allow_unused and allow_nograd; a
            pattern may stand in the place of the first: `LambdaMAML(model, 0.03, "00011")`.
        first_order: treat the inner gradients as constants (first-order MAML).
        allow_unused: False refuses a loss that does not depend on all parameters that the pattern updates; else those
            are left as they are. True takes also a loss that depends on none of them.
        allow_nograd: for learn2learn's sake: parameters that do not require a gradient stay frozen, unless a pattern
            names them.
        pattern: one bit per layer, or a schedule over the calls of `adapt`; None updates every layer.
        norm: "follow" or "never": do norm gamma and beta follow their layer's bit.
        rule: how a step goes, in place of `lr`; see `rules`. Its parameters are learned with the model's.

    Raises:
        ValueError: the pattern does not fit the model, or a setting is out of range.
        TypeError: an argument is given twice, there are too many, or the model is none that can be adapted.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = DEFAULT_LR,
        *positional: str | Pattern | bool | None,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        pattern: str | Pattern | None = None,
        norm: str = "follow",
        rule: Rule | None = None,
    ) -> None:
        super().__init__()
        given = dict(first_order=first_order, allow_unused=allow_unused, allow_nograd=allow_nograd, pattern=pattern)
        for name, value in _by_name(positional).items():
            if given[name] is not None and value is not None:
                raise TypeError(f"LambdaMAML got {name} twice: {value!r} by its place, {given[name]!r} by its name")
            given[name] = given[name] if value is None else value
        orders: Any = {name: given[name] for name in _LEARN2LEARNS}
        _check_switches(**orders)
        pattern = given["pattern"]  # type: ignore[assignment]
        checks.check_norm(norm)
        self.rule = rule_of(lr, rule)
        self.module = network_of(model)
        self.pattern, _ = named(tensors_of(self.module)[0], Layout(self.module), pattern, norm)
        self.every_layer, self.norm = pattern is None, norm
        self.first_order, self.allow_unused = bool(orders["first_order"]), orders["allow_unused"]
        self.allow_nograd = bool(orders["allow_nograd"])
        self._losses = _Losses()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lr":  # the rates belong to the rule, which registers those that are learned
            name, value = "rule", rule_of(value)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        pattern = "all" if self.every_layer else self.pattern
        order = "first order" if self.first_order else "second order"
        return f"LambdaMAML({type(self.module).__name__}, pattern={pattern}, rule={self.rule!r}, {order})"

    @property
    def lr(self) -> Any:
        """The rule's rates, as they were given; `maml.lr = 0.1` is `maml.rule = rules.sgd(0.1)`."""
        return getattr(self.rule, "lr", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own result."""
        return self.module(*args, **kwargs)

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> TaskLearner:
        """A learner that starts from the model's present parameters; gradients of what it computes reach them.

        The arguments, where given, take the place of those of the same name.

        >>> task = LambdaMAML(model, lr=0.03).clone(first_order=True)
        >>> task(xs).shape
        torch.Size([5, 5])
        """
        _check_switches(first_order=first_order, allow_unused=allow_unused, allow_nograd=allow_nograd)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # else its tensors could never be adapted
                return self.clone(first_order, allow_unused, allow_nograd)
        checks.check_mode()
        model = self.module
        layout = Layout(model)
        parameters, buffers = tensors_of(model)
        checks.check_device(parameters)
        state = with_copies(parameters, buffers)
        # An optimiser's step must not reach the learner. Under no_grad the copies are leaves, which can be adapted.
        distinct = {id(p): p for p in parameters.values()}
        copies = {i: p.clone().requires_grad_(p.requires_grad) for i, p in distinct.items()}
        names = [layout.updated(bits, self.norm) for bits in self.pattern.stages]
        if self.every_layer:
            names = [tuple(n for n in group if state[n].requires_grad) for group in names]
        for name in {n for group in names for n in group}:
            if not state[name].requires_grad:
                copies[id(state[name])].requires_grad_()
        state = {n: copies.get(id(t), t) for n, t in state.items()}
        rule = self.rule.bind(layout.layers, state) if isinstance(self.rule, Rule) else self.rule
        settings = _Settings(
            self.pattern,
            tuple(names),
            rule,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self._losses,
        )
        return TaskLearner(model, modes_of(model), state, settings)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or name.startswith("__"):
                raise
            return getattr(module, name)


class _Losses:
    """Of which kind the losses of a module's clones were so far."""

    plain = True  # all of second-order steps were a plain cross-entropy


class _Settings(NamedTuple):
    """What all steps of a learner have in common."""

    pattern: Pattern
    updated: tuple[tuple[str, ...], ...]  # the parameters of each of the pattern's stages
    rule: Rule
    first_order: bool
    allow_unused: bool | None
    losses: _Losses

    def names(self, step: int) -> tuple[str, ...]:
        return self.updated[min(step, len(self.updated) - 1)]


class _Held(NamedTuple):
    """The frozen prefix of the last input."""

    inputs: tuple[Any, ...]
    values: list[Tensor]  # copies of both: they may be changed in place, past torch's knowledge
    read: list[Tensor]  # what it read of the state
    key: Any  # the versions of that, and the modes that it was computed in
    frozen: Frozen
    token: object  # by which the end of its graph knows it


class TaskLearner(AdaptedNetwork):
    """A model on its way through a task's inner loop: call it, give the loss to `adapt`, and so on.

    >>> task = LambdaMAML(model, lr=0.03, pattern="00011").clone()
    >>> task.adapt(loss_fn(task(xs), ys))
    >>> task(xq).shape
    torch.Size([75, 5])

    It is a module as the model is, with the parameters adapted so far; it is called as the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        modes: Mapping[str, bool],
        state: dict[str, Tensor],
        settings: _Settings,
        step: int = 0,
    ) -> None:
        super().__init__(model, modes, Outcome(state, {}, (), aliases_of(model), in_graph=True))
        self.__dict__.update(_settings=settings, _step=step, _memory=None, _prefix=None, _passed=None, _met=None)
        # Whether all second-order steps of this one so far were on a plain cross-entropy.
        self.__dict__["_plain"] = True

    def __repr__(self) -> str:
        return f"TaskLearner({type(self.__dict__['_held'][0]).__name__} after {self._step} inner steps)"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result with the parameters adapted so far; for the same input the frozen prefix runs once."""
        if being_traced():
            return self._compiled(*args, **kwargs)
        plan, network, state = self._call(args, kwargs)
        part = plan.part(self._settings.names(self._step))
        if len(args) == 1 and not kwargs and self._goes_whole(plan, part, args[0]):
            logits = plan.classify(state, args[0])
            if logits is not None:
                assert plan.chain is not None
                self.__dict__["_passed"] = plan.chain, outer.Passed.noted(plan.chain, state, args[0], logits)
                return logits
        modules = self._bind(plan, network)
        inputs = plan.program.pack(args, kwargs)
        if not part.prefix or kwargs or not all(isinstance(x, Tensor) for x in args) or stand_ins_made():
            self.__dict__["_prefix"] = None
            return part.freeze(modules, state, inputs)(modules, state)
        read = self._frozen(state, part)
        versions = [(version_of(t), t.requires_grad) for t in (*args, *read)]
        key = part, _modes((*args, *state.values())[0].device), versions
        held: _Held | None = self._prefix
        if held is None or not _same(held, args, read, key):
            frozen = part.freeze(modules, state, inputs)
            held = _Held(args, [t.detach().clone() for t in (*args, *read)], read, key, frozen, object())
            self.__dict__["_prefix"] = held
            self._forget_when_freed(held)
        return held.frozen(modules, state)

    def _goes_whole(self, plan: Plan, part: Part, x: Any) -> bool:
        """Whether a pass is one operation, where there is one: not if it can share a frozen prefix with another pass,
        nor if its gradient is to be differentiated by autograd.

        After a step, an input that is met for the first time counts as a query: its pass shares with none.
        """
        if not part.prefix:
            # What is computed anew for a checkpoint goes the same way, whatever other clones have met meanwhile.
            plain = self._plain and (self._settings.losses.plain or saving_by_hooks())
            return self._settings.first_order or plain
        held: _Held | None = self._prefix
        if self._step == 0 or not isinstance(x, Tensor) or (held is not None and held.inputs[0] is x):
            return False
        before: Any = self._met
        self.__dict__["_met"] = weakref.ref(x)
        return before is None or before() is not x

    def _frozen(self, state: Any, part: Part) -> list[Tensor]:
        """What the prefix reads of the state, where a user may have changed it."""
        network = self.__dict__["_network"]
        if network is None and not self.__dict__["_shown"]:
            return []
        read = [state[n] for step, _ in part.prefix for n in step.parameters]
        paths = [getattr(step.call, "path", "") for step, _ in part.prefix if not step.tracks]
        buffers = () if network is None else (n for n, _ in network.named_buffers())
        return read + [state[n] for n in buffers if any(n.startswith(f"{path}.") for path in paths)]

    def _forget_when_freed(self, held: _Held) -> None:
        """Drop the prefix once a backward pass has gone through it: that frees its graph.

        What is hooked onto the prefix's values holds none of them: Python finds no circle that goes through autograd's
        graph.
        """
        me, token = weakref.ref(self), held.token

        def forget(_: Tensor) -> None:
            learner = me()
            if learner is not None and learner._prefix is not None and learner._prefix.token is token:
                learner.__dict__["_prefix"] = None

        for value in flatten(held.frozen.boundary)[0]:
            if value.grad_fn is not None:
                value.register_hook(forget)

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner step: theta <- theta - lr grad loss for the parameters that the pattern updates in this step.

        The loss may hold a penalty over `parameters()`. The arguments are those of `LambdaMAML`, for this step.
        `adapt(loss)` is `update(gradients(loss))`.

        >>> task.adapt(loss_fn(task(xs), ys) + 1e-3 * sum(p.square().sum() for p in task.parameters()))

        Raises:
            ValueError: no updated parameter has a part in the loss.
            FloatingPointError: the loss is infinite or NaN.
        """
        _check_switches(allow_nograd=allow_nograd)
        if not self._first_order(first_order) and self._step_at_once(loss):
            return
        self._update(self.gradients(loss, first_order, allow_unused), loss, self._first_order(first_order))

    def _step_at_once(self, loss: Tensor) -> bool:
        """A second-order step as one operation, where the loss is cross-entropy of this learner's last pass."""
        if self._passed is None or not isinstance(loss, Tensor) or loss.numel() != 1:
            return False
        chain, passed = self._passed
        settings, index = self._settings, self._step
        names, state = settings.names(index), self._state()
        new = outer.step_of(chain, state, names, settings.rule, index, loss, passed)
        if new is None:
            return False
        self._check_loss(loss)
        self._go_on(new)
        return True

    def __copy__(self) -> Any:
        twin = super().__copy__()
        twin.__dict__.update(_prefix=None, _passed=None)  # effects are on this one's buffers
        return twin

    def gradients(self, loss: Tensor, first_order: bool | None = None, allow_unused: bool | None = None) -> Params:
        """The loss's gradients by name, of the parameters that the next step updates and that it depends on.

        >>> grads = task.gradients(loss_fn(task(xs), ys))
        >>> task.update({name: g.clamp(-1, 1) for name, g in grads.items()})

        Raises:
            ValueError, FloatingPointError: as `adapt`.
        """
        _check_switches(first_order=first_order, allow_unused=allow_unused)
        settings, index = self._settings, self._step
        unused_too = settings.allow_unused if allow_unused is None else allow_unused
        self._check_loss(loss)
        state = self._state()
        now = {n: state[n] for n in settings.names(index)}
        create_graph = not self._first_order(first_order)
        if create_graph and self._passed is not None:
            self.__dict__["_plain"] = False  # later passes go the way that autograd differentiates at once
            settings.losses.plain &= saving_by_hooks()
        grads = autograd.gradients(
            settings.pattern, now, loss, create_graph=create_graph, none=unused_too is True and loss.requires_grad
        )
        unused = [n for n in now if n not in grads]
        if unused and unused_too is False:
            raise ValueError(
                f"adapt: the loss does not depend on {', '.join(unused)}, and allow_unused is False: leave them as "
                "they are with allow_unused=True, or give their layers the bit 0"
            )
        return grads

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"adapt: the loss must be a tensor of one number, got {_told(loss)}: take its mean")
        if loss.is_complex():
            raise ValueError(f"adapt: the loss must be a real number, got {loss.dtype}: take its abs() or .real")
        value = loss.detach().item()
        if not cmath.isfinite(value):
            raise FloatingPointError(
                f"step {self._step + 1} of the inner loop: the loss is {value}; lower the rate of "
                f"{self._settings.rule!r}, or look for NaN in the images"
            )

    def update(self, grads: Params, first_order: bool | None = None) -> None:
        """One inner step with gradients of your own, by name, each of its parameter's shape.

        >>> grads = task.gradients(loss_fn(task(xs), ys))
        >>> task.update({name: g / 2 for name, g in grads.items()})

        Raises:
            ValueError: a name is not one of the parameters that the next step updates, or a gradient has another shape.
            TypeError: it is no mapping from names to tensors.
        """
        known, state = self._settings.names(self._step), self._state()
        if not isinstance(grads, Mapping) or not all(isinstance(g, Tensor) for g in grads.values()):
            raise TypeError("update: gradients are a mapping from parameter names to tensors, as `gradients` gives it")
        if unknown := [n for n in grads if n not in known]:
            raise ValueError(
                f"update: {', '.join(unknown)} is not updated in step {self._step + 1}, {', '.join(known)} are"
            )
        if wrong := [n for n, g in grads.items() if g.shape != state[n].shape]:
            told = ", ".join(f"{n} {list(state[n].shape)}, got {list(grads[n].shape)}" for n in wrong)
            raise ValueError(f"update: a gradient has its parameter's shape: {told}")
        first = next(iter(grads.values()), torch.zeros(()))
        self._update(grads, first.new_full((), torch.nan), self._first_order(first_order))

    def _first_order(self, first_order: bool | None) -> bool:
        return self._settings.first_order if first_order is None else first_order

    def _update(self, grads: Params, loss: Tensor, first_order: bool) -> None:
        settings, index, state = self._settings, self._step, self._state()
        if self._memory is None:
            everything = {n: state[n].detach() for n in dict.fromkeys(n for g in settings.updated for n in g)}
            self.__dict__["_memory"] = (settings.rule.init(everything),)
        step = Step(index, None, loss.detach(), not first_order)
        now = {n: state[n] for n in grads}
        new, memory = autograd.moved(settings.rule, self._memory[0], now, grads, step)
        self.__dict__["_memory"] = (memory,)
        self._go_on(new)

    def _go_on(self, new: dict[str, Tensor]) -> None:
        """To the next step, with the values that this one gave."""
        settings, index, state = self._settings, self._step, self._state()
        # A step's gradient is by the present values, not by what a layer, frozen so far, was to earlier steps.
        later = set(settings.names(index + 1)).difference(settings.names(index))
        new.update({n: state[n].view_as(state[n]) for n in later})
        self.__dict__.update(_step=index + 1, _passed=None)
        self._replace(new)

    def _replace(self, new: dict[str, Tensor]) -> None:
        """Put other tensors in the places of some parameters."""
        model, modes, _ = self.__dict__["_held"]
        if self.__dict__["_network"] is None:
            aliases = aliases_of(model)
            state = tied({**self._state(), **new}, aliases)
            self.__dict__["_held"] = model, modes, Outcome(state, {}, (), aliases, in_graph=True)
            return
        own = self._state()
        replace(self.module, {id(own[name]): tensor for name, tensor in new.items()})

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> TaskLearner:
        """A learner that goes on from here on its own; the arguments are those of `LambdaMAML.clone`.

        >>> twin = task.clone()
        >>> twin.adapt(loss_fn(twin(xs), ys))     # `task` stays where it is
        """
        _check_switches(first_order=first_order, allow_unused=allow_unused, allow_nograd=allow_nograd)
        model, modes, _ = self.__dict__["_held"]
        settings = self._settings
        if first_order is not None:
            settings = settings._replace(first_order=first_order)
        if allow_unused is not None:
            settings = settings._replace(allow_unused=allow_unused)
        moved = modes_of(model) != modes  # the model's modes, since this one was made
        network = self.module if moved or self.__dict__["_network"] is not None else model
        state = self._state()
        copies = {id(b): b.clone() for b in (state[n] for n, _ in network.named_buffers() if n in state)}
        state = {n: copies.get(id(t), t) for n, t in state.items()}
        twin = TaskLearner(network, modes_of(network), state, settings, self._step)
        twin.__dict__.update(_memory=self._memory, _plain=self._plain)
        twin.training = self.training
        return twin


def _same(held: _Held, args: tuple[Any, ...], read: list[Tensor], key: Any) -> bool:
    mine, given = (*held.inputs, *held.read), (*args, *read)
    same = len(mine) == len(given) and all(a is b for a, b in zip(mine, given))
    return same and held.key == key and all(torch.equal(mine, t.detach()) for mine, t in zip(held.values, given))


def _modes(device: torch.device) -> tuple[Any, ...]:
    """What, beside the network and its input, decides what a forward pass computes, and with which graph."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, backend_in_force()


def _told(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
