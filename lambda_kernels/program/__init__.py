"""A module's call as a program: its graph, conv-norm-ReLU-pool runs fused, every step knowing what it reads.

A step computes with parameters that are handed to it by name, so the same program runs the module itself, its adapted
copies, and parts of it (a frozen prefix once, the rest every inner step). Programs hold paths, never modules, so that
all modules of the same structure share one.

    steps.py      a program and how it runs         walk.py     the graph of a network of torch's layers
    calls.py      what a step computes              capture.py  the graph of a user's forward, by TorchDynamo
    structure.py  results that hold others          watch.py    what an operation does beside its result
    shadow.py     a module around other tensors     fuse.py     runs of layers that are one block
    snapshot.py   is a module what it was?          build.py    from the graph to steps
    lookup.py     the program of a call             check.py    a program against its module
"""

from .calls import BlockCall, LinearCall
from .fuse import EVALUATION
from .lookup import aliases_of, memo_of, modes_of, notes_of, program_for, program_seen, snapshot_of, tensors_of
from .shadow import replace, shadow
from .steps import LAYERS, NORMS, Arguments, Fusion, OwnState, Program, Slot, Step
from .structure import flatten
from .walk import plain_view

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
    "aliases_of",
    "flatten",
    "memo_of",
    "modes_of",
    "notes_of",
    "plain_view",
    "program_for",
    "program_seen",
    "replace",
    "shadow",
    "snapshot_of",
    "tensors_of",
]
