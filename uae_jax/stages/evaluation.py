"""Held-out scores: captions of held-out images, reconstructions from these captions, and scores of both."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from PIL import Image

from uae_jax import trees
from uae_jax.data.loader import RowBuilder, from_signed, to_signed
from uae_jax.data.scene_checker import caption_score, picture_scores, read_pictures
from uae_jax.data.scene_prompts import check_scene, scene_prompts
from uae_jax.data.scenes import Scene, fact_kinds
from uae_jax.data.sources import Example
from uae_jax.files.json_files import write_json
from uae_jax.files.paths import local_to_write
from uae_jax.models import condition, uae
from uae_jax.models.language.generate import Completion
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn.cpu.compiler import compiler_options
from uae_jax.nn.images import signed
from uae_jax.rewards.similarity import cosine_reward
from uae_jax.rollouts import unified
from uae_jax.rollouts.captioning import repeated_sequences, sample_captions
from uae_jax.rollouts.reconstruction import Denoising, caption_states, draw, draw_from, sample_keys
from uae_jax.settings import Settings, as_dict, setting
from uae_jax.stages.batching import in_batches
from uae_jax.training.summary import intervals

SAMPLE_SIDE = 128  # small images are enlarged to this side in pixels


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Settings of the held-out scores."""

    images: int = setting(100, "images scored before and after each stage", low=1)
    images_during: int = setting(32, "images, the first ones, scored every loop.eval_every steps", low=1)
    batch_size: int = setting(4, "images in one compiled call", low=1)
    sampler_steps: int = setting(40, "denoising steps", low=1, source="released UAE demo")
    guidance_scale: float = setting(5.0, "1 is without guidance", low=0, source="released UAE demo")
    also_guidance_scale: float = setting(
        0.0, "reconstructions are scored at this scale too, before and after a stage; 0 for none", low=0
    )
    temperature: float = setting(0.0, "of the captions; 0 is greedy", low=0)
    encoders: tuple[str, ...] = setting(("clip",), "image encoders whose mean cosine is unified_score")
    heldout_encoder: str = setting("dinov2", "an encoder that is never a reward; empty for none")
    geneval_per_tag: int = setting(
        0, "prompts of each tag, on the built-in scenes, of texts that no training caption has; 0 for none", low=0
    )
    samples: int = setting(8, "images written as samples", low=0)
    questions: str = setting(
        "", "TSV of questions in VLMEvalKit's layout, or 'builtin' for questions about scenes; empty for none"
    )
    questions_during: int = setting(
        240, "questions answered before, after and every loop.eval_every steps of RL, in turn from each category", low=1
    )
    questions_by: str = setting(
        "letter", "whether options compete by letter, or Yes and No, or by their texts", choices=("letter", "text")
    )

    def scoring(self) -> dict[str, Any]:
        """The settings that change the scores before and after a stage, as JSON has them."""
        apart = ("images_during", "batch_size", "samples")
        kept = {name: value for name, value in as_dict(self).items() if name not in apart}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


class Evaluator(abc.ABC):
    """Scores a model's parameters on fixed held-out images; compiled once for all stages of a run.

    A kind of model says how it writes captions (`write`) and draws them (`picture`).

    Args:
      system: the model; `encoders` are its image encoders by name.
      config: settings.
      drawing: settings of image generation, with a `guidance_scale`.
      examples: held-out images.
      rows: turns examples into inputs.
      max_new_tokens: longest caption.
      seed: of noise and captions.
      mesh: over which batches are sharded; None for one device.
      gather_weights: gather a sharded language model once a batch instead of once a token.
    """

    # whether the captioner reads the images as they are, and not patches of them
    sees_pixels: ClassVar[bool] = False

    def __init__(
        self,
        system: Any,
        config: EvaluationConfig,
        drawing: Any,
        examples: Sequence[Example],
        rows: RowBuilder,
        max_new_tokens: int,
        seed: int,
        mesh: Mesh | None = None,
        gather_weights: bool = False,
    ):
        self.system, self.config, self.examples, self.rows = system, config, list(examples), rows
        self.drawing, self.key, self.width, self.mesh = drawing, jax.random.key(seed), max_new_tokens, mesh
        self.gather_weights, self.sampling = gather_weights, SamplingConfig(config.temperature)
        names = {name for name in (*config.encoders, config.heldout_encoder) if name in system.encoders}
        self.encoders = {name: system.encoders[name] for name in sorted(names)}

        def write(parts: Mapping, batch: Mapping) -> dict[str, Array]:
            said = self.write(parts, batch)
            repeats, sequences = repeated_sequences(said.tokens, said.mask)
            return {
                "tokens": said.tokens,
                "mask": said.mask,
                "lengths": condition.caption_lengths(said.mask, said.finished),
                "truncated": 1.0 - said.finished,
                "repetition": repeats / jnp.maximum(sequences, 1),
            }

        self.advance: Callable[[int], Any] = lambda rows: None  # called with the rows of each batch that is done
        self.options = compiler_options(self.dtype)
        self._write, self._compare = jax.jit(write, compiler_options=self.options), jax.jit(self.compare)
        self._picture = jax.jit(
            lambda how, *inputs: jnp.clip(self.picture(how, *inputs), -1, 1),
            static_argnums=0,
            compiler_options=self.options,
        )

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """Precision of the language model's activations."""

    @abc.abstractmethod
    def write(self, parts: Mapping, batch: Mapping) -> Completion:
        """A caption of each image of a batch."""

    @abc.abstractmethod
    def picture(self, how: Any, parts: Mapping, tokens: Array, lengths: Array, sample_ids: Array) -> Array:
        """Images of captions, drawn as `how` says; the sample numbers decide the random numbers."""

    def rebuild(self, how: Any, parts: Mapping, batch: Mapping, said: Mapping) -> Array:
        """Reconstructions of a batch from its captions: `tokens`, `mask` and `lengths` of `said`."""
        return self.picture(how, parts, said["tokens"], said["lengths"], batch["sample_id"])

    def compare(self, params: Mapping, original: Array, drawn: Array) -> dict[str, Array]:
        """Cosines `[n]` between images `[n, H, W, 3]` in [-1, 1], by encoder, whose parameters are given by name."""
        return {
            name: cosine_reward(encoder, params[name], original, drawn, 1)[:, 0]
            for name, encoder in self.encoders.items()
        }

    def draw_texts(self, parts: Mapping, texts: Sequence[str]) -> np.ndarray:
        """Images generated from texts (long ones truncated), uint8 `[n, H, W, 3]`; text i has the noise of image i."""
        said = self._tokenised(texts)
        numbers = np.arange(len(texts), dtype=np.int32)
        return from_signed(self._generated(parts, said["tokens"], said["lengths"], numbers))

    def _tokenised(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Tokens `[n, T]` and lengths `[n]` of texts, as the tokenizer makes them; long ones are truncated."""
        rows = [self.rows.caption_fields(text) for text in texts]
        tokens, mask = (np.stack([row[name] for row in rows]) for name in ("caption_ids", "caption_mask"))
        return {"tokens": tokens, "lengths": mask.sum(-1, dtype=np.int32) - 1}

    def _generated(self, parts: Mapping, *inputs: np.ndarray) -> np.ndarray:
        """Images `[n, H, W, 3]` in [-1, 1] from tokens `[n, T]`, lengths `[n]` and sample numbers `[n]`."""
        return self._batches(lambda *batch: self._picture(self.drawing, parts, *batch), *inputs)

    def rebuilt(self, how: Any, parts: Mapping, batch: Mapping, said: Mapping) -> np.ndarray:
        """Reconstructions `[n, H, W, 3]` in [-1, 1] of images from the texts of their captions."""
        inputs = said["tokens"], said["lengths"], batch["sample_id"]
        return self._batches(functools.partial(self._picture, how, parts), *inputs)

    def _cosines(self, parts: Mapping, originals: np.ndarray, generated: np.ndarray) -> dict[str, np.ndarray]:
        """Cosines `[n]` between images `[n, H, W, 3]` in [-1, 1], by encoder."""
        return self._batches(lambda *batch: self._compare(parts["encoders"], *batch), originals, generated)

    def _batches(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Applies a program of one batch to any number of rows, see `in_batches`."""
        return in_batches(function, self.config.batch_size, *inputs, mesh=self.mesh, done=self.advance)

    def rows_of(self, complete: bool) -> int:
        """Rows of all batches of one pass of scores, for a bar over them; `complete` as in `_loop`."""
        count = len(self.examples) if complete else min(self.config.images_during, len(self.examples))
        if not complete:
            return 3 * count
        passes = 3 + 2 * bool(self.config.also_guidance_scale) + 2 * all(example.caption for example in self.examples)
        return passes * count + len(self._prompts())

    def __call__(self, parts: Mapping, folder: pathlib.Path | None = None) -> dict[str, dict]:
        """Held-out scores with 95 % intervals: {score: {"value", "n", "low", "high"}}.

        Args:
          parts: parameters.
          folder: for sample images and `samples.json`, or None.
        """
        scores = self._loop(parts, self.examples, folder, complete=True)
        return intervals(scores | self._with_true_captions(parts) | self._geneval(parts))

    def during(self, parts: Mapping, folder: pathlib.Path | None = None) -> dict[str, float]:
        """Mean scores of the first `images_during` images, by the same compiled programs.

        The scores of the decoder on texts that no captioner wrote are left out.
        """
        scores = self._loop(parts, self.examples[: self.config.images_during], folder)
        return {name: float(np.mean(values)) for name, values in scores.items()}

    def _loop(
        self, parts: Mapping, examples: Sequence[Example], folder: pathlib.Path | None, *, complete: bool = False
    ) -> dict[str, np.ndarray]:
        """Scores `[n]` of captions and reconstructions; complete ones also at `also_guidance_scale`."""
        fields = [self.rows.image_fields(example.image) for example in examples]
        batch = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
        originals = to_signed(batch["pixels"])
        batch = {name: leaf for name, leaf in batch.items() if name != "pixels" or self.sees_pixels}
        batch["sample_id"] = np.arange(len(fields), dtype=np.int32)
        said = self._batches(lambda rows: self._write(parts, rows), batch)
        captions = [self.rows.decode(row[:n]) for row, n in zip(said["tokens"], said["lengths"])]
        words = {
            "caption_tokens": said["lengths"].astype(np.float64),
            "truncated": said["truncated"],
            "repetition": said["repetition"],
        }
        if self.system.model.own_encoder:
            words["other_ids"] = other_ids(self.system.tokenizer, said["tokens"], said["lengths"])
            said = said | self._tokenised(captions)
        drawn = self.rebuilt(self.drawing, parts, batch, said)
        cosines = self._cosines(parts, originals, drawn)
        facts = self._facts(examples, captions, drawn)
        if folder is not None and jax.process_index() == 0:
            write_samples(folder, originals, captions, drawn, cosines | facts, self.config.samples)
        scores = self._similarity(cosines) | words | facts
        other = self.config.also_guidance_scale
        if not (complete and other):
            return scores
        how = dataclasses.replace(self.drawing, guidance_scale=other)
        again = self._similarity(self._cosines(parts, originals, self.rebuilt(how, parts, batch, said)))
        return scores | {f"{name}_guidance_{other:g}": values for name, values in again.items()}

    def _similarity(self, cosines: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        chosen = [cosines[name] for name in self.config.encoders if name in cosines]
        scores = {"reward": chosen[0], "unified_score": np.mean(list(cosines.values()), axis=0)}
        if self.config.heldout_encoder in cosines:
            scores["heldout_score"] = cosines[self.config.heldout_encoder]
        return scores

    @staticmethod
    def _facts(examples: Sequence[Example], captions: Sequence[str], drawn: np.ndarray) -> dict[str, np.ndarray]:
        scenes = known_scenes(examples)
        if not scenes:
            return {}
        said = [caption_score(scene, text) for scene, text in zip(scenes, captions)]
        kinds = {
            f"fact_recall_{kind}": np.array([score.recall_by_kind[kind] for score in said])
            for kind in fact_kinds(scenes[0])
        }
        return {
            "fact_recall": np.array([score.fact_recall for score in said]),
            "fact_precision": np.array([score.fact_precision for score in said]),
            "scene_accuracy": picture_scores(scenes, from_signed(drawn)),
        } | kinds

    def _with_true_captions(self, parts: Mapping) -> dict[str, np.ndarray]:
        """Scores `[n]` of the decoder alone, on the captions of the data set; none where an image has no caption."""
        captions = [example.caption for example in self.examples if example.caption]
        if len(captions) < len(self.examples):
            return {}
        pixels = np.stack([self.rows.image_fields(example.image)["pixels"] for example in self.examples])
        originals = to_signed(pixels)
        drawn = self.draw_texts(parts, captions)
        scores = {"true_caption_reward": self._cosines(parts, originals, to_signed(drawn))[self.config.encoders[0]]}
        scenes = known_scenes(self.examples)
        return scores | {"true_caption_scene_accuracy": picture_scores(scenes, drawn)} if scenes else scores

    def _prompts(self) -> Sequence[Mapping[str, Any]]:
        """The compositional prompts; none but for built-in scenes, whose shapes they ask for."""
        wanted = self.config.geneval_per_tag and type(self.examples[0].scene) is Scene
        return scene_prompts(self.config.geneval_per_tag) if wanted else ()

    def _geneval(self, parts: Mapping) -> dict[str, np.ndarray]:
        prompts = self._prompts()
        if not prompts:
            return {}
        return prompt_scores(prompts, self.draw_texts(parts, [prompt["prompt"] for prompt in prompts]))


def prompt_scores(prompts: Sequence[Mapping[str, Any]], drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Whether images have what their prompts ask for: `geneval`, and `geneval_exact` where nothing else may be drawn.

    Both stand over all prompts `[n]` and by tag. Every tag should have the same number of prompts: the mean over
    prompts is then the benchmark's mean of the tags.

    Args:
      prompts: n of `scene_prompts`.
      drawn: their images, uint8 `[n, S, S, 3]`.
    """
    scenes, tags = read_pictures(drawn), np.array([prompt["tag"] for prompt in prompts])
    scores = {}
    for name, exact in (("geneval", False), ("geneval_exact", True)):
        found = [check_scene(prompt, scene, exact=exact) for prompt, scene in zip(prompts, scenes, strict=True)]
        right = np.array(found, np.float64)
        scores |= {name: right} | {f"{name}_{tag}": right[tags == tag] for tag in dict.fromkeys(tags)}
    return scores


def other_ids(tokenizer: Any, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """1 for each caption whose ids are not those that the tokenizer makes of its text, else 0; `[n]`.

    A decoder that reads captions by their ids draws such a caption in training otherwise than its text.

    Args:
      tokenizer: of the captioner.
      tokens: `[n, T]`.
      lengths: `[n]`, without the stop token.
    """
    found = []
    for row, length in zip(tokens, lengths):
        ids = [int(index) for index in row[:length]]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        found.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]) != ids)
    return np.array(found, np.float64)


class DecoderEvaluator(Evaluator):
    """The scores of a captioner with a diffusion decoder; `drawing` is a `reconstruction.Denoising`."""

    @property
    def dtype(self) -> str:
        """Of the captioner."""
        return self.system.model.captioner.text.dtype

    def write(self, parts: Mapping, batch: Mapping) -> Completion:
        """A caption of each image of a batch."""
        return sample_captions(
            self.system.model,
            parts,
            batch,
            self.key,
            max_new_tokens=self.width,
            stops=self.system.stops,
            sampling=self.sampling,
            gather_weights=self.gather_weights,
        )

    def picture(self, how: Denoising, parts: Mapping, tokens: Array, lengths: Array, sample_ids: Array) -> Array:
        """Images of captions; text i has the noise of image i."""
        return draw(self.system.model, parts, how, tokens, lengths, self._noise(sample_ids))

    def rebuilt(self, how: Denoising, parts: Mapping, batch: Mapping, said: Mapping) -> np.ndarray:
        """Reconstructions of images from their captions, as the condition says."""
        if how.condition != "caption_states":
            return super().rebuilt(how, parts, batch, said)
        said = {name: said[name] for name in ("tokens", "mask")}
        return self._batches(functools.partial(self._rebuild, how, parts), batch, said)

    def rebuild(self, how: Denoising, parts: Mapping, batch: Mapping, said: Mapping) -> Array:
        """Reconstructions of a batch, as the condition says."""
        if how.condition != "caption_states":
            return super().rebuild(how, parts, batch, said)
        contexts = caption_states(self.system.model, parts, how, batch, said["tokens"], said["mask"])
        return draw_from(self.system.model, parts, how, contexts, self._noise(batch["sample_id"]))

    @functools.cached_property
    def _rebuild(self) -> Callable[..., Array]:
        clipped = lambda how, *inputs: jnp.clip(self.rebuild(how, *inputs), -1, 1)  # noqa: E731
        return jax.jit(clipped, static_argnums=0, compiler_options=self.options)

    def _noise(self, sample_ids: Array) -> Array:
        return uae.initial_noise(self.system.model, sample_keys(trees.name_key(self.key, "noise"), sample_ids))


class UnifiedEvaluator(Evaluator):
    """The scores of one network that captions and draws; `drawing` is a `unified.DrawingConfig`."""

    sees_pixels = True

    @property
    def dtype(self) -> str:
        """Of the network."""
        return self.system.model.network.text.dtype

    def write(self, parts: Mapping, batch: Mapping) -> Completion:
        """A caption of each image of a batch, of pixels as bytes."""
        return unified.sample_captions(
            self.system.model.network,
            parts,
            {**batch, "pixels": signed(batch["pixels"])},
            self.key,
            max_new_tokens=self.width,
            sampling=self.sampling,
            gather_weights=self.gather_weights,
        )

    def picture(
        self, how: unified.DrawingConfig, parts: Mapping, tokens: Array, lengths: Array, sample_ids: Array
    ) -> Array:
        """Images of captions; text i has the random numbers of image i."""
        model = self.system.model
        ids, mask = model.drawing_prompts(tokens, lengths)
        drawn = unified.sample_drawings(
            model.network, parts, how, ids, mask, sample_ids, self.key, gather_weights=self.gather_weights
        )
        return unified.pixels(model.network, parts, how, drawn.tokens)


def known_scenes(examples: Sequence[Example]) -> list[Scene]:
    """The scenes of all examples; empty if an example has none."""
    scenes = [example.scene for example in examples if example.scene is not None]
    return scenes if len(scenes) == len(examples) else []


def picture_png(pixels: np.ndarray, path: pathlib.Path) -> None:
    """Writes one image, uint8 `[H, W, 3]`; a small image is enlarged by nearest neighbours."""
    image = Image.fromarray(pixels)
    scale = max(1, -(-SAMPLE_SIDE // min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    with local_to_write(path) as file:
        image.save(file)


def write_samples(
    folder: pathlib.Path,
    originals: np.ndarray,
    captions: Sequence[str],
    drawn: np.ndarray,
    scores: Mapping[str, np.ndarray],
    count: int,
) -> None:
    """Writes originals and reconstructions (`[n, H, W, 3]` in [-1, 1]) as PNG, and captions and scores as
    `samples.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index in range(min(count, len(captions))):
        names = f"{index:03d}_original.png", f"{index:03d}_reconstruction.png"
        for name, picture in zip(names, (originals[index], drawn[index])):
            picture_png(from_signed(picture), folder / name)
        own = {name: round(float(values[index]), 4) for name, values in scores.items()}
        listed.append({"original": names[0], "caption": captions[index], "reconstruction": names[1], "scores": own})
    write_json(folder / "samples.json", listed, indent=1)
