"""Speed and memory of the losses on a CPU, compared with PyTorch's and others. `make bench`, or benchmarks/run.py.

cases      shapes, dtypes, rounds                     memory   measured and predicted peak memory of a call
methods    the calls that are compared                targets  limits for the figures
log_probs  those for log-probabilities and entropy    records  the CSV of all figures
measure    interleaved timing                         child    measuring in a subprocess with its own environment
parts      the benchmarks
"""
