"""A module as a program: its torch.fx graph, conv-norm-ReLU-pool runs fused, every step knowing what it reads.

A step computes with parameters that are handed to it by name, so the same program runs the module itself, its adapted
copies, and parts of it (a frozen prefix once, the rest every inner step). Programs hold paths, never modules, so that
all modules of the same structure share one.

    steps.py      a program and how it runs         trace.py    from a module to its graph
    calls.py      what a step computes              fuse.py     runs of layers that are one block
    structure.py  results that hold others          purity.py   what may be left out a second time
    shadow.py     a module around other tensors     build.py    from the graph to steps
    snapshot.py   is a module what it was?          lookup.py   the program of a module, the program of a call
"""

from .calls import BlockCall, LinearCall
from .fuse import EVALUATION
from .lookup import memo_of, program_for, program_of, tensors_of
from .shadow import replace, shadow
from .steps import LAYERS, NORMS, Arguments, Fusion, OwnState, Program, Slot, Step
from .structure import flatten

__all__ = [
    "EVALUATION",
    "LAYERS",
    "NORMS",
    "Arguments",
    "BlockCall",
    "Fusion",
    "LinearCall",
    "OwnState",
    "Program",
    "Slot",
    "Step",
    "flatten",
    "memo_of",
    "program_for",
    "program_of",
    "replace",
    "shadow",
    "tensors_of",
]
