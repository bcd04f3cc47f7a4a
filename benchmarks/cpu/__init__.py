"""Speed and memory of the losses on a CPU, beside PyTorch's own and others. `make bench`, or benchmarks/run.py.

cases    what is run: shapes, dtypes, rounds          memory   peak memory of a call, and what it should be
methods  the calls that are compared                  targets  what the figures should be
measure  times, in turns                              records  the CSV of all figures
parts    the benchmarks, which put these together     child    processes of their own, for an environment of their own
"""
