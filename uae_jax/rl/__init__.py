"""The mathematics of reinforcement learning, without any model: advantages, losses, sums over steps."""
