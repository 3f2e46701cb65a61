"""Image and text encoders: the reward, the pooled condition of the transformer, and the benchmark's judges."""
