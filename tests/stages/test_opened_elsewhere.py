"""A model that was trained here, opened by the PyTorch libraries: they compute the same logits, velocities and
pictures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from stage_pieces import exported, largest_gap, stage_of
from transformers import AutoTokenizer, CLIPModel, Dinov2Model, Qwen2_5_VLForConditionalGeneration

from uae_jax import convert
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.models import uae
from uae_jax.models.language import model as lm
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.sd3 import vae
from uae_jax.stages.export import export_system
from uae_jax.stages.weights import ModelConfig, load_system

pytestmark = pytest.mark.slow

SIDE = 16


@pytest.fixture(scope="module")
def trained(whole, tmp_path_factory):
    """Projector, transformer and both adapters after two train steps of their stages; the model read back, and its
    workdir.
    """
    workdir, parts = tmp_path_factory.mktemp("runs"), dict(whole.parts)
    for name in ("pretrain", "gen_for_und", "und_for_gen"):
        stage = stage_of(whole, name, batch_size=2)
        state = stage.state(jax.tree.map(jnp.copy, stage.trained))  # the step takes its state over
        step = stage.step(state)
        for _ in range(2):
            state, _ = step(state, stage.frozen, stage.batch, stage.key)
        parts |= state.params
    export_system(whole.system, parts, workdir / "export")
    return load_system(ModelConfig(folder=str(workdir)), image_size=SIDE), workdir


@pytest.fixture(scope="module")
def hub(trained, tmp_path_factory):
    """The export for the PyTorch libraries, in files of at most 20 kB."""
    return exported(trained[1], tmp_path_factory.mktemp("converted") / "hub")


@pytest.fixture(scope="module")
def row(whole):
    return {name: jnp.asarray(value)[None] for name, value in whole.rows(0, whole.source[0]).items()}


def stored(folder) -> dict[str, np.ndarray]:
    """All tensors of a part."""
    tensors = TensorFolder(folder)
    return {name: np.array(tensors.read(name)) for name in tensors.names()}


def our_logits(system, row, *, policy):
    params, adapter = uae.captioner_weights(system.parts, policy=policy)
    prefix = qwen.prompt_prefix(system.model.captioner, params, adapter, row)
    return lm.logits(system.model.captioner, params, prefix.last_hidden)[0]


def their_logits(llm, row):
    patches, ids = int((row["patch_images"] >= 0).sum()), row["prompt_ids"][0][row["prompt_mask"][0]]
    ids = torch.tensor(np.array(ids), dtype=torch.int64)[None]
    rows, columns = (int(row["patch_positions"][0, :patches, axis].max()) + 1 for axis in (0, 1))
    with torch.no_grad():
        return (
            llm.float()
            .eval()(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.tensor(np.array(row["patches"][0, :patches])),
                image_grid_thw=torch.tensor([[1, rows, columns]]),
                mm_token_type_ids=(ids == llm.config.image_token_id).int(),
            )
            .logits[0, -1]
        )


@pytest.mark.slow
def test_transformers_and_peft_compute_the_trained_captioner(trained, hub, row):
    system, _ = trained
    llm = Qwen2_5_VLForConditionalGeneration.from_pretrained(hub / "llm")
    assert largest_gap(our_logits(system, row, policy=False), their_logits(llm, row)) < 1e-4
    adapted = PeftModel.from_pretrained(llm, hub / "llm_lora")
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) == len(stored(hub / "llm_lora")) and not any("visual" in name for name in names)
    on = their_logits(adapted, row)
    assert largest_gap(our_logits(system, row, policy=True), on) < 1e-4
    assert largest_gap(our_logits(system, row, policy=False), on) > 1e-3  # two steps are seen
    assert AutoTokenizer.from_pretrained(hub / "llm").chat_template


def test_the_projector_stands_beside(trained, hub, model_folder):
    system, _ = trained
    tensors, states = stored(hub / "projector"), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    first, second = (
        (torch.tensor(tensors[f"projector.{n}.weight"]), torch.tensor(tensors[f"projector.{n}.bias"])) for n in (0, 2)
    )
    theirs = torch.nn.functional.linear(torch.nn.functional.gelu(torch.nn.functional.linear(states, *first)), *second)
    assert largest_gap(qwen.project(system.parts["projector"], jnp.asarray(states.numpy())), theirs.numpy()) < 1e-5
    assert (tensors["projector.0.weight"] != stored(model_folder / "llm")["projector.0.weight"]).any()


def velocities(system, *, policy):
    shape, rng = system.model.latent_shape, np.random.default_rng(0)
    latents, context = (
        rng.standard_normal((2, *shape)),
        rng.standard_normal((2, 5, system.model.transformer.joint_attention_dim)),
    )
    latents, context = latents.astype(np.float32), context.astype(np.float32)
    sigma = np.array([0.9, 0.3], np.float32)
    ours = uae.velocity(
        system.model, system.parts, latents, jnp.asarray(sigma), (context, np.ones((2, 5), bool)), policy=policy
    )
    inputs = dict(
        hidden_states=torch.tensor(latents).permute(0, 3, 1, 2),
        timestep=torch.tensor(1000 * sigma),
        encoder_hidden_states=torch.tensor(context),
        pooled_projections=torch.tensor(np.asarray(system.parts["pooled"])).expand(2, -1),
    )
    return ours, inputs


def test_diffusers_and_peft_compute_the_trained_transformer(trained, hub):
    system, _ = trained
    model = SD3Transformer2DModel.from_pretrained(hub / "SD3" / "transformer").eval()
    for policy in (False, True):
        if policy:
            model = PeftModel.from_pretrained(model, hub / "dit_lora").eval()
        ours, inputs = velocities(system, policy=policy)
        with torch.no_grad():
            theirs = model(**inputs, return_dict=False)[0].permute(0, 2, 3, 1).numpy()
        assert largest_gap(ours, theirs) < 1e-4
    assert largest_gap(velocities(system, policy=False)[0], theirs) > 1e-4


def test_diffusers_opens_the_pipeline_and_decodes_the_same_picture(trained, hub):
    system, _ = trained
    # the built-in model has no tokenizers of CLIP and no T5; diffusers wants to be told
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        hub / "SD3", **dict.fromkeys(("text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"))
    )
    assert (
        isinstance(pipeline.vae, AutoencoderKL)
        and pipeline.text_encoder_2 is not None
        and pipeline.transformer.config.num_layers == 2
    )
    latents = np.random.default_rng(0).standard_normal((1, *system.model.latent_shape)).astype(np.float32)
    ours = vae.decode(system.model.vae, system.parts["vae"], jnp.asarray(latents))
    with torch.no_grad():
        theirs = pipeline.vae.decode(torch.tensor(latents).permute(0, 3, 1, 2), return_dict=False)[0]
    assert largest_gap(ours, theirs.permute(0, 2, 3, 1).numpy()) < 1e-4
    assert CLIPModel.from_pretrained(hub / "clip") and Dinov2Model.from_pretrained(hub / "dinov2")


def test_merged_adapters_equal_adapters_beside(trained, row, tmp_path):
    system, workdir = trained
    convert.main(["export", str(workdir), str(tmp_path / "merged"), "--merge-adapters"])
    merged = load_system(ModelConfig(folder=str(tmp_path / "merged")), image_size=SIDE)
    assert "language_lora" not in merged.parts and "transformer_lora" not in merged.parts
    assert largest_gap(our_logits(merged, row, policy=False), our_logits(system, row, policy=True)) < 1e-4
    assert largest_gap(velocities(merged, policy=False)[0], velocities(system, policy=True)[0]) < 1e-4
