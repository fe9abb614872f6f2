"""Who may import whom (docs/architecture.md), and that importing is cheap: no GPU, no network, no plotting."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import PATIENCE

import lambda_kernels

ROOT = Path(__file__).resolve().parents[1]
KERNELS, MAML = ROOT / "lambda_kernels", ROOT / "python" / "lambda_maml"

# What each module of lambda_kernels may import from its own package, itself and its submodules aside.
BELOW = {
    "_C": set(),
    "_build": set(),
    "_say": set(),
    "_torch": set(),
    "_capture": {"_torch"},
    "neighbours": set(),
    "norms": {"_torch"},
    "agreement": set(),
    **dict.fromkeys(("cache", "files", "flat", "spec"), set()),
    "backends": {"_C", "_build", "_capture", "_say", "_torch", "agreement", "cache", "files", "flat", "spec"},
    "autograd": {"_torch", "backends", "spec"},
    "outer": {"_torch", "autograd", "backends", "spec"},
    "functional": {"_torch", "autograd", "backends", "spec"},
    "layers": {"_torch", "functional", "neighbours", "spec"},
    "program": {"_C", "_build", "_torch", "agreement", "cache", "functional", "layers", "spec"},
    "chain": {"_torch", "backends", "cache", "outer", "program", "spec"},
    "evaluated": {"_torch", "backends", "functional", "layers", "program", "spec"},
    "cuda_graph": {"_capture", "_torch", "backends", "cache"},
    "fused": {"_say", "_torch", "evaluated", "layers", "neighbours", "norms", "program"},
    "convert": {"fused", "layers", "program"},
    "info": {"", "_C", "_build", "backends"},
    "": {"backends", "convert", "functional", "layers"},
}
# The same inside packages; "" is the package's own __init__.py, a folder is one module.
INSIDE = {
    "lambda_kernels.backends": {
        "base": set(),
        "inner_loop": {"base"},
        "outer_step": {"base", "inner_loop"},
        "reference": {"base", "inner_loop", "outer_step"},
        "native": {"base", "reference"},
        "native_checks": {"native"},
        "native_fakes": {"native", "native_checks"},
        "cuda": {"base", "native", "reference"},
        "clock": set(),
        "triton": {"base", "clock", "reference"},
        "table": set(),
        "autotune": {"base", "clock", "cuda", "reference", "table"},
        "": {"autotune", "base", "cuda", "native", "native_fakes", "reference", "table", "triton"},
    },
    "lambda_kernels.program": {
        "structure": set(),
        "snapshot": set(),
        "shadow": {"snapshot", "structure"},
        "steps": {"structure"},
        "calls": {"shadow", "steps"},
        "watch": set(),
        "walk": {"shadow", "snapshot", "watch"},
        "capture": {"structure", "watch"},
        "fuse": {"steps"},
        "build": {"calls", "capture", "fuse", "steps", "structure", "watch"},
        "check": {"shadow", "steps", "structure", "watch"},
        "lookup": {"build", "capture", "check", "shadow", "snapshot", "steps", "structure", "walk"},
        "": {"calls", "fuse", "lookup", "shadow", "steps", "structure", "walk"},
    },
    "lambda_maml": {
        "data": {"progress", "say"},
        "files": set(),
        "forms": set(),
        "say": set(),
        "extras": set(),
        "stats": set(),
        "progress": set(),
        "images": {"data", "models"},
        "network": set(),
        "groups": set(),
        "cost": {"network"},
        "models": {"network"},
        "statistics": {"say"},
        "export": {"extras", "files", "statistics"},
        "onnx_file": {"export", "extras", "images"},
        "plan": {"cost", "network", "say", "statistics"},
        "patterns": {"cost", "groups", "network"},
        "inner": {"cost", "data", "network", "patterns", "plan", "say"},
        "learner": {"export", "inner", "plan", "statistics"},
        "places": {"inner", "patterns"},
        "solved": {"inner", "learner", "patterns", "places"},
        "fingerprint": {"inner"},
        "methods": {"cost", "data", "fingerprint", "inner", "models", "network", "patterns", "places"},
        "saved_parts": {"checkpoint", "methods", "parts"},
        "adapt": {"inner", "learner", "patterns", "places", "say", "solved", "statistics"},
        "explain": {"inner", "learner", "patterns", "places", "solved"},
        "maml": {"inner", "learner", "patterns", "plan"},
        "settings": {"data"},
        "checkpoint": {"files", "forms", "models", "network", "settings", "statistics"},
        "ranks": set(),
        "signs": {"ranks"},
        "processes": {"ranks", "signs"},
        "lock": {"say"},
        "evaluate": {"adapt", "data", "inner", "patterns", "places", "progress", "ranks", "stats"},
        "trials": {"patterns"},
        "choice": {"evaluate", "groups", "network", "patterns", "stats", "timing", "trials"},
        "racing": {"stats"},
        "memory": {"adapt", "models"},
        "search": {"choice", "cost", "groups", "network", "patterns", "progress", "racing", "timing", "trials"},
        "per_task": {
            "adapt", "choice", "data", "evaluate", "inner", "learner", "patterns", "progress", "ranks", "stats",
            "trials",
        },
        "selection": {"choice", "evaluate", "files", "patterns", "per_task", "timing", "trials"},
        "goal": {"evaluate", "inner"},
        "plain_torch": {"adapt", "models", "patterns"},
        "timing": {
            "adapt", "files", "forms", "inner", "models", "patterns", "places", "plain_torch", "progress", "trials"
        },
        "run_tasks": {"data", "settings"},
        "stopping": set(),
        "ahead": set(),
        "average": set(),
        "metrics": {"files", "progress"},
        "schedule": {"network", "patterns", "settings"},
        "learned_rates": {"checkpoint", "inner", "network", "settings"},
        "outer": {"adapt", "data", "evaluate", "inner", "maml", "schedule", "settings"},
        "parts": {"adapt", "data", "evaluate", "inner", "methods", "outer", "places", "schedule", "settings", "solved"},
        "pretrain": {
            "checkpoint", "data", "forms", "lock", "models", "network", "progress", "run_tasks", "say", "schedule",
            "stopping",
        },
        "run_state": {"average", "checkpoint", "forms", "inner", "ranks", "settings"},
        "train": {
            "ahead", "average", "checkpoint", "data", "evaluate", "files", "fingerprint", "goal", "inner",
            "learned_rates", "lock", "metrics", "models", "network", "outer", "parts", "pretrain", "progress", "ranks",
            "run_state", "run_tasks", "saved_parts", "say", "schedule", "settings", "stopping",
        },
        "trial_loops": {"inner", "patterns", "places", "solved", "trials"},
        "scored": {"data", "evaluate", "per_task", "progress", "remembered_scores", "trial_loops", "trials"},
        "tested": {"adapt", "choice", "data", "evaluate", "per_task", "statistics", "stats"},
        "select": {
            "adapt", "checkpoint", "choice", "data", "evaluate", "fingerprint", "goal", "inner", "memory", "models",
            "patterns", "per_task", "places", "plain_torch", "progress", "racing", "ranks", "remembered_scores",
            "scored", "search", "selection", "tested", "timing", "trial_loops", "trials",
        },
        "remembered_scores": {"checkpoint", "files", "forms"},
        "pattern_json": {"files", "forms", "patterns"},
        "report": {"evaluate", "extras", "files", "patterns", "per_task"},
        **dict.fromkeys(("report_cells", "report_figures", "report_page"), set()),
        "report_runs": {"files", "metrics", "pattern_json"},
        "report_selection": {"report", "report_cells", "report_figures"},
        "report_html": {
            "data", "files", "report", "report_cells", "report_figures", "report_page", "report_runs",
            "report_selection", "settings",
        },
        "": {"adapt", "data", "explain", "inner", "learner", "maml", "models", "patterns", "select", "timing"},
        "console": {"progress", "ranks"},
        "cli_types": set(),
        "cli_config": {"cli_types", "extras"},
        "cli_data": {"cli_types", "console", "data", "models", "ranks"},
        "cli_train": {
            "cli_data", "cli_methods", "cli_types", "console", "data", "models", "processes", "ranks", "settings",
            "stopping", "train",
        },
        "cli_pretrain": {"cli_data", "cli_train", "cli_types", "console", "pretrain", "ranks"},
        "cli_methods": {"console", "inner", "methods", "network", "parts", "patterns", "saved_parts", "settings"},
        "cli_report": {"cli_types", "console", "pattern_json", "report", "report_html", "report_runs"},
        "cli_export": {"checkpoint", "cli_types", "console", "export", "images", "learner", "onnx_file"},
        "cli_checkpoint": {
            "checkpoint", "cli_data", "cli_methods", "cli_types", "console", "inner", "learned_rates", "pattern_json",
            "patterns", "per_task", "select",
        },
        "cli_select": {
            "cli_checkpoint", "cli_data", "cli_report", "cli_types", "console", "data", "files", "lock",
            "pattern_json", "processes", "report", "select",
        },
        "cli_demo": {
            "cli_checkpoint", "cli_select", "cli_train", "cli_types", "console", "data", "lock", "run_state", "select",
            "train",
        },
        "cli_eval": {
            "adapt", "cli_checkpoint", "cli_data", "cli_types", "console", "data", "evaluate", "ranks", "statistics",
            "stats",
        },
        "cli_adapt": {
            "adapt", "checkpoint", "cli_checkpoint", "cli_export", "cli_types", "console", "files", "images",
            "learned_rates", "models", "statistics",
        },
        "cli": {
            "cli_adapt", "cli_checkpoint", "cli_config", "cli_demo", "cli_eval", "cli_export", "cli_methods",
            "cli_pretrain", "cli_report", "cli_select", "cli_train", "cli_types", "console", "explain", "models",
        },
        "__main__": {"cli", "extras"},
    },
    "lambda_maml.inner": {
        "state": set(),
        "checks": set(),
        "rates": set(),
        "rule": set(),
        "rules": {"rates", "rule"},
        "adaptation": {"checks", "rule", "state"},
        "chain": {"adaptation"},
        "outer": {"adaptation", "chain", "rules", "state"},
        "autograd": {"adaptation", "checks", "rule", "rules"},
        "stepwise": {"adaptation", "autograd", "chain", "outer", "rule"},
        "loop": {"adaptation", "autograd", "chain", "outer", "state", "stepwise"},
        "problem": {"adaptation", "autograd", "checks", "loop", "rule"},
        "channels": {"checks", "rule", "state"},
        "recorded": {"adaptation", "chain", "channels", "loop"},
        "remembered": {"adaptation", "recorded", "state"},
        "batch": {"adaptation", "chain", "loop", "outer", "recorded"},
        "": set(),
    },
}  # fmt: skip
# The modules of lambda_kernels that the adapter may reach, beside the names of its top level.
OPEN = {
    "_say", "_torch", "agreement", "evaluated", "cache", "files", "chain", "cuda_graph", "flat", "functional", "fused",
    "info", "layers", "norms", "outer", "program"
}  # fmt: skip


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that `source` imports, and of attributes reached through an import.

    `from a import b` gives a.b; `import a as x` followed by x.b.c gives a and a.b.c.
    """
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
                first = name.name.partition(".")[0]
                aliases[name.asname or first] = name.name if name.asname else first
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            for name in node.names:
                yield node.lineno, f"{base}.{name.name}"
                aliases[name.asname or name.name] = f"{base}.{name.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in aliases and re.fullmatch(r"[\w.]+", rest):
                yield node.lineno, f"{aliases[head]}.{rest}"


def modules(folder: Path, package: str) -> list[tuple[str, Path]]:
    """(dotted name, file) of every module below `folder`."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    assert found, f"no module found in {folder}"
    return found


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, taken as `module`, imports against the directions."""
    wrong = []
    for line, name in imports(source, module, is_package):
        top, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if name.startswith("torch.ops.lambda_kernels"):
            top, part = "lambda_kernels", "_C"
        if top in ("tests", "bench"):
            wrong.append(f"{module}:{line} imports {name}")
        elif module.startswith("lambda_kernels"):
            mine = module.split(".")[1] if "." in module else ""
            if top == "lambda_maml":
                wrong.append(f"{module}:{line} imports {name}")
            elif top == "lambda_kernels" and part != mine and part in BELOW and part not in BELOW[mine]:
                wrong.append(f"{module}:{line} imports {name}")
        elif top == "lambda_kernels" and part in BELOW.keys() - OPEN - {""} and rest not in lambda_kernels.__all__:
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


def test_every_module_of_the_kernels_has_its_place():
    parts = {name.split(".")[1] for name, _ in modules(KERNELS, "lambda_kernels") if "." in name}
    assert parts == BELOW.keys() - {"", "_C"}, "add a new module of lambda_kernels to BELOW, above what it imports"


@pytest.mark.parametrize("table", [BELOW, *INSIDE.values()], ids=["lambda_kernels", *INSIDE])
def test_the_table_has_no_circle(table):
    order: list[str] = []
    while len(order) < len(table):
        ready = [m for m in table if m not in order and table[m] <= set(order)]
        assert ready, f"circular: {sorted(table.keys() - set(order))}"
        order += ready


def beside(source: str, module: str, is_package: bool, package: str) -> set[str]:
    """The modules of a package that one of them imports, also for type checkers alone; itself aside."""
    table, mine = INSIDE[package], module.removeprefix(package).lstrip(".").partition(".")[0]
    parts = set()
    for _, name in imports(source, module, is_package):
        if name == package or name.startswith(f"{package}."):
            part = name.removeprefix(package).lstrip(".").partition(".")[0]
            parts.add(part if part in table else "")
    return parts - {mine}


@pytest.mark.parametrize("package", INSIDE)
def test_imports_inside_a_package_point_downwards(package):
    table = INSIDE[package]
    folder = ROOT / ("python" if package.startswith("lambda_maml") else "") / package.replace(".", "/")
    seen = set()
    for module, path in modules(folder, package):
        mine = module.removeprefix(package).lstrip(".").partition(".")[0]
        assert mine in table, f"add {module} to INSIDE, above what it imports"
        found = beside(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", package)
        assert found <= table[mine], f"{module} imports {found - table[mine]}"
        seen.add(mine)
    assert seen == table.keys()


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("lambda_kernels.backends.base", "from .reference import Reference", {"reference"}),
        ("lambda_kernels.backends.native", "from . import choose", {""}),
        ("lambda_kernels.backends.cuda.operands", "from ..native import Native", {"native"}),
        ("lambda_kernels.backends.cuda.operands", "from .library import DTYPES\nfrom ...spec import pair", set()),
        ("lambda_maml.inner.state", "if TYPE_CHECKING:\n    from .loop import Result", {"loop"}),
        ("lambda_maml.plan", "def late():\n    from .adapt import adapt", {"adapt"}),
        ("lambda_maml.inner.rules", "from ..maml import LambdaMAML\nfrom .rates import Rates", {"maml"}),
    ],
)
def test_an_import_beside_is_found(module: str, source: str, found: set[str]) -> None:
    package = max((p for p in INSIDE if module.startswith(p)), key=len)
    if found == {"maml"}:  # from inner to the package around it
        package = "lambda_maml"
    assert beside(source, module, False, package) == found


@pytest.mark.parametrize("folder", [KERNELS, MAML], ids=lambda folder: folder.name)
def test_imports_point_downwards(folder):
    for module, path in modules(folder, folder.name):
        assert breaches(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lambda_kernels.spec", "from .backends import choose"),
        ("lambda_kernels.backends.native", "from ..autograd import conv2d"),
        ("lambda_kernels.backends.native", "from .. import functional"),
        ("lambda_kernels.autograd", "import lambda_kernels.layers"),
        ("lambda_kernels.functional", "from lambda_kernels import layers"),
        ("lambda_kernels.layers", "from .backends import choose"),
        ("lambda_kernels.autograd", "import torch\ntorch.ops.lambda_kernels.norm_relu_pool(1)"),
        ("lambda_kernels.layers", "import importlib\nimportlib.import_module('lambda_kernels._C')"),
        ("lambda_kernels.layers", "from lambda_maml import Pattern"),
        ("lambda_kernels.layers", "def late():\n    import lambda_maml.plan"),
        ("lambda_maml.plan", "from lambda_kernels.autograd import conv2d"),
        ("lambda_maml.plan", "import lambda_kernels as lk\nlk.backends.choose('linear')"),
        ("lambda_maml.plan", "from lambda_kernels import _C"),
        ("lambda_maml.plan", "from lambda_kernels.convert import _swap"),
        ("lambda_maml.plan", "import torch\ntorch.ops.lambda_kernels.norm_relu_pool(1)"),
        ("lambda_maml.plan", "from bench import bench_adapt"),
    ],
)
def test_an_upward_import_is_found(module, source):
    assert breaches(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lambda_kernels.backends.any", "from .. import _C\nfrom ..spec import pair\nfrom .reference import f"),
        ("lambda_kernels.backends.native", "import torch\ntorch.ops.lambda_kernels.norm_relu_pool(1)"),
        ("lambda_maml.plan", "import lambda_kernels as lk\nlk.functional.linear(1, 2)\nlk.convert(3)"),
        ("lambda_maml.plan", "from lambda_kernels.layers import ConvBlock\nfrom lambda_kernels import info"),
    ],
)
def test_a_downward_import_passes(module, source):
    assert breaches(source, module) == []


FOREIGN = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11|Python\.h)', re.MULTILINE)


def test_the_kernels_know_neither_torch_nor_python():
    files = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    kernels = [path for path in files if path.parent.name == "cpu"]
    foreign = [path for path in files if FOREIGN.search(path.read_text())]
    assert kernels and foreign and not set(kernels) & set(foreign)


# In a fresh interpreter: fails on a socket, on a question to the CUDA driver (also where torch has no CUDA: the
# functions are put in place first), and on a heavy module.
LEAN = """
import sys

def hook(event, arguments):
    if event.startswith("socket."):
        raise RuntimeError(f"the import used {event} {arguments}")

sys.addaudithook(hook)
import torch

def touched(*arguments):
    raise RuntimeError("the import touched CUDA")

for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_setDevice"):
    setattr(torch._C, name, touched)
torch.cuda._device_count_nvml = torch.cuda._lazy_init = touched
PROBE
assert not torch.cuda.is_initialized()
heavy = {"matplotlib", "rich", "PIL"} & set(sys.modules)
assert not heavy, f"the import loads {heavy}"
"""


def lean(probe: str) -> subprocess.CompletedProcess[str]:
    program = LEAN.replace("PROBE", probe)
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("package", ["lambda_kernels", "lambda_maml"])
def test_import_is_lean(package):
    done = lean(f"import {package}")
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize(
    ("probe", "complaint"),
    [
        ("import torch; torch.cuda.is_available()", "touched CUDA"),
        ("import torch; torch.zeros(1, device='cuda')", "touched CUDA"),
        ("import socket; socket.socket()", "socket.__new__"),
        ("import PIL", "the import loads {'PIL'}"),
    ],
)
def test_the_probe_of_lean_imports_can_fail(probe, complaint):
    done = lean(probe)
    assert done.returncode != 0 and complaint in done.stderr, done.stderr
