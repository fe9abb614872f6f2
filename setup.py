"""Builds the operators lambda_kernels/liblambda_kernels.so and the Python module lambda_kernels._C around them against
the torch that is installed, and the CUDA kernels lambda_kernels/_cuda.so with nvcc alone, against no torch at all; all
else is in pyproject.toml.

Environment: CXX (compiler), MAX_JOBS (compilers at a time, default: the cores), SOURCE_DATE_EPOCH (date in the build
information), LAMBDA_KERNELS_LOCAL_VERSION (what follows the `+` of the version, such as `cpu`).

LAMBDA_KERNELS_SANITIZE: sanitizers that the extension is built with, such as "address,undefined", or "thread", which
has threads of its own in place of torch's (`make sanitize`).

LAMBDA_KERNELS_CUDA: 1 builds the CUDA kernels or says what is missing, 0 leaves them out; unset, they are built where
torch has CUDA and nvcc is found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda). TORCH_CUDA_ARCH_LIST: for which GPUs,
such as "8.0;9.0a;10.0+PTX" (default: "8.0 9.0 10.0+PTX"; +PTX adds code for newer ones).
"""

from __future__ import annotations

import datetime
import hashlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILE_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
]
LIBRARY = "liblambda_kernels.so"
OPERATORS, MODULE = "lambda_kernels.liblambda_kernels", "lambda_kernels._C"
BINDING = ["csrc/binding.cpp", "csrc/inner_loop/prepared_call.cpp", "csrc/snapshot.cpp"]  # all that speaks to Python
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
COMPILERS = ("g++", "c++", "clang++")
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
ARCHITECTURES = "8.0 9.0 10.0+PTX"
SETUPTOOLS = (77, 0, 3)  # the first that knows pyproject.toml's license = "MIT"
OF_A_WHEEL = {"dist_info", "bdist_wheel", "editable_wheel"}  # what an sdist is made without
NO_TORCH = (
    f"lambda-kernels: install torch first (python -m pip install 'torch>=2.11'), none was found for {sys.executable}; "
    "where it is installed, the build is kept apart from it: install setuptools and ninja beside it and give "
    "--no-build-isolation to pip or uv"
)


def output(*command: str) -> str:
    """First line that `command` prints, "" when it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def check_setuptools() -> None:
    """SystemExit with the remedy where an older one would end in a traceback about pyproject.toml."""
    if tuple(map(int, re.findall(r"\d+", setuptools.__version__)[:3])) < SETUPTOOLS:
        least = ".".join(map(str, SETUPTOOLS))
        raise SystemExit(
            f"lambda-kernels: setuptools {least} or newer is needed, {sys.executable} has {setuptools.__version__}: "
            f"python -m pip install 'setuptools>={least}' ninja, or leave out --no-build-isolation"
        )


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


def find_nvcc() -> str | None:
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    return shutil.which("nvcc", path=path)


def wanted_nvcc(torch: Any) -> str | None:
    """nvcc where the CUDA kernels are to be built, else None; SystemExit where it is required and missing."""
    wish = os.environ.get("LAMBDA_KERNELS_CUDA", "").strip()
    if wish not in ("", "0", "1"):
        raise SystemExit(f"lambda-kernels: LAMBDA_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0" or (wish == "" and torch.version.cuda is None):
        return None
    nvcc = find_nvcc()
    if nvcc is None and wish == "1":
        raise SystemExit(
            "lambda-kernels: LAMBDA_KERNELS_CUDA=1 but no nvcc was found: install the CUDA toolkit and set CUDA_HOME "
            "to its folder, such as CUDA_HOME=/usr/local/cuda, or set LAMBDA_KERNELS_CUDA=0"
        )
    return nvcc


def architectures() -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for: "8.0;9.0a 10.0+PTX" -> ["8.0", "9.0a", "10.0+PTX"]."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    names = list(dict.fromkeys(re.split(r"[\s;,]+", wish.strip(" ;,\t\n") or ARCHITECTURES)))
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(
                f"lambda-kernels: TORCH_CUDA_ARCH_LIST={wish!r} names {name!r}: write compute capabilities, such as "
                f"TORCH_CUDA_ARCH_LIST='{ARCHITECTURES}'"
            )
    return names


def generated_code(names: list[str]) -> list[str]:
    """nvcc's flags: machine code for each architecture, and with +PTX code that newer ones translate."""
    flags = []
    for name in names:
        number, _, ptx = name.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def build_cuda(nvcc: str, names: list[str], compiler: str, objects: Path, target: Path) -> None:
    """Compiles csrc/cuda/*.cu to `target`; what is as it was when `objects` was filled is not compiled again."""
    objects.mkdir(parents=True, exist_ok=True)
    host = [] if len(shlex.split(compiler)) > 1 else [f"-ccbin={compiler}"]
    flags = [*NVCC_FLAGS, *host, *generated_code(names), f'-DLK_ARCHITECTURES="{" ".join(names)}"']
    headers = [p for p in sorted((ROOT / "csrc" / "cuda").iterdir()) if p.suffix in (".h", ".cuh")]
    common = [nvcc_version(nvcc), *flags, *(p.read_text(encoding="utf-8") for p in headers)]

    def run(*command: str | Path) -> None:
        done = subprocess.run([nvcc, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            line = shlex.join([nvcc, *map(str, command)])
            raise SystemExit(f"lambda-kernels: nvcc failed: {line}\n{done.stdout}{done.stderr}")

    def compiled(source: Path) -> bool:
        made, stamp = objects / f"{source.stem}.o", objects / f"{source.stem}.key"
        key = hashlib.sha256("\0".join([*common, source.read_text(encoding="utf-8")]).encode()).hexdigest()
        if made.exists() and stamp.exists() and stamp.read_text() == key:
            return False
        stamp.unlink(missing_ok=True)
        run(*flags, "-c", source.relative_to(ROOT), "-o", made)
        stamp.write_text(key)
        return True

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(max(1, int(os.environ.get("MAX_JOBS", "1")))) as pool:
        changed = list(pool.map(compiled, sources))
    linked = objects / target.name
    if any(changed) or not linked.exists():
        linked.unlink(missing_ok=True)
        run("-shared", *NVCC_FLAGS, *host, *(objects / f"{p.stem}.o" for p in sources), "-o", linked)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    shutil.copyfile(linked, temporary)
    os.replace(temporary, target)


def nvcc_version(nvcc: str) -> str:
    """Such as "13.0, V13.0.88"."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (.+)", done.stdout)
    return found[1].strip() if found else ""


def build_info(
    torch: Any, compiler: str, compiler_version: str, flags: list[str], nvcc: str | None, names: list[str]
) -> dict[str, str | None]:
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
        "nvcc": nvcc_version(nvcc) if nvcc else None,
        "cuda_architectures": " ".join(names) if nvcc else None,
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


def extensions(torch: ModuleType | None) -> list[Extension]:
    """The operators, which need libtorch alone, and the Python module, which is linked to them."""
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".inl"))
    operators = [source for source in sources if source not in BINDING]
    if torch is None:
        return [Extension(OPERATORS, operators, depends=headers), Extension(MODULE, BINDING, depends=headers)]
    from torch.utils.cpp_extension import CppExtension

    common: dict[str, Any] = {"depends": [*headers, "setup.py"], "include_dirs": [str(ROOT / "csrc")]}
    library = CppExtension(OPERATORS, operators, py_limited_api=True, **common)  # not linked to libtorch_python
    module = CppExtension(MODULE, BINDING, runtime_library_dirs=["$ORIGIN"], **common)
    module.libraries.insert(0, f":{LIBRARY}")
    return [library, module]


def build_command(torch: Any) -> type[build_ext]:
    """The build_ext of this project. Without torch it only says what to install: an sdist needs neither."""
    if torch is None:

        class WithoutTorch(build_ext):
            def run(self) -> None:
                raise SystemExit(NO_TORCH)

        return WithoutTorch

    from torch.utils.cpp_extension import BuildExtension

    # ninja of an environment that was not activated
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])

    class Build(BuildExtension):
        user_options = [*BuildExtension.user_options, ("cuda-only", None, "build the CUDA kernels alone")]
        boolean_options = [*BuildExtension.boolean_options, "cuda-only"]

        def initialize_options(self) -> None:
            super().initialize_options()
            self.cuda_only = False

        def finalize_options(self) -> None:
            super().finalize_options()
            # objects are kept from one install to the next, also by an editable one, and never shared by two torches
            target = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            sanitizers = os.environ.get("LAMBDA_KERNELS_SANITIZE", "")
            self.sanitize = [f"-fsanitize={sanitizers}"] if sanitizers else []
            self.build_temp = str(ROOT / "build" / "-".join(["temp", target, *self.sanitize]))

        def get_ext_filename(self, ext_name: str) -> str:
            name: str = super().get_ext_filename(ext_name)
            return str(Path(name).with_name(LIBRARY)) if ext_name.endswith(Path(LIBRARY).stem) else name

        def run(self) -> None:
            compiler, compiler_version = find_compiler()
            nvcc, names = wanted_nvcc(torch), architectures()
            os.environ["CXX"] = compiler
            os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
            flags = list(COMPILE_FLAGS)
            # Compiled with OpenMP, linked without: the symbols resolve to the libgomp that torch loads, so that there
            # is one thread pool. clang's -fopenmp needs LLVM's runtime, which torch does not bring: one thread there.
            if "clang" not in compiler_version:
                flags.append("-fopenmp")
            if self.sanitize:
                flags += [*self.sanitize, *SANITIZE_FLAGS]
            for ext in self.extensions:
                ext.extra_compile_args = list(flags)
                ext.extra_link_args.extend(self.sanitize)
                if self.sanitize == ["-fsanitize=thread"]:  # which knows nothing of libgomp's threads
                    ext.include_dirs.insert(0, str(ROOT / "tests" / "threads_seen"))
                # where setuptools puts what it links, also in an inplace build, which copies it from there
                ext.library_dirs.append(str(Path(self.build_lib) / "lambda_kernels"))
            folder = ROOT / "lambda_kernels" if self.inplace else Path(self.build_lib) / "lambda_kernels"
            folder.mkdir(parents=True, exist_ok=True)
            # Ahead of the extension, which takes longer: a build that is cut off leaves the kernels.
            if nvcc:
                build_cuda(nvcc, names, compiler, Path(self.build_temp) / "cuda", folder / "_cuda.so")
            else:
                (folder / "_cuda.so").unlink(missing_ok=True)
            if self.cuda_only:
                return
            super().run()
            information = build_info(torch, compiler, compiler_version, flags, nvcc, names)
            temporary = folder / "_build_info.json.tmp"
            temporary.write_text(json.dumps(information, indent=1) + "\n")
            os.replace(temporary, folder / "_build_info.json")

    return Build


def dependencies(torch: ModuleType | None) -> list[str]:
    """What the core needs. torch keeps its C++ interface within one minor version: that of the extension is named."""
    fits = "torch>=2.11" if torch is None else f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"
    return [fits, "numpy>=1.26", "safetensors>=0.4.3", "msgspec>=0.19"]


check_setuptools()
torch_module = find_torch()
if torch_module is None and OF_A_WHEEL & set(sys.argv):  # before torch is downloaded, which the build would not find
    raise SystemExit(NO_TORCH)
setup(
    version=version(),
    install_requires=dependencies(torch_module),
    ext_modules=extensions(torch_module),
    cmdclass={"build_ext": build_command(torch_module)},
)
