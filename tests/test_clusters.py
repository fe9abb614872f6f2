"""docs/clusters.md, its batch file and its recipe: the shell parses, and the commands have their options."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from machine import PATIENCE

from lambda_maml import cli

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "docs" / "clusters.md"
BATCH = ROOT / "docs" / "bench.sbatch"
TRAIN = ROOT / "docs" / "train.sbatch"


def shell(text: str) -> list[list[str]]:
    """The words of each command; variables in ${NAME:-default} are their defaults, others stay."""
    joined = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text.replace("\\\n", " "))
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def cluster_commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", CLUSTERS.read_text(), re.MULTILINE | re.DOTALL)
    every = shell("\n".join([*blocks, BATCH.read_text()]))
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in every]


@pytest.mark.parametrize("path", ["docs/bench.sbatch", "docs/train.sbatch", "docs/clusters.md"])
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
    for name, *given in calls:
        words = [re.sub(r"\$(\w+)", r"\1", word) for word in given]  # the shell's variables
        try:
            context = cli.cli.commands[name].make_context(name, words)
        except click.UsageError as error:
            pytest.fail(f"lambda-maml {name} {' '.join(words)}: {error.format_message()}")
        assert context.params["timings"] is not None


def test_the_torchrun_commands_have_their_options():
    from torch.distributed.run import get_args_parser

    calls = [words[1:] for words in cluster_commands() if words[0] == "torchrun"]
    (own,) = re.findall(r"exec (torchrun .*?)'", TRAIN.read_text(), re.DOTALL)
    for name, value in {'"$0"': "4", '"$@"': "--out runs/cifar", "$MASTER_PORT": "29400"}.items():
        own = own.replace(name, value)
    (batch,) = shell(own)
    assert len(calls) == 2
    for words in [*calls, batch[1:]]:
        given = get_args_parser().parse_args(words)
        assert given.module and given.training_script == "lambda_maml"
        name, *options = given.training_script_args
        cli.cli.commands[name].make_context(name, options)


def free_port() -> int:
    """A port that is free, and below those that the system gives to whoever asks for any."""
    start = 15000 + os.getpid() % 10000
    for port in range(start, start + 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise OSError(f"no port from {start} on is free")


def test_the_training_batch_file_saves_on_sigusr1_and_goes_on_when_it_is_queued_again(tmp_path):
    """On this machine, without Slurm: torchrun starts two ranks, the script passes the signal on to rank 0."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    given = {"VENV": str(tmp_path), "RUN": "run", "RANKS": "2", "DEVICE": "cpu", "SLURM_SUBMIT_DIR": str(tmp_path)}
    given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    small = ["--width", "4", "--steps", "1", "--query", "1", "--val-tasks", "2", "--val-every", "2"]

    def submit(iterations: int) -> subprocess.Popen[str]:
        command = ["bash", str(TRAIN), *small, "--iterations", str(iterations)]
        environment = {**os.environ, **given, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    job = submit(1_000_000)
    while not (tmp_path / "run" / "last.safetensors").exists() and job.poll() is None:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    told, _ = job.communicate(timeout=PATIENCE)
    (stopped,) = re.findall(r"stopped by SIGUSR1 at iteration (\d+) and saved", told)
    assert job.returncode == 1 and not (tmp_path / "run" / ".lock").exists(), told
    job = submit(int(stopped) + 2)
    told, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0 and "validation tasks at iteration" in told, told


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
