"""One check of the whole package on one card: `benchmarks/gpu_check.sh` (dev/gpu_check.md).

`__main__` runs the parts, each in a process of its own (`part`), in the order of their value (`schedule`), and writes
the two files (`report`, `page`). The parts: `device`, `steps`, `attention` (`forms`), `phases` and `torch` (`sides`).
"""
