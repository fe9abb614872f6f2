"""docs/clusters.md, its batch file and its recipe: the shell parses, and the commands have their options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lambda_maml import cli

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "docs" / "clusters.md"
BATCH = ROOT / "docs" / "bench.sbatch"


def shell(text: str) -> list[list[str]]:
    """The words of each command; variables in ${NAME:-default} are their defaults, others stay."""
    joined = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text.replace("\\\n", " "))
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def cluster_commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", CLUSTERS.read_text(), re.MULTILINE | re.DOTALL)
    every = shell("\n".join([*blocks, BATCH.read_text()]))
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in every]


@pytest.mark.parametrize("path", ["docs/bench.sbatch", "docs/clusters.md"])
def test_the_shell_of_the_cluster_pages_parses(path):
    text = (ROOT / path).read_text()
    code = text if path.endswith("sbatch") else "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S))
    done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
    assert code and done.returncode == 0, done.stderr


def test_the_pip_commands_of_the_cluster_page_have_their_options():
    calls = [words[words.index("pip") + 1 :] for words in cluster_commands() if "pip" in words]
    assert {words[0] for words in calls} == {"wheel", "download", "install"}
    for verb, *words in calls:
        done = subprocess.run([sys.executable, "-m", "pip", verb, "--help"], capture_output=True, text=True, check=True)
        known = set(re.findall(r"(--[a-z-]+)", done.stdout))
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, (verb, words)


def test_the_lambda_maml_command_of_the_batch_file_has_its_options():
    calls = [words[1:] for words in cluster_commands() if words[0] == "lambda-maml"]
    assert ["select"] == [words[0] for words in calls]
    for name, *words in calls:
        try:
            context = cli.cli.commands[name].make_context(name, words)
        except click.UsageError as error:
            pytest.fail(f"lambda-maml {name} {' '.join(words)}: {error.format_message()}")
        assert context.params["timings"] is not None


def test_the_benchmark_command_of_the_batch_file_collects_every_pattern():
    (call,) = [words for words in cluster_commands() if words[0] == "pytest"]
    assert "--device=cuda" in call
    words = ["--device=cpu" if word == "--device=cuda" else word for word in call[1:] if "benchmark-json" not in word]
    command = [sys.executable, "-m", "pytest", *words, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "32 tests collected" in done.stdout, done.stdout + done.stderr


def test_environment_variables_of_the_cluster_page_are_read_by_the_build():
    named = set(re.findall(r"\b((?:LAMBDA_KERNELS|TORCH_CUDA)_[A-Z_]+)=", CLUSTERS.read_text()))
    assert named == {"LAMBDA_KERNELS_CUDA", "LAMBDA_KERNELS_LOCAL_VERSION", "TORCH_CUDA_ARCH_LIST"}
    build = (ROOT / "setup.py").read_text()
    assert [name for name in sorted(named) if name not in build] == []


def test_the_recipe_installs_from_the_wheelhouse_that_the_page_makes():
    recipe = (ROOT / "docs" / "lambda.def").read_text()
    sections = re.findall(r"^%(\w+)", recipe, re.MULTILINE)
    assert sections == ["files", "post", "environment", "test", "runscript"]
    assert "--dest wheelhouse" in CLUSTERS.read_text() and re.search(r"^    wheelhouse /opt/wheelhouse$", recipe, re.M)
    post = recipe.partition("%post\n")[2].partition("\n%")[0]
    assert subprocess.run(["bash", "-n"], input=post, text=True).returncode == 0
