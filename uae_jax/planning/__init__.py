"""The needs of a run on an absent machine: bytes, floating-point operations, seconds."""
