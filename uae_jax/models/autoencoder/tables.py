"""Which published tensor is which parameter of encoder and decoder, in the names of diffusers' AutoencoderKL."""

from uae_jax.hf.rules import Rule
from uae_jax.models.autoencoder.blocks import Sizes


def affine(ours: str, theirs: str, layout: str, layers: tuple[int, ...] | None = None) -> list[Rule]:
    """Kernel and bias of a linear map or convolution."""
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", layout, layers),
        Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers),
    ]


def _group_norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _residual_block(ours: str, theirs: str, shortcut: bool) -> list[Rule]:
    rules = []
    for part in ("1", "2"):
        rules += _group_norm(f"{ours}/norm{part}", f"{theirs}.norm{part}")
        rules += affine(f"{ours}/conv{part}", f"{theirs}.conv{part}", "conv")
    return rules + (affine(f"{ours}/conv_shortcut", f"{theirs}.conv_shortcut", "conv") if shortcut else [])


def _attention(ours: str, theirs: str) -> list[Rule]:
    rules = _group_norm(f"{ours}/group_norm", f"{theirs}.group_norm")
    for name, published in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("output", "to_out.0")):
        rules += affine(f"{ours}/{name}", f"{theirs}.{published}", "dense")
    return rules


def _ends(part: str, sizes: Sizes) -> list[Rule]:
    """What encoder and decoder have in common: first and last convolution, middle block."""
    rules = affine(f"{part}/conv_in", f"{part}.conv_in", "conv")
    for number in (0, 1):
        rules += _residual_block(f"{part}/mid_block/resnets_{number}", f"{part}.mid_block.resnets.{number}", False)
    if sizes.middle_attention:
        rules += _attention(f"{part}/mid_block/attention", f"{part}.mid_block.attentions.0")
    rules += _group_norm(f"{part}/conv_norm_out", f"{part}.conv_norm_out")
    return rules + affine(f"{part}/conv_out", f"{part}.conv_out", "conv")


def autoencoder_rules(sizes: Sizes) -> list[Rule]:
    """The table of encoder and decoder, for `hf.rules.load_params` and `published_tensors`."""
    rules, last = _ends("encoder", sizes) + _ends("decoder", sizes), len(sizes.widths) - 1
    for part, block, sample, widths, layers, lowest in (
        ("encoder", "down_blocks", "downsampler", sizes.widths, sizes.layers, last),
        ("decoder", "up_blocks", "upsampler", sizes.widths[::-1], sizes.layers + 1, 0),
    ):
        before = widths[0]
        for level, width in enumerate(widths):
            ours, theirs = f"{part}/{block}_{level}", f"{part}.{block}.{level}"
            for layer in range(layers):
                changes = layer == 0 and before != width
                rules += _residual_block(f"{ours}_resnets_{layer}", f"{theirs}.resnets.{layer}", changes)
                if sizes.lowest_attention and level == lowest:
                    rules += _attention(f"{ours}_attentions_{layer}", f"{theirs}.attentions.{layer}")
            if level < last:
                rules += affine(f"{ours}_{sample}", f"{theirs}.{sample}s.0.conv", "conv")
            before = width
    return rules
