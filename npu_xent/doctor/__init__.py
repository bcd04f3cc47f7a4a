"""`python -m npu_xent.doctor` checks the installation, the results and the times, and prints a report.

npu_xent itself does not import this package.
"""
