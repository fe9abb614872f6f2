"""The texts of docs/gpu.md, and the figures of its goals."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A figure that has a goal. `name` is the model's (`gpu_model.predicted`)."""

    name: str
    what: str
    goal: float
    unit: str = "x"  # "x", "%" of the floor, or "" for a count, which is to be no larger than the goal


ONE, MANY = "`adapt`, `{}`", "`adapt_tasks`, 64 tasks, per task, `00011`"
OVER = {"stock_full": "over eager stock, all layers", "best": "over the best graph or `torch.compile` by hand"}
FIGURES = [
    Figure("nodes 11111", f"{ONE.format('11111')}: nodes", 190, ""),
    Figure("nodes 00011", f"{ONE.format('00011')}: nodes", 40, ""),
    Figure("adapt 11111 stock_full", f"{ONE.format('11111')}, {OVER['stock_full']}", 5),
    Figure("adapt 11111 best", f"{ONE.format('11111')}, {OVER['best']}", 1.5),
    Figure("adapt 00011 stock_full", f"{ONE.format('00011')}, {OVER['stock_full']}", 12),
    Figure("adapt 00011 best", f"{ONE.format('00011')}, {OVER['best']}", 2),
    Figure("tasks 00011 stock_full", f"{MANY}, {OVER['stock_full']}", 85),
    Figure("tasks 00011 bfloat16 stock_full", f"{MANY} in bfloat16, {OVER['stock_full']}", 130),
    Figure("tasks 00011 vmap", f"{MANY}, over `vmap` of stock", 8),
    *(
        Figure(f"block {layer} {way}", f"fused block {layer}, {way}, 64 tasks: of its floor", 0.6, "%")
        for way in ("forward", "backward") for layer in range(1, 5)
    ),
]  # fmt: skip
HEAD = """# On a GPU

```sh
make gpu
```

builds, tests, checks and measures on a machine with a GPU whose `python3` already has torch, triton and pytest, beside
nvcc, and which has no network; `make gpu PYTHON=python3.12` names another interpreter. What shows most comes first:

| stage | what it does |
| --- | --- |
| cuda, smoke | builds the CUDA kernels; runs each kernel once, behind a stalled stream, against float64 |
| build | the extension, and beside it the Triton kernels of the rows, in a pool of processes |
| replays | holds replays against eager calls; the profiler's table of one replay |
| environment, rows | the machine and its ceilings; the benchmark |
| tests, memcheck, racecheck | tests that use a device, with nothing measured; `compute-sanitizer` over our kernels |
| slow, timings | the columns of `torch.compile` and `vmap`; all patterns |
| report, capture, report | this page; a capture that fails, which may leave a process damaged; the page again |

Each stage has a deadline within one budget, 520 seconds from the start (`make gpu GPU_ARGS="--seconds 300"`), and the
results are rewritten after each row: a run that is cut off keeps what it had. `make gpu GPU_ARGS="--only build,rows"`
runs some stages, and `make gpu GPU_ARGS=--dry-run` starts all of them on any machine, in tiny shapes on the CPU;
nothing of that is a measurement.

It writes `bench/results/<gpu>-<date>.json`, beside it a file of timings for `select --timings`, and this page
(`bench/gpu_report.py` writes it anew from the newest results). With `OUT` set to a folder all is copied there each time
that it is written, with the log. On a cluster: [clusters.md](clusters.md).
"""
NONE = """
## Nothing has run on a GPU yet

There are no results from a GPU in this checkout: every figure below is a model's. Without a GPU the tests run the CUDA
sources in an emulator and the Triton kernels in Triton's interpreter, compile both where nvcc and triton are there, and
play a graph's rules on a tape of operators. Unproven until there are results:

- that the CUDA library and the Triton kernels give right results on a device; the CUDA sources were one file, and are
  now a file per operation in `csrc/cuda/`;
- that the updates with a rate per parameter and step do so (`csrc/cuda/sgd.cu`, `backends/triton/update.py`), and that
  a rate of 0 leaves a parameter as it is;
- that a CUDA graph of the present inner loop replays what it recorded: `inner/recorded.py` around `inner/loop.py`, with
  schedules, with rates per step, and with the query forward (`backends/inner_loop.py`);
- that backends of your own, and the choice by measurement, work on a device with blocks as one argument and calls seen
  as a whole;
- that TorchDynamo captures a `forward` there as it does here: captures were tried with torch 2.13 on CPUs alone, and
  the first-call check of a program has not run on a device;
- that the outer gradient, made of a backend's operations (`backends/outer_step.py`), gives right results on a
  device, and training with a rank per GPU (NCCL) too;
- that a capture on a stream of the driver's, the pool that all recordings of a device share, and what is repaired after
  a capture that failed (`_capture.py`, `cuda_graph.py`) do so under torch 2.11; that two devices and streams other than
  the default one do (`tests/test_streams.py` asks a device);
- that a frozen block in one pass (`block` in `backends/triton/norm.py`), a block of images whose gradients come from
  their patches' moments (`ImageBlock` in `autograd.py`), and moments by the distance of taps
  (`csrc/cuda/image_distances.cuh`) do so;
- that the cooperative launch of all steps of a small pattern (`csrc/cuda/steps.cuh`), the tensor cores' products of
  doubles, TF32 and half precision (`csrc/cuda/`), and kernels that are placed while the one before them ends, do so;
- that products of bfloat16 and TF32 parts (`backends/triton/products.py`) keep float32's accuracy on a device as in
  their model, and that the tiles which the sums of instructions favour are the fastest;
- that `make gpu` fits its time, and that what it compiles ahead is all that its rows look for: its stages were started
  in dry runs alone;
- that the memory of a candidate (`select --max-memory-mb`, `python/lambda_maml/memory.py`) is counted right there, and
  that steps by a rule of one's own on a chain's gradients (`inner/stepwise.py`) are right there;
- every speed, and the goals below.
"""
HOW = """
## How it is measured

- Adaptation time runs from support tensors to adapted parameters, as the caller sees it: wall clock around the call,
  the device waited for before and after. All columns of a row alternate in one process, in shuffled order; a ratio is
  taken inside each round and given as its median with the quartiles.
- "Eager stock, all layers" is the plain loop in torch's layers. The columns by hand are what one could write instead:
  frozen parameters without gradients; the frozen layers ahead of the first updated one run once; that as one CUDA graph
  of all steps over static buffers ("tuned": channels-last, cuDNN's algorithms chosen by measurement); prefix and step
  through `torch.compile`. Their parameters are put back off the clock; ours pays for its own copies.
- "Ours, dependent launches": the CUDA library's kernels are placed while the one before them ends
  (`Cuda.dependent_launches`). That is off by default, until a device shows that it gains.
- torch's default switches hold: TF32 in convolutions, not in matrix products.
- The network has random weights, the images are random pixels. Many tasks: `adapt_tasks` with one query image per task,
  and the same in the columns beside it; time per task.
- Nodes are the kernels, copies and fills that the profiler sees in one call, those beside its graph too.
- The fused block is timed by events around replays of a graph that goes through several input sets where one would fit
  in the L2 cache. Its images lie as blocks hand them to each other, channels-last. Its floor is the larger of two
  times: every input read once and every output written once at the speed of a large copy, and its multiply-adds at the
  rate of a large matrix product, both measured in the same run.
- A row whose result disagrees with stock PyTorch in float64 has no times.
"""
MODEL = """A figure that no device has shown is predicted for an H200 by `bench/gpu_model.py`, which writes
`bench/results/gpu-model.json`. It runs the code on tensors without values and counts the nodes of a graph, the bytes of
every tensor that a node is given, and the multiply-adds of its product. A node takes the gap, and the longest of: the
least, its bytes at the memory's rate, its operations at its kind's rate. Ours takes its graph and the host beside it;
stock is a constant; graphs by hand and `vmap` are counted and weighed in the same way, each operator of theirs as one
kernel, which favours them. Take each predicted time as right to 40%.
"""
