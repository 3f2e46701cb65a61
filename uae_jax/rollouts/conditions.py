"""What the decoder may read of a caption; a module of its own, so that settings need not import the models.

- `reference`: the caption alone, encoded by the reference model; training the captioner does not move the input.
- `policy`: the caption alone, encoded by the trained captioner.
- `caption_states`: the states of the caption's tokens where the captioner wrote them, after prompt and image. These
  states attend to the image, so that the decoder may read more than the text says.
"""

CONDITIONS = ("reference", "policy", "caption_states")
