"""CLIP states with OpenAI's tensor names: the original CLIP (arXiv 2103.00020) and Long-CLIP (arXiv 2403.15378).

They have no config: sizes are read off the shapes, and the rest is that of the official code. Query, key and value are
one fused tensor, which `hf.split_tensors` shows as three, so that each parameter has one source.
"""

from uae_jax.hf.rules import Rule
from uae_jax.hf.safetensors import Tensors
from uae_jax.hf.split_tensors import PARTS
from uae_jax.models.encoders.clip import LEGACY_EOS
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, LongCLIPTextConfig
from uae_jax.models.encoders.tables import norm

HEAD_WIDTH = 64  # of all published models with these names, which do not store it
IGNORED = r"input_resolution|context_length|vocab_size"  # sizes that the original states hold as tensors
FUSED = r".*\.attn\.in_proj_(weight|bias)"  # query, key and value as one tensor
VISION, TEXT = "visual.transformer.resblocks.", "transformer.resblocks."
MARKS = ("visual.class_embedding", "visual.conv1.weight", "visual.proj")  # tensors that tell these states from others


def config_of(tensors: Tensors) -> CLIPConfig:
    """The config that the shapes of a state imply; Long-CLIP's where there is a second table of text positions.

    Raises:
      ValueError: a tensor that implies a size is missing, or it is not a vision transformer.
    """

    def size(name: str, axis: int) -> int:
        if name not in names or len(tensors.shape(name)) <= axis:
            raise ValueError(
                f"{tensors.path} is not the state of a CLIP vision transformer: {name} is missing or has no axis {axis}"
            )
        return tensors.shape(name)[axis]

    def layers(prefix: str) -> int:
        return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})

    names = tensors.names()
    width, patch = size("visual.conv1.weight", 0), size("visual.conv1.weight", 3)
    grid = round((size("visual.positional_embedding", 0) - 1) ** 0.5)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=size(f"{VISION}0.mlp.c_fc.bias", 0),
        projection_dim=size("visual.proj", 1),
        num_hidden_layers=layers(VISION),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        num_channels=size("visual.conv1.weight", 1),
        image_size=grid * patch,
        patch_size=patch,
    )
    width = size("token_embedding.weight", 1)
    kind = LongCLIPTextConfig if "positional_embedding_res" in names else CLIPTextConfig
    text = kind(
        vocab_size=size("token_embedding.weight", 0),
        hidden_size=width,
        intermediate_size=size(f"{TEXT}0.mlp.c_fc.bias", 0),
        projection_dim=size("text_projection", 1),
        num_hidden_layers=layers(TEXT),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=size("positional_embedding", 0),
        eos_token_id=LEGACY_EOS,
    )
    return CLIPConfig(vision, text)


def rules(config: CLIPConfig) -> list[Rule]:
    """The table of both towers, for tensors seen through `SplitTensors`."""
    vision, text = config.vision, config.text
    shape = (vision.hidden_size, vision.num_channels, vision.patch_size, vision.patch_size)
    table = [
        Rule("vision/class_embedding", "visual.class_embedding"),
        Rule("vision/patch_embedding/kernel", "visual.conv1.weight", "patch", torch_shape=shape),
        Rule("vision/position_embedding", "visual.positional_embedding"),
        *norm("vision/pre_norm", "visual.ln_pre"),
        *norm("vision/post_norm", "visual.ln_post"),
        Rule("vision/projection/kernel", "visual.proj"),
        *_blocks("vision", VISION, vision.num_hidden_layers),
        Rule("text/token_embedding", "token_embedding.weight"),
        Rule("text/position_embedding", "positional_embedding"),
        *norm("text/final_norm", "ln_final"),
        Rule("text/projection/kernel", "text_projection"),
        *_blocks("text", TEXT, text.num_hidden_layers),
        Rule("logit_scale", "logit_scale"),
    ]
    if isinstance(text, LongCLIPTextConfig):
        table.append(Rule("text/position_embedding_res", "positional_embedding_res"))
    return table


def _blocks(tower: str, prefix: str, count: int) -> list[Rule]:
    layers, block = tuple(range(count)), f"{prefix}{{}}."
    maps = {
        f"attention/{part}": (f"{block}attn.in_proj_weight[{part}]", f"{block}attn.in_proj_bias[{part}]")
        for part in PARTS
    }
    for ours, theirs in (("attention/out", "attn.out_proj"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj")):
        maps[ours] = (f"{block}{theirs}.weight", f"{block}{theirs}.bias")
    table = []
    for ours, (weight, bias) in maps.items():
        table.append(Rule(f"{tower}/layers/{ours}/kernel", weight, "dense", layers))
        table.append(Rule(f"{tower}/layers/{ours}/bias", bias, layers=layers))
    for number in (1, 2):
        table += norm(f"{tower}/layers/norm{number}", f"{block}ln_{number}", layers)
    return table
