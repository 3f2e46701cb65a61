"""Convolutional encoder and decoder of images, shared by SD3's auto-encoder and Janus's image tokenizer."""
