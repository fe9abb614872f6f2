"""Builds the extension lambda_kernels._C against the torch that is installed; all else is in pyproject.toml.

Environment: CXX (compiler), MAX_JOBS (compilers at a time, default: the cores), SOURCE_DATE_EPOCH (date in the build
information), LAMBDA_KERNELS_LOCAL_VERSION (what follows the `+` of the version, such as `cpu`).
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILE_FLAGS = [
    "-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
]
COMPILERS = ("g++", "c++", "clang++")


def output(*command: str) -> str:
    """First line that `command` prints, "" when it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def find_torch() -> ModuleType | None:
    """torch, or None. pip's isolated build hides the site-packages of the interpreter that it installs into."""
    try:
        import torch
    except ModuleNotFoundError:
        folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
        if sys.prefix == sys.base_prefix:  # not in a virtual environment
            folders.append(site.getusersitepackages())
        for folder in dict.fromkeys(folders):
            site.addsitedir(folder)  # at the end of sys.path: the build's own tools come first
        try:
            import torch
        except ModuleNotFoundError as missing:
            if missing.name != "torch":
                raise SystemExit(f"lambda-kernels: torch is installed but cannot be imported: {missing}") from None
            return None
    return torch


def find_compiler() -> tuple[str, str]:
    """(command, its first line of --version); SystemExit with the remedy when there is none."""
    remedy = (
        "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
        "conda: conda install gxx_linux-64) or set CXX to the compiler, such as CXX=/usr/bin/g++-13"
    )
    wished = os.environ.get("CXX", "").strip()
    for command in [wished] if wished else COMPILERS:
        if shutil.which(shlex.split(command)[0]):
            version = output(*shlex.split(command), "--version")
            if version:
                return command, version
    what = f"the C++ compiler CXX={wished} does not run" if wished else f"no C++ compiler ({', '.join(COMPILERS)})"
    raise SystemExit(f"lambda-kernels: {what}: {remedy}")


def build_info(torch: Any, compiler: str, compiler_version: str, flags: list[str]) -> dict[str, str | None]:
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    date = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
    # only this project's own checkout counts: an unpacked sdist may lie inside another repository
    commit = ""
    if (ROOT / ".git").exists():
        commit = output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return {
        "version": version(),
        "compiler": compiler,
        "compiler_version": compiler_version,
        "flags": shlex.join(flags),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sysconfig.get_python_version(),
        "platform": sysconfig.get_platform(),
        "commit": commit,
        "date": date,
    }


def version() -> str:
    source = (ROOT / "lambda_kernels" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        raise SystemExit("lambda-kernels: lambda_kernels/__init__.py has no line __version__ = ...")
    local = os.environ.get("LAMBDA_KERNELS_LOCAL_VERSION", "")
    return f"{found[1]}+{local}" if local else found[1]


def extension(torch: ModuleType | None) -> Extension:
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".inl"))
    if torch is None:
        return Extension("lambda_kernels._C", sources, depends=headers)
    from torch.utils.cpp_extension import CppExtension

    made: Extension = CppExtension(
        "lambda_kernels._C", sources, depends=[*headers, "setup.py"], include_dirs=[str(ROOT / "csrc")]
    )
    return made


def build_command(torch: Any) -> type[build_ext]:
    """The build_ext of this project. Without torch it only says what to install: an sdist needs neither."""
    if torch is None:

        class WithoutTorch(build_ext):
            def run(self) -> None:
                raise SystemExit(
                    "lambda-kernels: install torch first (python -m pip install 'torch>=2.11'), "
                    f"none was found for {sys.executable}"
                )

        return WithoutTorch

    from torch.utils.cpp_extension import BuildExtension

    # ninja of an environment that was not activated
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # objects are kept from one install to the next, also by an editable one, and never shared by two torches
            target = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = str(ROOT / "build" / f"temp-{target}")

        def run(self) -> None:
            compiler, compiler_version = find_compiler()
            os.environ["CXX"] = compiler
            os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
            flags = list(COMPILE_FLAGS)
            # Compiled with OpenMP, linked without: the symbols resolve to the libgomp that torch loads, so that there
            # is one thread pool. clang's -fopenmp wants LLVM's runtime, which torch does not bring: one thread there.
            if "clang" not in compiler_version:
                flags.append("-fopenmp")
            for ext in self.extensions:
                ext.extra_compile_args = list(flags)
            super().run()
            folder = ROOT / "lambda_kernels" if self.inplace else Path(self.build_lib) / "lambda_kernels"
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / "_build_info.json.tmp"
            temporary.write_text(json.dumps(build_info(torch, compiler, compiler_version, flags), indent=1) + "\n")
            os.replace(temporary, folder / "_build_info.json")

    return Build


torch_module = find_torch()
setup(
    version=version(),
    ext_modules=[extension(torch_module)],
    cmdclass={"build_ext": build_command(torch_module)},
)
