"""pattern.json, a selection as a file: read back in the form that `Selection.to_dict` gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .files import read_json
from .forms import Count, Finite, From1, NotBelow0, Positive, Share, checked
from .patterns import Pattern

__all__ = ["read_selection"]

_REMEDY = "select a pattern again: lambda-maml select"


class _Time(msgspec.Struct):
    """Milliseconds: the median and the quartiles around it."""

    low: Positive
    median: Positive
    high: Positive


class _Row(msgspec.Struct):
    """Files of before 2026-12-01 have neither tasks nor time nor admissible."""

    pattern: str
    time_ms: Positive
    ci95: NotBelow0 | None
    accuracy: Finite | None = None
    score: Finite | None = None  # of another metric than accuracy
    tasks: From1 | None = None  # on how many it was judged
    time: _Time | None = None
    steps: From1 | None = None  # where several were compared, as lr
    lr: Positive | None = None
    memory_mb: NotBelow0 | None = None


class _Budget(msgspec.Struct):
    time_ms: Positive | None
    memory_mb: Positive | None


class _Search(msgspec.Struct):
    kind: Literal["all", "race"]
    tasks: From1
    candidates: From1
    adaptations: From1
    error: Share | None = None


class _Candidate(_Row, kw_only=True):
    drop: Finite | None
    drop_bound: Finite | None
    admissible: bool | None = None


class _Stock(msgspec.Struct):
    pattern: str
    time_ms: Positive | None
    time: _Time | None = None


class _Compared(msgspec.Struct, kw_only=True):
    drop: Finite | None
    drop_ci95: NotBelow0 | None
    full_accuracy: Finite | None | msgspec.UnsetType = msgspec.UNSET
    chosen_accuracy: Finite | None | msgspec.UnsetType = msgspec.UNSET
    full_score: Finite | None | msgspec.UnsetType = msgspec.UNSET
    chosen_score: Finite | None | msgspec.UnsetType = msgspec.UNSET


class _Figures(msgspec.Struct, kw_only=True):
    """What a rule per task is worth on so many tasks."""

    tasks: From1
    share: Share
    time_ms: Positive
    gain: Finite
    gain_ci95: NotBelow0 | None
    accuracy: Finite | None = None
    score: Finite | None = None


class _PerTask(_Figures, kw_only=True):
    cheap: Count  # rows of the candidates
    dear: Count
    statistic: Literal["entropy", "support_loss"]
    threshold: Finite
    test: _Figures | None = None


class _OnTest(_Compared, kw_only=True):
    tasks: Count
    support: _Compared | None = None  # files of before 2026-11-29 have none


class _Form(msgspec.Struct):
    schema: Literal[1]
    network: str
    ways: From1 | None
    shots: From1
    steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    lr: NotBelow0 | list[Any] | None
    norm: Literal["follow", "never"]
    max_drop: NotBelow0 | None  # None where a budget stands in its place
    rule: Literal["bound", "point"]
    chosen: _Candidate
    full: _Row
    stock_full: _Stock
    test: _OnTest
    candidates: Annotated[list[_Candidate], msgspec.Meta(min_length=1)]
    environment: dict[str, Any]
    relative: bool = False
    inner_rule: str | None = None
    metric: str | None = None
    budget: _Budget | None = None
    statistics: Literal["batch", "support"] = "batch"
    search: _Search | None = None
    front: list[Count] | None = None  # rows of the candidates
    per_task: _PerTask | None = None


def read_selection(path: str | Path) -> dict[str, Any]:
    """Read pattern.json back.

    >>> read_selection("runs/demo/pattern.json")["chosen"]["pattern"]
    '00010'

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is missing, of another type or out of range, or two contradict each other; names the file,
            the field and what helps.
    """
    value = read_json(path)
    form: _Form = checked(value, _Form, path, _REMEDY)
    key = "accuracy" if form.metric is None else "score"
    places: list[tuple[str, object]] = [("chosen", form.chosen), ("full", form.full)]
    places += [(f"candidates[{index}]", row) for index, row in enumerate(form.candidates)]
    missing = [f"{place}.{key}" for place, row in places if getattr(row, key) is None]
    for place, compared in (("test", form.test), ("test.support", form.test.support)):
        names = [f"full_{key}", f"chosen_{key}"] if compared is not None else []
        missing += [f"{place}.{name}" for name in names if getattr(compared, name) is msgspec.UNSET]
    for place, figures in (("per_task", form.per_task), ("per_task.test", form.per_task and form.per_task.test)):
        if figures is not None and getattr(figures, key) is None:
            missing.append(f"{place}.{key}")
    if form.lr is None and form.inner_rule is None:
        missing.append("lr")
    if form.max_drop is None and form.budget is None:
        missing.append("max_drop")
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing; {_REMEDY}")
    _check_patterns(path, form)
    return dict(value)


def _identity(row: _Row) -> tuple[str, int | None, float | None]:
    return row.pattern, row.steps, row.lr


def _check_patterns(path: str | Path, form: _Form) -> None:
    """ValueError where a pattern is none, or the choice is not among the candidates."""
    rows = {_identity(row): row for row in form.candidates}
    for index, row in enumerate(form.candidates):
        try:
            Pattern.parse(row.pattern)
        except ValueError as error:
            raise ValueError(f"{path}: candidates[{index}].pattern: {error}; {_REMEDY}") from error
    for key, named in (("chosen", form.chosen), ("full", form.full)):
        if (key_of := _identity(named)) not in rows or rows[key_of].time_ms != named.time_ms:
            raise ValueError(f"{path}: {key} is {named.pattern}, which is not so among the candidates; {_REMEDY}")
    beyond = [at for at in form.front or [] if at >= len(form.candidates)]
    if beyond:
        raise ValueError(f"{path}: front names row {beyond[0]} of {len(form.candidates)} candidates; {_REMEDY}")
    if (rule := form.per_task) is not None:
        for key, at in (("cheap", rule.cheap), ("dear", rule.dear)):
            if at >= len(form.candidates):
                raise ValueError(
                    f"{path}: per_task.{key} names row {at} of {len(form.candidates)} candidates; {_REMEDY}"
                )
        cheap, dear = (form.candidates[at] for at in (rule.cheap, rule.dear))
        if not cheap.time_ms < dear.time_ms:
            raise ValueError(
                f"{path}: per_task adapts anew by {dear.pattern}, which is not slower than {cheap.pattern}; {_REMEDY}"
            )
    if form.stock_full.pattern != form.full.pattern:
        raise ValueError(f"{path}: stock_full.pattern is {form.stock_full.pattern}, not {form.full.pattern}; {_REMEDY}")
