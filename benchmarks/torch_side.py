"""The PyTorch side of `benchmarks.unified_step`: GRPO as TRL writes it, Flow-GRPO as flow_grpo does."""

import functools
import math
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.step_settings import Inputs
from benchmarks.torch_model import TorchModel


def group_advantages(reward: Tensor, scale: str) -> Tensor:
    """`[B, G]`: centred on the group, over the spread of the group (GRPO) or of the batch (Flow-GRPO)."""
    spread = reward.std(1, keepdim=True) if scale == "group" else reward.std()
    return (reward - reward.mean(1, keepdim=True)) / (spread + 1e-4)


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped surrogate of each element (arXiv 1707.06347, equation 7)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


class TorchSide:
    """Calls by name, as `jax_side.JaxSide` has them.

    Args:
      folder: the checkpoint.
      inputs: of `jax_side.make_inputs`.
      stage: `gen_for_und`, `und_for_gen` or `inference`.
      compiled: see `torch_model.TorchModel`.
    """

    def __init__(self, folder: pathlib.Path, inputs: Inputs, stage: str, compiled: bool):
        self.model, self.settings, self.stage = TorchModel(folder, inputs, stage, compiled), inputs.settings, stage
        if self.model.trained:
            self.optimizer = torch.optim.AdamW(
                self.model.trained, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
            )

    def step(self) -> Callable[[], None]:
        """The stage's whole step."""
        return self._waiting({"total": self._caption_step if self.stage == "gen_for_und" else self._flow_step})["total"]

    def device_peak(self) -> int | None:
        """Bytes that the accelerator held at most; None where there is none."""
        return torch.cuda.max_memory_allocated() if self.model.device == "cuda" else None

    def _waiting(self, calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], None]]:
        """Calls that return when the device has finished."""

        def wait(call: Callable[[], object]) -> None:
            call()
            if self.model.device == "cuda":
                torch.cuda.synchronize()

        return {name: functools.partial(wait, call) for name, call in calls.items()}

    def phases(self) -> dict[str, Callable[[], None]]:
        """The pieces of the step, each on given inputs."""
        return self._waiting(self._phases())

    def _phases(self) -> dict[str, Callable[[], object]]:
        model, settings = self.model, self.settings
        decoded, scale = model.decode(model.noise), "group" if self.stage == "gen_for_und" else "batch"
        advantage = group_advantages(model.reward(decoded), scale).flatten().clone()
        shared = {
            "decoding": lambda: model.decode(model.noise),
            "reward": lambda: group_advantages(model.reward(decoded), scale),
        }
        if self.stage == "gen_for_und":
            contexts = model.condition(model.captions)
            return {
                "sampling": lambda: model.write(settings.caption_temperature, settings.group),
                "condition": lambda: model.condition(model.captions),
                "denoising": lambda: model.denoise(*contexts, model.noise),
                **shared,
                "update": lambda: self._update_captioner(model.captions, advantage),
            }
        contexts = self._repeated(model.captions[:: settings.group])
        trajectory = self._explore(*contexts)
        return {
            "sampling": lambda: model.write(settings.flow_temperature, 1),
            "condition": lambda: self._repeated(model.captions[:: settings.group]),
            "denoising": lambda: self._explore(*contexts),
            **shared,
            "update": lambda: self._update_transformer(*contexts, trajectory, advantage),
        }

    def inference(self) -> dict[str, Callable[[], None]]:
        """Captions of the pictures, and drawings of as many captions."""
        model, count = self.model, self.settings.images

        def draw() -> Tensor:
            return model.decode(model.denoise(*model.condition(model.captions[:count]), model.noise[:count]))

        return self._waiting({"captions": lambda: model.write(self.settings.flow_temperature, 1), "pictures": draw})

    def checks(self) -> dict[str, np.ndarray]:
        """What must be equal on both sides, with channels last."""
        model = self.model
        latents = model.denoise(*model.condition(model.captions), model.noise)
        return {
            "greedy_ids": model.write(0.0, 1).cpu().numpy(),
            "latents": latents.permute(0, 2, 3, 1).cpu().numpy(),
            "rewards": model.reward(model.decode(latents)).cpu().numpy(),
        }

    def _caption_step(self) -> None:
        """Captions, drawings, rewards and one update of the captioner."""
        model, settings = self.model, self.settings
        captions = model.write(settings.caption_temperature, settings.group)
        reward = model.reward(model.decode(model.denoise(*model.condition(captions), model.noise)))
        self._update_captioner(captions.clone(), group_advantages(reward, "group").flatten().clone())

    def _log_probs(self, captions: Tensor, with_entropy: bool) -> Tensor:
        """Log-probabilities `[N, T]` of captions after their prompts; the entropies that TRL logs are computed beside
        them.
        """
        prompt, group, length = self.model.prompt, self.settings.group, captions.shape[1]

        def grouped(x: Tensor, rows: int) -> Tensor:
            return x.unflatten(0, (rows, -1)).repeat_interleave(group, 0).flatten(0, 1)

        inputs = {name: grouped(value, self.settings.images) for name, value in prompt.items()}
        inputs |= dict(
            input_ids=torch.cat([inputs["input_ids"], captions], 1),
            attention_mask=inputs["input_ids"].new_ones(len(captions), inputs["input_ids"].shape[1] + length),
            mm_token_type_ids=torch.cat(
                [inputs["mm_token_type_ids"], torch.zeros_like(captions, dtype=torch.int32)], 1
            ),
        )
        logits = (
            self.model.llm(**inputs, logits_to_keep=length + 1, use_cache=False).logits[:, :-1].float()
            / self.settings.caption_temperature
        )
        if with_entropy:
            with torch.no_grad():
                self.entropy = torch.stack(
                    [torch.distributions.Categorical(logits=row, validate_args=False).entropy() for row in logits]
                )
        # TRL's selective_log_softmax: one row at a time, to keep the peak low
        return logits.gather(-1, captions[..., None])[..., 0] - torch.stack(
            [torch.logsumexp(row, -1) for row in logits]
        )

    def _update_captioner(self, captions: Tensor, advantage: Tensor) -> None:
        """GRPO with one update a rollout: the old log-probabilities are the present ones (TRL, num_iterations 1)."""
        settings = self.settings
        with torch.no_grad(), self.model.llm.model.language_model.disable_adapter():
            reference = self._log_probs(captions, False)
        log_probs = self._log_probs(captions, True)
        loss = clipped_loss(log_probs - log_probs.detach(), advantage[:, None], settings.caption_clip)
        gap = reference - log_probs
        loss = loss + settings.caption_kl * (gap.exp() - gap - 1)
        self._apply(loss.mean(1).mean())

    def _flow_step(self) -> None:
        """One caption a picture, explored drawings, rewards and one update of the transformer."""
        model = self.model
        contexts = self._repeated(model.write(self.settings.flow_temperature, 1))
        trajectory = self._explore(*contexts)
        reward = model.reward(model.decode(trajectory["final"]))
        self._update_transformer(*contexts, trajectory, group_advantages(reward, "batch").flatten().clone())

    def _repeated(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = self.model.condition(captions)
        return positive.repeat_interleave(self.settings.group, 0).clone(), negative.clone()

    def _transition(self, x: Tensor, velocity: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a stochastic step (arXiv 2505.05470, section 4.2)."""
        sigma, following, level = self.model.sigmas[index], self.model.sigmas[index + 1], self.settings.noise_level
        step = following - sigma
        remaining = 1 - (self.model.sigmas[1] if sigma >= 1 else sigma)
        drift = level**2 / (2 * remaining)
        return x + (velocity + drift * (x + (1 - sigma) * velocity)) * step, level * torch.sqrt(
            sigma * -step / remaining
        )

    @staticmethod
    def _log_density(outcome: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (-0.5 * ((outcome - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    @torch.no_grad()
    def _explore(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """A rollout: the first steps are stochastic and stored."""
        model, x, kept = self.model, self.model.noise, {"before": [], "after": [], "log_probs": []}
        for index in range(self.settings.steps):
            velocity = model.velocity(x, model.sigmas[index], positive, negative)
            if index >= self.settings.window:
                x = x + (model.sigmas[index + 1] - model.sigmas[index]) * velocity
                continue
            mean, std = self._transition(x, velocity, index)
            after = mean + std * torch.randn_like(mean)
            for name, value in zip(kept, (x, after, self._log_density(after, mean, std))):
                kept[name].append(value)
            x = after
        return {name: torch.stack(values) for name, values in kept.items()} | {"final": x}

    def _update_transformer(
        self, positive: Tensor, negative: Tensor, trajectory: dict[str, Tensor], advantage: Tensor
    ) -> None:
        """Flow-GRPO, a step of the window at a time; the log-probabilities of the rollout are the old ones."""
        model, settings = self.model, self.settings
        for index in range(settings.window):
            x, after, sigma = trajectory["before"][index], trajectory["after"][index], model.sigmas[index]
            with torch.no_grad(), model.dit.disable_adapter():
                reference, _ = self._transition(x, model.velocity(x, sigma, positive, negative), index)
            mean, std = self._transition(x, model.velocity(x, sigma, positive, negative), index)
            log_ratio = self._log_density(after, mean, std) - trajectory["log_probs"][index]
            kl = (
                ((mean - reference) ** 2).flatten(1).mean(1)
                / (2 * std**2)
                * (model.sigmas[index] - model.sigmas[index + 1])
            )
            loss = clipped_loss(log_ratio, advantage, settings.flow_clip) + settings.flow_kl * kl
            (loss.mean() / settings.window).backward()
        self._apply(None)

    def _apply(self, loss: Tensor | None) -> None:
        if loss is not None:
            loss.backward()
        clip_grad_norm_(self.model.trained, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
