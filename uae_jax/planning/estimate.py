"""Bytes of one device by formulas, without compiling.

Parameters, optimizer and batch are exact, from shapes and sharding rules. Temporaries are those of the largest phase of
a stage: caption sampling, image generation, comparison of images, or a gradient. The numbers of copies were fitted to
compiled stages of the full-size presets on cards. A test bounds the estimate to 1 to 1.15 times their peaks
(docs/cards.md).
"""

import dataclasses
import math
from typing import Any

import jax

from uae_jax import sharding, trees
from uae_jax.methods.gathered import DECODER
from uae_jax.methods.method import Described
from uae_jax.models.janus.unified import Unified
from uae_jax.planning.compile import Memory, Program
from uae_jax.planning.roofline import MeshSizes
from uae_jax.stages.run_config import RunConfig

FLOAT = 4
BLOCK = 512  # queries in one block of attention logits (`nn.attention.plain`)
# saved activations of a layer without recomputation, in units of its input; most are attention weights
WHOLE_LAYER = 50


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Inputs of the formulas for one device: widths, lengths and bytes of a number.

    `encoder` is the number of attention logits per image in the image encoder; `whole_layers` is True without
    recomputation.
    """

    activation: int
    tensor: int
    text_width: int
    text_mlp: int
    text_layers: int
    cache: int
    vocabulary: int
    width: int
    alive: float
    layers: int
    tokens: int
    context: int
    context_width: int
    pixels: int
    vae_width: int
    prompt: int
    encoder: int
    whole_layers: bool


def _shapes(config: RunConfig, program: Program, sizes: MeshSizes, system: Described, caption: int) -> Shapes:
    model, names = system.model, getattr(getattr(program.config, "reward", None), "names", ())
    text, decoder = model.captioner.text, model.transformer
    side = model.image_size // model.decoder.cell
    (context, _), _ = model.decoder.states_shape(caption)
    encoder = max((_encoder_logits(system.encoders[name].config) for name in names), default=0)
    return Shapes(
        activation=2 if config.model.dtype == "bfloat16" else 4,
        tensor=sizes.tensor,
        text_width=text.width,
        text_mlp=text.mlp_width,
        text_layers=text.layers,
        cache=2 * text.layers * text.key_heads * text.head_width,
        vocabulary=text.vocab_size,
        width=decoder.width,
        alive=decoder.alive,
        layers=decoder.num_layers,
        tokens=side**2 + context,
        context=context,
        context_width=decoder.joint_attention_dim,
        pixels=model.image_size**2,
        vae_width=model.vae.block_out_channels[0],
        prompt=_length(program, "prompt_ids"),
        encoder=encoder,
        whole_layers=config.model.remat == "none",
    )


def _length(program: Program, name: str) -> int:
    """Tokens of a field of the batch; 0 where the stage does not read it."""
    return program.batch[name].shape[1] if name in program.batch else 0


def _encoder_logits(config: Any) -> int:
    """Number of attention logits of an image encoder for one image at once."""
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    return config.num_attention_heads * min(BLOCK, tokens) * tokens


def _transformer_layer(s: Shapes, rows: float, copies: float) -> float:
    return rows * s.tokens * s.width * copies * s.activation


def _language_layer(s: Shapes, rows: float, length: int) -> float:
    return rows * length * (7 * s.text_width + 3 * s.text_mlp / s.tensor) * s.activation


def _maps(s: Shapes, rows: float, kept: float) -> float:
    """`kept` float32 maps of the auto-encoder's first width at full resolution."""
    return rows * s.pixels * s.vae_width * FLOAT * kept


def _generation(s: Shapes, rows: float, guidance: float, chunk: float) -> float:
    both = rows * (1 if guidance == 1 else 2)
    context = both * s.context * s.width * s.activation
    # the last level of the VAE's decoder begins with twice the first width
    largest = max(_transformer_layer(s, both, s.alive) + context, _maps(s, min(chunk or rows, rows), 8))
    return largest + rows * s.pixels * 3 * FLOAT


def _comparison(s: Shapes, rows: float, groups: float) -> float:
    """Images, and attention logits of the image encoder, in float32."""
    return 3 * rows * s.pixels * 3 * FLOAT + 2 * (rows + groups) * s.encoder * FLOAT


def _captioning(s: Shapes, rows: float, groups: float, length: int, packed: bool) -> float:
    own = rows * (length + s.prompt) if packed else rows * length
    return (own + groups * s.prompt) * s.cache * s.activation + 3 * rows * s.vocabulary * FLOAT


def _writing(settings: Any, s: Shapes, rows: float, some: float, length: int, packed: bool) -> float:
    """Captions of `some` images at once, or in slots with the prompts of all `rows`."""
    group, slots = settings.captions_per_image, settings.rollout_slots
    if slots := min(slots, rows * group):
        # the loop has the keys and values of all slots twice: as they were, and with those of new prompts
        again = slots * (length + s.prompt) * s.cache * s.activation
        return _captioning(s, slots, rows, length, True) + again
    return _captioning(s, some * group, some, length, packed)


def _language_gradient(s: Shapes, rows: float, length: int, chunk: int) -> float:
    """Saved activations of every layer (its input, or all), one layer in the backward pass, and logits of `chunk`
    positions twice.
    """
    layer, inputs = _language_layer(s, rows, length), rows * length * s.text_width * s.activation
    saved = s.text_layers * (WHOLE_LAYER * inputs if s.whole_layers else inputs)
    return saved + 2 * layer + 2 * rows * min(chunk, length) * s.vocabulary * FLOAT


def _gradient(s: Shapes, rows: float) -> float:
    """Saved activations and one layer in the backward pass, of the transformer."""
    layer, inputs = _transformer_layer(s, rows, 7 + 8 / s.tensor), _transformer_layer(s, rows, 1)
    return s.layers * (WHOLE_LAYER * inputs if s.whole_layers else inputs) + 2.2 * layer


def _stage_activations(
    stage: str, settings: Any, s: Shapes, rows: float, length: int, gathered: float, trained: float, ways: int
) -> float:
    """Bytes of the largest phase of a stage on one of `ways` devices.

    Args:
      stage, settings: of the run.
      s: sizes of the model.
      rows: images of a batch on the device.
      length: of captions in tokens.
      gathered: bytes of the gathered weights for sampling.
      trained: bytes of the trained weights on the device.
      ways: number of shards of a batch.
    """
    parts = _parts_of(settings)
    small = max(rows / parts, 1)
    # gradients of the transformer's layers before their sum over devices: as many bytes as a device's trained weights
    unsummed = trained if ways > 1 else 0.0
    if stage == "pretrain":
        encode = _language_layer(s, small, s.context) + _maps(s, small, 3)
        return max(encode, _gradient(s, small) + unsummed) + rows * s.context * s.text_width * s.activation
    if stage not in ("cold_start", "gen_for_und", "und_for_gen"):
        return _gradient(s, small) + unsummed  # a stranger's method: its gradient is known, its rollout is not
    guided = 1 if settings.guidance_scale == 1 else 2
    if stage == "cold_start":
        steps = small * s.pixels / 64 * 16 * FLOAT * settings.sampler_steps
        return steps + max(
            _gradient(s, small * guided) + unsummed,
            _maps(s, min(max(settings.vae_chunk / ways, 1) if settings.vae_chunk else small, small), 22),
        )
    chunk, group = settings.vae_chunk and max(settings.vae_chunk / ways, 1), settings.group_size
    some = max(rows / settings.rollout_parts, 1)  # images of one part of a rollout
    generation = max(_generation(s, some * group, settings.guidance_scale, chunk), _comparison(s, some * group, some))
    if stage == "gen_for_und":
        captioning = gathered + _writing(settings, s, rows, some, length, bool(gathered))
        return max(captioning, generation, _language_gradient(s, small * group, length, settings.score_chunk))
    steps = getattr(settings.own, "kept_steps", 1)
    # a rollout keeps the latents of the window for its updates, and contexts: on one device, one an image; how many
    # copies of the latents stay is fitted to docs/cards.md
    latents = (4 if ways == 1 else 2) * steps * rows * group * s.pixels / 64 * 16 * FLOAT
    context, together = s.context * s.context_width * s.activation, max(rows * group / parts, 1)
    window = latents + rows * (1 if ways == 1 else group) * context
    # the images of one part, or of one micro-batch, have contexts of their own there
    generation += some * group * context if ways == 1 else 0
    gradient = _gradient(s, together * guided) + (together * context if ways == 1 else 0)
    return window + max(gathered + _writing(settings, s, rows, some, length, bool(gathered)), generation, gradient)


def _unified_shapes(config: RunConfig, program: Program, sizes: MeshSizes, system: Described) -> Shapes:
    """The inputs for one network that draws by tokens; the fields of a diffusion transformer are 0."""
    network, names = system.model.network, program.config.reward.names
    text = network.text
    return Shapes(
        activation=2 if config.model.dtype == "bfloat16" else 4,
        tensor=sizes.tensor,
        text_width=text.width,
        text_mlp=text.mlp_width,
        text_layers=text.layers,
        # the heads of keys and values are cut where they divide
        cache=2 * text.layers * text.key_heads * text.head_width // math.gcd(sizes.tensor, text.key_heads),
        vocabulary=text.vocab_size,
        width=0,
        alive=0,
        layers=0,
        tokens=0,
        context=0,
        context_width=0,
        pixels=system.model.image_size**2,
        vae_width=network.vq.base,
        prompt=_length(program, "prompt_ids"),
        encoder=max((_encoder_logits(system.encoders[name].config) for name in names), default=0),
        whole_layers=config.model.remat == "none",
    )


def _unified_activations(settings: Any, s: Shapes, model: Unified, rows: float, gathered: float, ways: int) -> float:
    """Bytes of the largest phase of `unified_ar` on one of `ways` devices; see `_stage_activations`.

    Both halves of guidance are rows of the language model. The prompt of a drawing is kept once for its images.
    """
    codes, cells, group = model.network.vq.codes, model.network.vq.tokens, settings.group_size
    some, small = (max(rows / parts, 1) for parts in (settings.rollout_parts, _parts_of(settings)))
    halves = 1 if settings.guidance_scale == 1 else 2
    drawn, length = group * settings.images_per_caption, settings.max_new_tokens
    prompts = dataclasses.replace(s, prompt=model.template.length(length), vocabulary=codes)
    captioning = gathered + _captioning(s, some * group, some, length, bool(gathered))
    drawing = gathered + _captioning(prompts, some * drawn * halves, some * group * halves, cells, bool(gathered))
    # the states of the prompts as they were computed, and as the loop over tokens reads them
    drawing += 2 * some * group * halves * prompts.prompt * s.cache * s.activation
    chunk = settings.vae_chunk and max(settings.vae_chunk / ways, 1)
    images = some * drawn
    decoding = _maps(s, min(chunk or images, images), 8) + images * s.pixels * 3 * FLOAT
    scored = halves if settings.score == "guided" else 1
    gradient = max(
        _language_gradient(s, small * group, length, settings.score_chunk),
        _language_gradient(prompts, small * drawn * scored, cells, settings.score_chunk),
    )
    return max(captioning, drawing, decoding, _comparison(s, images, some), gradient)


def _parts_of(settings: Any) -> int:
    return settings.micro_batches * settings.updates_per_rollout


def share(tree: Any, sizes: MeshSizes) -> float:
    """Bytes of one device's share of a tree by the sharding rules."""
    total = 0.0
    for name, leaf in trees.flatten(tree).items():
        spec = sharding.parameter_spec(name, tuple(leaf.shape), sizes)
        ways = math.prod(sizes.shape[axis] for cut in spec for axis in sharding.axes_of(cut))
        total += math.prod(leaf.shape) * leaf.dtype.itemsize / ways
    return total


def estimate_memory(program: Program, config: RunConfig, sizes: MeshSizes, system: Described) -> Memory:
    """The memory of a stage on one device, without compiling.

    Args:
      program: the stage, without shardings.
      config: of the run.
      sizes: of the mesh.
      system: without weights.
    """
    settings, state = program.config, program.state
    length = getattr(settings, "max_new_tokens", 0) or _length(program, "caption_ids")
    unified = isinstance(system.model, Unified)
    shapes = (
        _unified_shapes(config, program, sizes, system) if unified else _shapes(config, program, sizes, system, length)
    )
    batch = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.batch)) / sizes.batch
    trained = share(state.params, sizes)
    resident = share(state, sizes) + share(program.frozen, sizes) + batch
    # the sum of gradients and the gradients of a micro-batch; loops over denoising steps read a copy of the weights in
    # the precision of activations
    gradients = 2 * trained + (
        trained * shapes.activation / FLOAT if program.stage == "cold_start" and shapes.activation < FLOAT else 0
    )
    layers = _largest_layer(program, sizes) + _gathered_decoder(program, sizes)
    rows, gathered = settings.batch_size / sizes.batch, _sampling_weights(program, sizes, shapes)
    activations = (
        _unified_activations(settings, shapes, system.model, rows, gathered, sizes.batch)
        if unified
        else _stage_activations(program.stage, settings, shapes, rows, length, gathered, trained, sizes.batch)
    )
    entries = (
        (gradients, "float32", "gradients"),
        (layers, config.model.dtype, "gathered weights of two layers, and of the decoder where it is kept"),
        (activations, config.model.dtype, "activations"),
    )
    temporaries = sum(size for size, _, _ in entries)
    return Memory(resident, temporaries, resident + temporaries, tuple(sorted(entries, reverse=True)), estimated=True)


def _sampling_weights(program: Program, sizes: MeshSizes, s: Shapes) -> float:
    """Bytes of the gathered language model for sampling (`gather_weights`), with the gathers in progress."""
    if not getattr(program.config, "gather_weights", False):
        return 0.0
    language = program.frozen["language"] if "language" in program.frozen else program.state.params["language"]
    layers = trees.parameter_count(language["layers"]) * s.activation / sizes.tensor
    if sizes.fsdp == 1:
        return layers
    # each device keeps its part, and has one complete layer at a time
    if ways := getattr(program.config, "rollout_ways", 0):
        return (trees.parameter_count(language) / ways + layers / s.activation / s.text_layers) * s.activation
    return 1.22 * layers + (trees.parameter_count(language) * s.activation / sizes.tensor - layers)


def _gathered_decoder(program: Program, sizes: MeshSizes) -> float:
    """Bytes of the copy of `gather_decoder`, as it is stored."""
    if sizes.fsdp == 1 or not getattr(program.config, "gather_decoder", False):
        return 0.0
    kept = [leaf for name in DECODER for leaf in jax.tree.leaves(program.frozen.get(name, {}))]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept) / sizes.tensor


def _largest_layer(program: Program, sizes: MeshSizes) -> float:
    """Bytes of the gathered weights of two layers of the largest stack, in bfloat16; 0 without gathers."""
    if sizes.fsdp == 1:
        return 0.0
    stacks: dict[str, float] = {}
    for name, leaf in trees.flatten({**program.frozen, **program.state.params}).items():
        if len(leaf.shape) == 3:
            key = "/".join(name.split("/")[:2])
            stacks[key] = stacks.get(key, 0.0) + math.prod(leaf.shape[1:]) * 2 / sizes.tensor
    return 2 * max(stacks.values(), default=0.0)
