"""Forms of `nn`'s operations for XLA's CPU backend; `nn.conv`, `nn.norms` and `nn.linear` choose them."""
