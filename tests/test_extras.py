"""What is missing is named, with the extra of the package that brings it, where it is wanted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from machine import PATIENCE

import lambda_maml

HIDE = "import sys\nfor name in {names}:\n    sys.modules[name] = None\n"


def without(*names: str, program: str) -> subprocess.CompletedProcess[str]:
    """A process that has not these packages."""
    code = HIDE.format(names=names) + program
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)


def test_the_core_needs_torch_numpy_and_safetensors_alone():
    names = ("click", "rich", "PIL", "matplotlib", "fontTools", "platformdirs", "triton")
    program = (
        "import torch\nfrom lambda_maml import adapt, data, models\n"
        "model = models.conv4(5, 1, 8, 28)\n"
        "xs, ys, xq, yq = data.sample_tasks(data.load('glyphs', split='val'), 1)[0]\n"
        "print(list(adapt(model, xs, ys, pattern='00011', steps=1)(xq).shape))\n"
    )
    done = without(*names, program=program)
    assert done.returncode == 0 and done.stdout.strip() == "[75, 5]", done.stderr


def test_the_command_line_names_its_extra():
    done = without("click", program="from lambda_maml.__main__ import main\nmain()")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == (
        "lambda-maml: error: lambda-maml needs click, which is not installed: pip install 'lambda-kernels[cli]'"
    )


def test_the_command_line_answers_before_torch_is_loaded():
    program = "from lambda_maml.cli import run\nassert run(['--help']) == 0\nassert 'torch' not in sys.modules"
    done = without(program=program)
    assert done.returncode == 0 and "adapt" in done.stdout, done.stderr


def test_the_public_names_are_what_they_name_whatever_was_imported_before():
    program = (
        "import json, lambda_maml.evaluate, lambda_maml.explain, lambda_maml as package\n"
        "print(json.dumps({name: type(getattr(package, name)).__name__ for name in package.__all__}))"
    )
    kinds = json.loads(without(program=program).stdout)
    assert kinds["adapt"] == kinds["explain"] == kinds["select_pattern"] == "function"
    assert kinds["data"] == kinds["models"] == kinds["rules"] == "module" and kinds["Learner"] == "type"
    assert set(lambda_maml.__all__) <= set(dir(lambda_maml))
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        _ = lambda_maml.adopt  # type: ignore[attr-defined]
