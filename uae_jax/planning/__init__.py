"""What a run needs on a machine that is not there: bytes, floating-point operations, seconds."""
