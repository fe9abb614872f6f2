"""The inner loop: an adaptation is described once (`adaptation`), checked once (`checks`) and handed to one loop
(`loop`).

Each part of it is run by the first of two ways that takes it: `chain`, without autograd, or `autograd`. A CUDA graph
may wrap the loop (`recorded`), and a call that was made before may cut it short (`remembered`). `rules` say how a step
goes.
"""
