"""The models.

Letters of shapes in signatures, the same everywhere:
  b batch            n samples, n = b g     g group
  t tokens           s context tokens       p patches
  d width            h heads                k width of a head     j key heads
  v vocabulary       c channels             l layers
`rows` and `columns` are the sides of latents or of patches, `height` and `width` those of images.
"""
