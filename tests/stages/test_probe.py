import time, jax, numpy as np
from conftest import *
def test_probe(whole):
    from uae_jax import trees
    print({k: trees.parameter_count(v) for k, v in whole.parts.items() if k!='encoders'})
    print(whole.rows.spec)
    for s in ("gen_for_und","und_for_gen"):
        t=time.time(); st=stage_of(whole, s); state=st.state(); step=st.step(state); print(s,"built",time.time()-t)
        for _ in range(2):
            t=time.time(); state, m = step(state, st.frozen, st.batch, st.key); print({k: float(v) for k,v in m.items()}, time.time()-t)
