"""What runs here: versions, build, processor, devices, and each backend with the reasons why it cannot run.

`python -m lambda_kernels.info` prints it, with `--json` for programs. With `--choices` it prints which backend was
measured fastest for which call on each CUDA device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy
import torch

import lambda_kernels
from lambda_kernels import _build, backends

__all__ = ["collect", "environment", "main", "text"]


def environment(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What a timing depends on: torch, device (with the processor's name), threads, backend, commit.

    The backend is the one that a fused block on `device` gets now: the named one, or the one that "auto" takes.
    """
    device = torch.device(device)
    name = _processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "torch": torch.__version__,
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "backend": backends.choose("conv_block", torch.empty(0, device=device), pool=2).name,
        "commit": _commit(),
    }


def collect() -> dict[str, Any]:
    """All that `python -m lambda_kernels.info --json` prints. Looks for CUDA devices; nothing is computed on them."""
    build, isa, why_not = _extension()
    return {
        "versions": {
            "lambda_kernels": _version(),
            "torch": torch.__version__,
            "triton": _triton(),
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "extension": {"loads": not why_not, "why_not": why_not, "build": build},
        "cpu": {
            "model": _processor(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "instruction_set": isa,
        },
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "cuda_devices": _cuda_devices(),
        "backends": {name: {"reasons": backends.reasons(name)} for name in backends.names()},
        "backend_wanted": backends.current(),
    }


def text(report: dict[str, Any]) -> str:
    """The report of `collect` for people."""
    extension, cpu, threads = report["extension"], report["cpu"], report["threads"]
    rows = [*report["versions"].items(), ("commit", report["commit"] or "unknown")]
    rows.append(("extension", "loads" if extension["loads"] else f"does not load: {extension['why_not']}"))
    for key, value in (extension["build"] or {}).items():
        rows.append((f"  {key.replace('_', ' ')}", "none" if value is None else value or "unknown"))
    rows.append(("processor", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable"))
    rows.append(("instruction set", cpu["instruction_set"] or "unknown, the extension does not load"))
    rows.append(("threads", f"{threads['intra_op']} in an operation, {threads['inter_op']} operations at a time"))
    for device in report["cuda_devices"]:
        rows.append((device["device"], f"{device['name']}, sm_{device['capability']}, {device['memory_gib']} GiB"))
    if not report["cuda_devices"]:
        rows.append(("CUDA devices", "none"))
    for name, backend in report["backends"].items():
        rows.append((f"backend {name}", "; ".join(backend["reasons"]) or "can run"))
    rows.append(("backend asked for", report["backend_wanted"]))
    width = max(len(key) for key, _ in rows) + 2
    return "\n".join(f"{key:<{width}}{value}" for key, value in rows)


def main(arguments: list[str] | None = None) -> None:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m lambda_kernels.info", description=summary)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--choices", action="store_true", help="print who was measured fastest for which call")
    chosen = parser.parse_args(arguments)
    if chosen.choices:
        tables = choices()
        print(json.dumps(tables, indent=1) if chosen.json else choices_text(tables))
        return
    report = collect()
    print(json.dumps(report, indent=1) if chosen.json else text(report))


def choices() -> dict[str, dict[str, dict[str, Any]]]:
    """For each CUDA device the calls that were measured on it, and the backend that each one gets."""
    found = {}
    for i in range(torch.cuda.device_count()):
        table = backends.choices(torch.device("cuda", i))
        found[f"cuda:{i}"] = {
            key: {**msgspec.structs.asdict(c), "reason": c.reason} for key, c in sorted(table.choices.items())
        }
    return found


def choices_text(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The result of `choices` for people."""
    lines = []
    for device, calls in tables.items():
        lines.append(f"{device}: {len(calls)} calls measured")
        lines += [f"  {key}: {choice['chosen']} ({choice['reason']})" for key, choice in calls.items()]
    return "\n".join(lines) or "no CUDA device: only there backends are chosen by measurement"


def _extension() -> tuple[dict[str, str | None] | None, str, str]:
    """(build information, instruction set, why the extension cannot be used)."""
    try:
        build = _build.read()
        if why := _build.mismatch():
            return build, "", why
    except ValueError as error:
        return None, "", str(error)
    try:
        return build, str(importlib.import_module("lambda_kernels._C").isa()), ""
    except ModuleNotFoundError as error:
        return build, "", _build.not_built(error)
    except (ImportError, RuntimeError) as error:  # RuntimeError: LAMBDA_KERNELS_ISA names what this machine cannot run
        return build, "", str(error)


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _version() -> str:
    """The installed version with its local part (+cpu); that of the source where it is not installed."""
    try:
        return metadata.version("lambda-kernels")
    except metadata.PackageNotFoundError:
        return lambda_kernels.__version__


def _commit() -> str:
    """The commit of the code that runs: a checkout's own, marked -dirty after changes, else the build's, else ""."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    try:
        return (_build.read() or {}).get("commit") or ""
    except ValueError:
        return ""


def _processor() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


def _cuda_devices() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": device.name,
                "capability": f"{device.major}{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
        )
    return found


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` ends the program, as it does others
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
