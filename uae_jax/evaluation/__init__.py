"""The paper's benchmarks as commands; each command's module has `add_arguments(parser)`, which sets `run`."""
