"""The extension as it was built, the build information, and the messages of a build that cannot go on."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from machine import PATIENCE

import lambda_kernels
from lambda_kernels import _build, info

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(lambda_kernels.__file__).parent


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def needed_libraries(path: Path) -> list[str]:
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path.name} is no 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    segments = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    loaded = [(address, offset, length) for kind, _, offset, address, _, length in segments if kind == 1]  # PT_LOAD
    ((start, length),) = [(offset, length) for kind, _, offset, _, _, length in segments if kind == 2]  # PT_DYNAMIC
    entries = list(struct.iter_unpack("<qQ", data[start : start + length]))
    strings = next(value for tag, value in entries if tag == 5)  # DT_STRTAB, an address
    base = next(offset + strings - first for first, offset, size in loaded if first <= strings < first + size)
    names = [base + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return [data[at : data.index(b"\0", at)].decode() for at in names]


@pytest.fixture(scope="module")
def extension() -> Path:
    (path,) = PACKAGE.glob(f"_C.{sys.implementation.cache_tag}*.so")
    return path


def test_the_extension_brings_no_thread_pool_of_its_own(extension):
    needed = needed_libraries(extension)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if "omp" in name] == []


def test_one_openmp_runtime_is_loaded(extension):
    done = run("-c", "import torch, lambda_kernels._C; print(open('/proc/self/maps').read())")
    assert done.returncode == 0, done.stderr
    mapped = {line.split()[-1] for line in done.stdout.splitlines() if line.endswith(".so") or ".so." in line}
    assert str(extension.resolve()) in mapped
    assert len([name for name in mapped if "omp" in Path(name).name]) == 1


def test_build_information():
    stored = _build.read()
    assert stored is not None
    assert stored["torch"] == torch.__version__ and stored["cuda"] == torch.version.cuda
    assert (stored["version"] or "").partition("+")[0] == lambda_kernels.__version__
    assert stored["compiler"] and stored["compiler_version"]
    flags = (stored["flags"] or "").split()
    assert "-std=c++20" in flags
    assert [flag for flag in flags if flag.startswith("-m")] == []  # a wheel runs on any processor
    assert _build.mismatch() == ""


def test_an_extension_of_another_torch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "__file__", str(tmp_path / "_build.py"))
    assert _build.read() is None and _build.mismatch() == ""
    stored = tmp_path / "_build_info.json"
    stored.write_text(json.dumps({"torch": ".".join([*torch.__version__.split(".")[:2], "99"])}))
    assert _build.mismatch() == ""
    stored.write_text(json.dumps({"torch": "1.2.3"}))
    assert "built for torch 1.2.3" in _build.mismatch() and torch.__version__ in _build.mismatch()
    stored.write_text("{")
    with pytest.raises(ValueError, match=r"_build_info\.json is damaged"):
        _build.read()


def test_info_for_programs():
    done = run("-W", "error", "-m", "lambda_kernels.info", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["extension"] == {"loads": True, "why_not": "", "build": _build.read()}
    assert report["cpu"]["instruction_set"] in ("generic", "avx2", "avx512")
    assert report["backends"]["reference"] == report["backends"]["native"] == {"reasons": []}


def test_info_for_people():
    done = run("-m", "lambda_kernels.info", LAMBDA_KERNELS_ISA="generic")
    assert done.returncode == 0, done.stderr
    rows = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in done.stdout.splitlines() if line[0] != " ")
    assert rows["torch"] == torch.__version__
    assert rows["extension"] == "loads" and rows["instruction set"] == "generic"
    assert rows["backend native"] == rows["backend reference"] == "can run"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGPIPE")
def test_info_ends_quietly_where_nobody_reads_on():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lambda_kernels.info"]
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_info_says_why_the_extension_does_not_load(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "lambda_kernels", ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    )
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
        "from lambda_kernels import info; info.main(['--json'])"
    )
    done = run("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["extension"]["build"] is None and "not built" in report["extension"]["why_not"]
    assert report["backends"]["native"]["reasons"] and report["backends"]["reference"]["reasons"] == []


UNBUILT = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "


def test_an_extension_that_was_not_built_is_said_once_with_the_remedy(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "lambda_kernels", ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    )
    program = UNBUILT + "import lambda_kernels, lambda_kernels.chain"
    done = run("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and "backend `reference`" in said[0] and "is not built" in said[0] and "run `make`" in said[0]


def test_a_source_that_hides_the_installed_package_is_told(tmp_path):
    for place in ("source", "installed"):
        shutil.copytree(
            PACKAGE,
            tmp_path / place / "lambda_kernels",
            ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"),
        )
    (tmp_path / "installed/lambda_kernels/_C.so").write_bytes(b"")
    info_folder = tmp_path / "installed/lambda_kernels-0.1.0.dist-info"
    info_folder.mkdir()
    (info_folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lambda-kernels\nVersion: 0.1.0\n")
    program = UNBUILT + "sys.path.insert(1, '../installed'); from lambda_kernels import info; info.main(['--json'])"
    done = run("-c", program, cwd=tmp_path / "source")
    assert done.returncode == 0, done.stderr
    why = json.loads(done.stdout)["extension"]["why_not"]
    assert f"installed in {(tmp_path / 'installed/lambda_kernels').resolve()}" in why and "another folder" in why
    assert why in done.stderr


def test_a_wheel_names_the_torch_that_its_extension_fits(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    minor = ".".join(torch.__version__.split(".")[:2])
    assert setup["dependencies"](torch)[0] == f"torch=={minor}.*"
    assert setup["dependencies"](None)[0] == "torch>=2.11"


def test_info_names_an_instruction_set_that_the_machine_lacks():
    done = run("-m", "lambda_kernels.info", "--json", LAMBDA_KERNELS_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert "LAMBDA_KERNELS_ISA=mmx" in json.loads(done.stdout)["extension"]["why_not"]


def test_environment_of_a_timing():
    environment = info.environment()
    assert environment.keys() == {"torch", "device", "threads", "backend", "commit"}
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["backend"] == "native"
    assert str(environment["device"]).startswith("cpu (")
    with lambda_kernels.use_backend("reference"):
        assert info.environment()["backend"] == "reference"


def test_a_missing_compiler_is_named_with_the_remedy(tmp_path):
    done = run("setup.py", "--quiet", "build_ext", "--build-lib", tmp_path, cwd=ROOT, CXX="no-such-compiler -O1")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for part in ("CXX=no-such-compiler -O1", "apt install g++", "gcc-c++", "gxx_linux-64", "set CXX"):
        assert part in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_torch_is_named_with_the_remedy(tmp_path):
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', {str(tmp_path)!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run("-c", program, cwd=ROOT)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "install torch first" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel"])
def test_a_wheel_without_torch_ends_before_anything_is_downloaded(monkeypatch, command):
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    with pytest.raises(SystemExit, match="install torch first .* give --no-build-isolation to pip or uv"):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("found", ["59.6.0", "65.5.0.post1", "77.0.2"])
def test_an_old_setuptools_is_named_with_the_remedy(monkeypatch, found):
    monkeypatch.setattr(setuptools, "__version__", found)
    with pytest.raises(SystemExit, match=rf"setuptools 77\.0\.3 or newer .* has {found}: .*'setuptools>=77\.0\.3'"):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("only", [False, True], ids=["all", "cuda-only"])
def test_the_cuda_kernels_are_built_ahead_of_the_extension(tmp_path, monkeypatch, only):
    """They take a fraction of its time: a build that is cut off leaves them behind."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    names = runpy.run_path(str(ROOT / "setup.py"))
    done: list[str] = []
    made = names["build_command"](torch)(setuptools.Distribution({"name": "x", "version": "1"}))
    for name, value in (("wanted_nvcc", "nvcc"), ("find_compiler", ("g++", "g++ 1"))):
        monkeypatch.setitem(names["build_command"].__globals__, name, lambda *_, value=value: value)
    monkeypatch.setitem(names["build_command"].__globals__, "build_cuda", lambda *_: done.append("cuda"))
    monkeypatch.setattr(type(made).__mro__[1], "run", lambda self: done.append("extension"))
    made.ensure_finalized()
    made.build_lib, made.cuda_only = str(tmp_path), only
    made.run()
    assert done == (["cuda"] if only else ["cuda", "extension"])
    assert (tmp_path / "lambda_kernels" / "_build_info.json").exists() is not only
