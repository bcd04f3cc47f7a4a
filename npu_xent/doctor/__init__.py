"""Is everything right? `python -m npu_xent.doctor` looks at the installation, the results and the times, and says so.

Not imported by npu_xent itself.
"""
