"""Licences and known vulnerabilities, as `make lint` looks for them."""

from __future__ import annotations

import json
import subprocess
from email.message import Message
from pathlib import Path

import dependencies
import pytest


def about(**fields: str) -> Message:
    found = Message()
    for name, value in fields.items():
        found[name.replace("_", "-")] = value
    return found


@pytest.mark.parametrize(
    ("fields", "strange"),
    [
        ({"License_Expression": "MIT AND (Apache-2.0 WITH LLVM-exception)"}, []),
        ({"License_Expression": "MIT AND GPL-3.0-only"}, ["x: GPL-3.0-only"]),
        ({"Classifier": "License :: OSI Approved :: BSD License", "License": "long text"}, []),
        ({"Classifier": "License :: Other/Proprietary License"}, ["x: Other/Proprietary License"]),
        ({"License": "3-Clause BSD License"}, []),
        ({}, ["x: none named"]),
    ],
)
def test_licences_are_told_apart(fields: dict[str, str], strange: list[str]) -> None:
    assert dependencies.not_free({"x": about(**fields)}) == strange


def test_what_a_package_needs_is_looked_at_too() -> None:
    found = dependencies.needed(["pytest", "no-such-package"])
    assert {"pytest", "pluggy"} <= found.keys() and "no-such-package" not in found
    assert dependencies.not_free(found) == []


def test_vulnerabilities_are_named_and_an_index_that_is_not_reached_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults = [{"id": "CVE-1", "fix_versions": ["2.0"]}, {"id": "CVE-2", "fix_versions": []}]
    report = {"dependencies": [{"name": "a", "version": "1.0", "vulns": faults}, {"name": "b", "skip_reason": "?"}]}
    want = ["a 1.0: CVE-1, repaired in 2.0", "a 1.0: CVE-2, repaired in no version"]
    assert dependencies.told(json.dumps(report)) == want
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    assert dependencies.audited(tmp_path) is None and len(asked) == 3
