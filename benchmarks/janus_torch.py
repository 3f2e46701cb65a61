"""The PyTorch side of `benchmarks.janus_step`: transformers and peft, with the losses as T2I-R1 writes them.

Captions and drawings are sampled by `generate` of transformers with its own cache. Log-probabilities come from one
forward pass over prompts and tokens, those of the reference with the adapter off. Prompts are padded on the left, as
transformers' own generation needs them.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import JanusForConditionalGeneration

from benchmarks.janus_settings import Settings, Words


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask `[n, t]`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def at_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens `[n, t]` under logits `[n, t, v]`, in float32."""
    return log_softmax(logits.float(), dim=-1).gather(-1, tokens[..., None])[..., 0]


def normalised(rewards: Tensor) -> Tensor:
    """Rewards `[n, g]` centred on their row, over its standard deviation."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


class TorchSide:
    """One step of the method, in pieces.

    Args:
      folder: of the model and of `llm_lora`.
      settings: of the step.
      words: ids of prompts.
      pixels: of the images, `[B, S, S, 3]` in [-1, 1].
    """

    def __init__(self, folder: pathlib.Path, settings: Settings, words: Words, pixels: np.ndarray):
        base = JanusForConditionalGeneration.from_pretrained(folder)
        base.generation_config.generation_kwargs = {"boi_token_id": words.begin}
        self.model = PeftModel.from_pretrained(base, folder / "llm_lora", is_trainable=True).eval()
        self.base, self.settings, self.words = base, settings, words
        self.originals = torch.tensor(pixels)
        self.seen = self.originals.permute(0, 3, 1, 2).contiguous()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.learning_rate, weight_decay=0.0)

    def captions(self, greedy: bool = False) -> Tensor:
        """Captions `[B * G, T]` of the images, padded after their end."""
        settings, ids = self.settings, torch.tensor([self.words.question] * self.settings.images)
        count = 1 if greedy else settings.group
        with torch.no_grad():
            said = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=self.seen,
                max_new_tokens=settings.tokens,
                do_sample=not greedy,
                top_k=0,
                num_return_sequences=count,
            )[:, ids.shape[1] :]
        return torch.nn.functional.pad(said, (0, settings.tokens - said.shape[1]), value=self.words.pad)

    def mask(self, captions: Tensor) -> Tensor:
        """True up to and including the end of each caption."""
        ended = (captions == self.words.end).long().cumsum(1)
        return (ended == 0) | ((captions == self.words.end) & (ended == 1))

    def drawing_prompts(self, captions: Tensor) -> list[list[int]]:
        """The prompts for drawings of captions, without their end."""
        kept = [row[mask].tolist() for row, mask in zip(captions, self.mask(captions))]
        return [
            [*self.words.before, *(token for token in row if token != self.words.end), *self.words.after]
            for row in kept
        ]

    def drawings(self, captions: Tensor, greedy: bool = False) -> Tensor:
        """Image tokens `[n * K, C]` of captions, those of a caption together."""
        count = 1 if greedy else self.settings.drawings
        prompts = [prompt for prompt in self.drawing_prompts(captions) for _ in range(count)]
        ids, mask = left_padded(prompts, self.words.pad)
        with torch.no_grad():
            return self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_mode="image",
                guidance_scale=self.settings.guidance,
                do_sample=not greedy,
                top_k=0,
            )

    def rewards(self, tokens: Tensor) -> Tensor:
        """Pixel similarities `[B, G, K]` of drawings and originals."""
        with torch.no_grad():
            drawn = self.base.decode_image_tokens(tokens).clamp(-1, 1)
        drawn = drawn.reshape(self.settings.images, -1, *drawn.shape[1:])
        gap = (drawn - self.originals[:, None]).abs().mean((-3, -2, -1))
        return (1 - gap / 2).reshape(self.settings.images, self.settings.group, -1)

    def score_captions(self, captions: Tensor) -> Tensor:
        """Log-probabilities `[B * G, T]` of captions."""
        count = len(captions) // self.settings.images
        prompt = torch.tensor([self.words.question] * len(captions))
        embed, features = self.base.get_input_embeddings(), self.base.model.get_image_features(self.seen).pooler_output
        # embedded here: a caption of random weights may hold the id of an image token, which stands for no image
        places = (prompt == self.base.config.image_token_id)[..., None]
        asked = embed(prompt).masked_scatter(places, features.repeat_interleave(count, 0))
        logits = self.model(
            inputs_embeds=torch.cat([asked, embed(captions)], dim=1),
            attention_mask=torch.cat([torch.ones_like(prompt), self.mask(captions).long()], dim=1),
        ).logits
        return at_tokens(logits[:, prompt.shape[1] - 1 : -1], captions)

    def score_drawings(self, captions: Tensor, tokens: Tensor) -> Tensor:
        """Guided log-probabilities `[n * K, C]` of image tokens."""
        prompts = self.drawing_prompts(captions)
        prompts = [prompt for prompt in prompts for _ in range(len(tokens) // len(prompts))]
        without = [[prompt[0], *[self.words.pad] * (len(prompt) - 2), prompt[-1]] for prompt in prompts]
        ids, mask = left_padded([*prompts, *without], self.words.pad)
        given = self.base.prepare_embeddings_for_image_generation(tokens.repeat(2, 1))
        embeds = torch.cat([self.base.get_input_embeddings()(ids), given], dim=1)
        mask = torch.cat([mask, torch.ones(len(mask), tokens.shape[1], dtype=mask.dtype)], dim=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        states = self.base.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=places
        ).last_hidden_state
        conditional, free = self.base.model.generation_head(states[:, ids.shape[1] - 1 : -1]).chunk(2)
        return at_tokens(free + self.settings.guidance * (conditional - free), tokens)

    def reference(self, captions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of both streams with the adapter off."""
        with torch.no_grad(), self.model.disable_adapter():
            return self.score_captions(captions), self.score_drawings(captions, tokens)

    def loss(self, captions: Tensor, tokens: Tensor, rewards: Tensor, reference: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The losses of the captions and of the drawings; old log-probabilities are those of now."""
        settings, mask = self.settings, self.mask(captions)
        of_captions = normalised(rewards.mean(-1)).reshape(-1)
        of_drawings = normalised(rewards.reshape(-1, settings.drawings)).reshape(-1)
        found = []
        for now, before, advantage, kept in (
            (self.score_captions(captions), reference[0], of_captions, mask),
            (self.score_drawings(captions, tokens), reference[1], of_drawings, torch.ones_like(tokens, dtype=bool)),
        ):
            gap = before - now
            each = -advantage[:, None] * (now - now.detach()).exp() + settings.kl_weight * (gap.exp() - gap - 1)
            found.append(((each * kept).sum(1) / kept.sum(1)).mean())
        return found

    def update(self, captions: Tensor, tokens: Tensor, rewards: Tensor, reference: tuple[Tensor, Tensor]) -> None:
        """One update of the adapter."""
        self.optimizer.zero_grad()
        sum(self.loss(captions, tokens, rewards, reference)).backward()
        self.optimizer.step()

    def step(self) -> None:
        """The whole step."""
        captions = self.captions()
        tokens = self.drawings(captions)
        self.update(captions, tokens, self.rewards(tokens), self.reference(captions, tokens))

    def phases(self) -> dict[str, Callable[[], object]]:
        """The pieces of the step, each on given inputs."""
        captions = self.captions()
        tokens = self.drawings(captions)
        rewards, reference = self.rewards(tokens), self.reference(captions, tokens)
        return {
            "captions": self.captions,
            "drawings": lambda: self.drawings(captions),
            "reward": lambda: self.rewards(tokens),
            "reference": lambda: self.reference(captions, tokens),
            "update": lambda: self.update(captions, tokens, rewards, reference),
        }

    def gradients(self, captions: Tensor, tokens: Tensor, rewards: Tensor) -> dict[str, float]:
        """Loss and gradient norm of each stream, of a given rollout."""
        found, reference = {}, self.reference(captions, tokens)
        for index, name in enumerate(("caption", "image")):
            self.optimizer.zero_grad()
            loss = self.loss(captions, tokens, rewards, reference)[index]
            loss.backward()
            squares = sum(float(parameter.grad.square().sum()) for parameter in self.trained)
            found |= {f"{name}_loss": float(loss), f"{name}_grad_norm": squares**0.5}
        return found
