"""For make lint: the licences of what requirements.txt names and of all that those need; and known vulnerabilities,
where pip-audit and what it asks are reached: if not, it says so and goes on. The argument is a folder for pip-audit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
FREE = re.compile(
    r"(MIT|MIT-CMU|ISC|PSF-2.0|Python Software Foundation|BSL-1.0|0BSD|Zlib|HPND|CC0-1.0|Unlicense|Public Domain|"
    r"MPL[- ]2.0|Mozilla Public|(3-Clause )?BSD\b|Apache\b|LLVM-exception).*", re.IGNORECASE | re.DOTALL,
)  # fmt: skip
SECONDS = 60


def licences(about: Any) -> list[str]:
    """What a distribution's metadata say: by an expression, else by classifiers, else in words."""
    if expression := about.get("License-Expression"):
        return [part for part in re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", expression) if part]
    ends = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or [] if line.startswith("License :: ")]
    return [end for end in ends if end != "OSI Approved"] or [about.get("License") or "none named"]


def needed(names: list[str]) -> dict[str, Any]:
    """By name the metadata of what is installed of these packages and of all that they need."""
    found: dict[str, Any] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found[name] = distribution.metadata
        wanted = map(Requirement, distribution.requires or [])
        names += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def not_free(found: dict[str, Any]) -> list[str]:
    """Packages with a licence that is none of FREE."""
    return [f"{name}: {said[:60]}" for name, about in found.items() for said in licences(about) if not FREE.match(said)]


def audited(folder: Path) -> list[str] | None:
    """The known vulnerabilities of what requirements.txt pins; None where nothing could be asked."""
    python, report = folder / "bin" / "python", folder / "report.json"
    report.unlink(missing_ok=True)
    install = ["-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--retries", "0", "--timeout", "5"]
    options = ["--no-deps", "--disable-pip", "--timeout", "5", "--progress-spinner", "off", "--format", "json"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), *install, "pip-audit"],
        [str(python), "-m", "pip_audit", "--requirement", str(REQUIREMENTS), *options, "--output", str(report)],
    ]
    for step in steps if not (folder / "bin" / "pip-audit").exists() else steps[2:]:
        try:
            subprocess.run(step, capture_output=True, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return None
    return told(report.read_text(encoding="utf-8")) if report.is_file() else None


def told(report: str) -> list[str]:
    """The lines of pip-audit's JSON that name a vulnerability."""
    return [
        f"{one['name']} {one['version']}: {fault['id']}, repaired in {', '.join(fault['fix_versions']) or 'no version'}"
        for one in json.loads(report)["dependencies"]
        for fault in one.get("vulns", [])
    ]


if __name__ == "__main__":
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    packages = needed([Requirement(line).name for line in lines if line])
    strange, vulnerable = not_free(packages), audited(Path(sys.argv[1]))
    print(f"licences of {len(packages)} packages: {'; '.join(strange) or 'all free'}")
    if vulnerable is None:
        print("pip-audit: nothing could be asked, vulnerabilities are not looked for")
    else:
        print("pip-audit:", "\n".join(vulnerable) or "nothing is known of what is pinned")
    sys.exit(1 if strange or vulnerable else 0)
