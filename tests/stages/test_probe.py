import time, jax, numpy as np
from conftest import *
def test_probe(whole):
    from uae_jax import trees
    print({k: trees.parameter_count(v) for k, v in whole.parts.items() if k!='encoders'})
    print(whole.rows.spec)
