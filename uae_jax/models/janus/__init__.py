"""Janus-Pro (arXiv 2501.17811): one autoregressive model that captions images and draws them."""
