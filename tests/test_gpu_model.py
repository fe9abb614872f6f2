"""The model that predicts the figures of docs/gpu.md: its arithmetic by hand, and that its results are the committed
ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benches import module
from machine import PATIENCE

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
gpu_model = module("gpu_model")
Node = gpu_model.Node


def test_a_node_takes_the_gap_and_the_longest_of_three_times():
    assert Node("empty", 0.0).seconds == pytest.approx(3.2e-6)  # 1.2 us and 2 us
    assert Node("copy", 4.3e9).seconds == pytest.approx(1.2e-6 + 1e-3)
    assert Node("convolve", 4.3e6, 1.5e9, "convolve").seconds == pytest.approx(1.2e-6 + 1e-5)
    assert Node("convolve", 4.3e6, 1.5e9, "convolve", half=True).seconds == pytest.approx(1.2e-6 + 5e-6)
    assert Node("sums", 0.0, 1e9, "float64", half=True).seconds == pytest.approx(1.2e-6 + 1e-4)  # no tensor core


def test_steps_in_one_launch_take_their_products_or_wait_for_each_other():
    sizes = {"tasks": 64, "images": 25, "steps": 5, "features": 1600, "ways": 5}
    block = {"inputs": 64, "outputs": 64, "kernel_height": 3, "kernel_width": 3, "out_height": 10, "out_width": 10}
    node = gpu_model.all_steps(SimpleNamespace(**sizes, **block), 1000)
    assert node.flops == 5 * 2 * 64 * 25 * (2 * 100 * 64 * 576 + 3 * 1600 * 5)
    assert node.seconds == pytest.approx(1.2e-6 + node.flops / 1.5e14)
    few = gpu_model.all_steps(SimpleNamespace(**{**sizes, "tasks": 1}, **dict.fromkeys(block, 0)), 1000)
    assert few.flops == 5 * 2 * 25 * 2 * 1600 * 5 and few.seconds == pytest.approx(1.2e-6 + 5 * 1.8e-5)


def test_a_full_adaptation_has_the_nodes_of_a_count_and_the_products_of_its_shapes():
    """conv4 on 25 images of 84 x 84: blocks of 84, 42, 21 and 10 pixels a side, 64 channels, 5 steps."""
    graph = gpu_model.adaptation("11111")
    assert len(graph.nodes) == graph.total
    product = [2 * 25 * side**2 * 64 * 64 * 9 for side in (42, 21, 10)]
    forward = [node for node in graph.nodes if node.name == "triton convolve"]
    assert sorted({node.flops for node in forward}) == sorted(product)
    # forward and back to the input, five times, and the weight's gradient
    assert sum(node.flops for node in forward) == 2 * 5 * sum(product)
    weights = [node for node in graph.nodes if node.kind == "weight gradient"]
    assert sum(node.flops for node in weights) == 5 * sum(product)
    # x and z of block 2 [25, 64, 42, 42], its weight, and the moments of its tiles
    x = 4 * 25 * 64 * 42 * 42
    assert all(2 * x + 4 * 64 * 64 * 9 <= node.bytes < 2.2 * x for node in forward if node.flops == product[0])
    first = 2 * 25 * 84**2 * 64 * 27
    assert sum(node.flops for node in graph.nodes if node.name == "cuda image_block") == 5 * first
    assert sum(node.flops for node in graph.nodes if node.name == "cuda image_block_grad") == 5 * first / 4


def test_a_frozen_first_block_reads_its_images_and_writes_its_windows():
    (first,) = [n for n in gpu_model.adaptation("00011").nodes if n.name == "cuda image_block" and n.bytes]
    assert first.flops == 2 * 25 * 84**2 * 64 * 27 and first.kind == "patches"
    moved = 4 * 25 * (3 * 84**2 + 64 * 42**2)
    assert moved < first.bytes < 1.01 * moved


def moments_of_an_image() -> int:
    """Pairs of taps of patches that reach the border of 84 x 84 pixels; 13 distances of three channels within."""
    return (84**2 - 80**2) * 28 * 29 + 2 * 84**2 * 13 * 9


def test_moments_are_counted_by_distance_inside_of_the_images():
    (node,) = [n for n in gpu_model.adaptation("11111").nodes if n.kind == "float64"]
    assert node.flops == 25 * moments_of_an_image() and node.name == "cuda image_moments"


def test_many_tasks_move_and_compute_as_much_more():
    one, many = gpu_model.adaptation("00011"), gpu_model.adaptation("00011", 64)
    convolutions = [sum(n.flops for n in graph.nodes if n.kind != "fma") for graph in (one, many)]
    # the support images of 64 tasks, and a query image of each through all four blocks, the first one's moments too
    query = sum(2 * 64 * side**2 * 64 * taps for side, taps in ((84, 27), (42, 576), (21, 576), (10, 576)))
    query += moments_of_an_image() * 64
    assert convolutions[1] <= 64 * convolutions[0] + query
    assert convolutions[1] >= 64 * convolutions[0]
    half = gpu_model.adaptation("00011", 64, torch.bfloat16)
    assert sum(n.bytes for n in half.nodes) < 0.9 * sum(n.bytes for n in many.nodes)
    assert half.seconds < many.seconds


def test_stock_is_counted_in_the_same_way():
    stock = gpu_model.by_hand("00011")
    # three blocks once, the last one five times forward and back to its weight
    blocks = [2 * 25 * side**2 * 64 * taps for side, taps in ((84, 27), (42, 576), (21, 576), (10, 576))]
    products = sum(node.flops for node in stock.nodes if node.kind == "convolve")
    assert products == sum(blocks[:3]) + 5 * 2 * blocks[3]


def test_the_floor_of_a_block_is_what_it_must_move_or_compute():
    took, floor = gpu_model.block(1, backward=False)
    assert floor == pytest.approx(64 * 2 * 25 * 42**2 * 64 * 576 / 4e14) and took > floor
    _, first = gpu_model.block(0, backward=False)
    values = 64 * 25 * (3 * 84**2 + 64 * 42**2) + 64 * 64 * 27 + 2 * 64 * 64
    assert first == pytest.approx(4 * values / 4.3e12)


def test_the_committed_predictions_are_the_models(tmp_path: Path):
    made = tmp_path / "made.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "gpu_model.py"), "--result", str(made)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    kept = json.loads((ROOT / "bench" / "results" / "gpu-model.json").read_text())
    assert json.loads(made.read_text()) == kept, "run python3 bench/gpu_model.py, then bench/gpu_report.py"
