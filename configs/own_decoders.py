"""Presets with decoders that bring their own text encoder, such as `qwen2_5_vl_3b_klein_4b@1x24GB`.

The captioner learns in `gen_for_und` from a frozen decoder, without any stage before. A decoder that is not distilled
then learns by an adapter in `und_for_gen`. A decoder is one entry of `DECODERS`: how it draws, and what each machine
changes.
"""

from typing import Any, NamedTuple

Deviations = dict[str, Any]


class OwnDecoder(NamedTuple):
    """How a decoder draws, and where.

    Attributes:
      captioners: that it is made for.
      rollout: steps and guidance of a rollout.
      scores: those of held-out scores.
      learns: settings of `und_for_gen`; distilled weights are not trained by rewards (flow_grpo issue 192).
      machines: what changes with the machine; a decoder learns where a machine has a section `und_for_gen`.
      too_large: `CAPTIONER@MACHINE` that are more than the machine holds.
    """

    captioners: tuple[str, ...]
    rollout: Deviations
    scores: Deviations
    machines: dict[str, Deviations]
    too_large: tuple[str, ...] = ()
    learns: Deviations = {}


BOTH = ("qwen2_5_vl_3b", "qwen2_5_vl_7b")
SEVEN = ("qwen2_5_vl_7b",)


def _slice(chips: int, chunk: int, *, learns: bool = False) -> Deviations:
    """A TPU slice of so many chips, four of which share the captioner while it samples."""
    sampled = dict(rollout_ways=4) | ({} if chunk == 64 else dict(vae_chunk=chunk))
    drawn = dict(und_for_gen=dict(batch_size=64, micro_batches=8, vae_chunk=chunk, rollout_ways=4, gather_weights=True))
    return dict(mesh=dict(fsdp=chips), gen_for_und=sampled) | (drawn if learns else {})


def _card(parts: int, micro: int, chunk: int, **more: Any) -> Deviations:
    """One card: the batch of many, in parts, but for the captions, which all come from one loop."""
    sampled = dict(rollout_parts=parts, micro_batches=micro, vae_chunk=chunk, rollout_slots=512 // min(parts, 16))
    return dict(mesh=dict(fsdp=1), gen_for_und=sampled | more)


# 8 cards of 80 or 141 GB
EIGHT = dict(mesh=dict(fsdp=8), gen_for_und=dict(micro_batches=4, vae_chunk=32))
# distilled to four steps without guidance
KLEIN = OwnDecoder(
    captioners=BOTH,
    rollout=dict(sampler_steps=4, guidance_scale=1.0),
    scores=dict(sampler_steps=4, guidance_scale=1.0),
    machines={
        # the decoder and its text encoder in 8 bits, and no copy of the language model for sampling
        "1x24GB": _card(64, 64, 1, gather_weights=False, score_chunk=32) | dict(model=dict(decoder_weights="int8")),
        "1x48GB": _card(16, 64, 4, gather_weights=False),
        "1x80GB": _card(4, 16, 8),
        "8xH200": EIGHT,
        "v5e-8": dict(
            mesh=dict(fsdp=8), gen_for_und=dict(rollout_parts=2, micro_batches=8, vae_chunk=8, rollout_ways=4)
        ),
        "v5e-64": _slice(64, 64),
    },
    too_large=("qwen2_5_vl_7b@1x24GB",),
)
# distilled to eight steps without guidance
Z_IMAGE_TURBO = OwnDecoder(
    captioners=BOTH,
    rollout=dict(sampler_steps=8, guidance_scale=1.0),
    scores=dict(sampler_steps=8, guidance_scale=1.0),
    machines={
        "1x48GB": _card(16, 64, 4, gather_weights=False),
        "1x80GB": _card(8, 16, 8),
        "8xH200": EIGHT,
        "v5e-64": _slice(64, 64),
        "v6e-64": _slice(64, 128),
    },
    too_large=("qwen2_5_vl_7b@1x48GB",),
)
# 10 steps at guidance 4 in a rollout, as flow_grpo trains it; 50 for scores, as its card says
QWEN_IMAGE = OwnDecoder(
    captioners=SEVEN,
    rollout=dict(guidance_scale=4.0),
    scores=dict(sampler_steps=50, guidance_scale=4.0),
    machines={
        "8xH200": EIGHT | dict(und_for_gen=dict(micro_batches=12, vae_chunk=16, gather_weights=True)),
        "v5e-64": _slice(64, 64, learns=True),
        "v6e-64": _slice(64, 128, learns=True),
        "v5p-64": _slice(64, 256, learns=True),
    },
    # flow_grpo's settings for this model: groups of 16, two stochastic steps in the first half, and no KL
    learns=dict(
        group_size=16,
        flow_grpo=dict(guidance_scale=4.0, noise_level=1.2, window=2, kl_weight=0.0),
    ),
)
DECODERS = {"klein_4b": KLEIN, "z_image_turbo": Z_IMAGE_TURBO, "qwen_image": QWEN_IMAGE}


def known() -> dict[str, tuple[OwnDecoder, str, str]]:
    """The presets: decoder, sizes and machine by name; the machine is empty for the preset of none."""
    return {
        f"{sizes}@{machine}" if machine else sizes: (decoder, sizes, machine)
        for name, decoder in DECODERS.items()
        for captioner in decoder.captioners
        for sizes in (f"{captioner}_{name}",)
        for machine in ("", *decoder.machines)
        if f"{captioner}@{machine}" not in decoder.too_large
    }


def stages_of(decoder: OwnDecoder, machine: str) -> tuple[str, ...]:
    """The stages that a preset of `known` runs."""
    learns = "und_for_gen" in decoder.machines.get(machine, {})
    return ("gen_for_und", "und_for_gen") if learns else ("gen_for_und",)


def too_large() -> set[str]:
    """Names of presets that there are not, because the model is more than their machine holds."""
    return {
        f"{captioner}_{name}@{machine}"
        for name, decoder in DECODERS.items()
        for captioner, _, machine in (entry.partition("@") for entry in decoder.too_large)
    }


def deviations(decoder: OwnDecoder, sizes: str) -> Deviations:
    """What a preset without a machine changes of the defaults."""
    return dict(
        model=dict(sizes=sizes, frozen_dtype="bfloat16", dtype="bfloat16", remat="full"),
        data=dict(max_prompt=192, negative_prompt=""),
        mesh=dict(data=1, fsdp=-1),
        gen_for_und=dict(vae_chunk=64, gather_weights=True) | decoder.rollout,
        und_for_gen=decoder.learns,
        evaluation=decoder.scores,
    )
