"""Random networks and random calls beside plain PyTorch in float64: `PYTHONPATH=tests python -m fuzz --help`.

`grammar` writes a network as Python source, `adaptations` adapts it in every way beside a plain loop, `calls` are calls
of `lambda_kernels.functional`, `runner` runs them in processes of their own and reports a seed for each failure.
"""
