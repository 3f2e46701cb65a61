"""Understanding during a run: multiple-choice and yes/no questions, answered by log-probabilities of the options.

The same questions are answered before, during and after every stage, so that a fall is that of the model. All of them
are padded to one shape.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from uae_jax.data.questions import Question, Statement, placed_images, question_inputs, read_questions
from uae_jax.data.qwen_inputs import Fields, pad_to, prompt_fields
from uae_jax.data.scene_questions import scene_questions
from uae_jax.data.sources import SceneSource, Source
from uae_jax.data.tokenizer import IMAGE_PAD, encode_caption, token_id
from uae_jax.files.paths import to_path
from uae_jax.nn.cpu.compiler import compiler_options
from uae_jax.rollouts.answering import NO_OPTION, chosen_option, option_scores
from uae_jax.stages.batching import in_batches, on_mesh, whole_batch
from uae_jax.stages.evaluation import EvaluationConfig
from uae_jax.stages.run_config import DataConfig
from uae_jax.stages.weights import System
from uae_jax.training.guard import UNDERSTANDING

BUILTIN = "builtin"
READ = ("vision", "language", "projector", "language_lora", "language_policy")  # parts of the captioner


def open_questions(config: EvaluationConfig, data: DataConfig, source: Source | None = None) -> list[Question]:
    """The questions of a run; [] for none.

    Args:
      config: says which questions, and how they are answered.
      data: of the run.
      source: of the run's training images: built-in questions are about scenes of its kind.

    Raises:
      FileNotFoundError, ValueError: the table cannot be read.
    """
    if not config.questions:
        return []
    if config.questions != BUILTIN:
        return read_questions(to_path(config.questions), config.questions_during)
    scenes = SceneSource("test", 0, data.image_size)
    if isinstance(source, SceneSource):
        scenes = dataclasses.replace(source, split="test", seed=0)
    return scene_questions(scenes, config.questions_during, spoken=config.questions_by == "text")


def open_understanding(
    config: EvaluationConfig, data: DataConfig, source: Source, system: System, mesh: Mesh | None = None
) -> "Understanding | None":
    """Reads the questions of a run; None for none. Arguments and errors are those of the two it calls."""
    questions = open_questions(config, data, source)
    if not questions:
        return None
    return Understanding(system, questions, config.questions_by, data.caption_prompt, config.batch_size, mesh)


class Understanding:
    """Answers fixed questions with a model's parameters; compiled once for all stages of a run.

    Args:
      system: the model.
      questions: at least one.
      by: "letter" compares the letters of the options, or Yes and No, at the first position of the answer; "text" the
        texts of the options, or the captions that state them (`Question.statements`).
      caption_prompt: asks for the captions that state options.
      batch_size: questions in one call.
      mesh: over which they are sharded; None for one device.

    Raises:
      ValueError: a question's images cannot be read, or the tokenizer cannot tell its options apart.
    """

    def __init__(
        self,
        system: System,
        questions: Sequence[Question],
        by: str,
        caption_prompt: str,
        batch_size: int,
        mesh: Mesh | None = None,
    ):
        self.system, self.questions, self.by, self.prompt = system, list(questions), by, caption_prompt
        self.mesh, self.size = mesh, whole_batch(min(batch_size, len(self.questions)), mesh)
        self.texts = [self._option_texts(question) for question in self.questions]
        self.options = max(len(question.options) for question in self.questions)
        self.rows = max(len(texts) for texts in self.texts)
        self.width = max(len(ids) for texts in self.texts for _, ids, _ in texts)
        # one shape for all questions, so one program; the images are read again for each batch, not kept
        sizes = [
            (len(ids), sum(len(patches) for patches, _ in seen)) for ids, seen in map(self._prompt, self.questions)
        ]
        self.length, self.room = (max(size) for size in zip(*sizes))
        right = [list(question.options).index(question.answer) for question in self.questions]
        self.right, self.categories = np.array(right), [_slug(question.category) for question in self.questions]

        def answer(parts: Mapping, batch: Mapping, texts: Mapping) -> tuple[Array, Array]:
            scores = option_scores(system.model, parts, batch, **texts, options=self.options)
            return chosen_option(scores), scores

        self._answer = jax.jit(answer, compiler_options=compiler_options(system.model.captioner.text.dtype))

    def __call__(self, parts: Mapping) -> dict[str, np.ndarray]:
        """1 for each right answer and 0 for each wrong one: `understanding` of all, `understanding_<category>`."""
        chosen, _ = self.answers(parts)
        hits = (chosen == self.right).astype(np.float64)
        of, names = np.array(self.categories), dict.fromkeys(self.categories)
        return {UNDERSTANDING: hits} | {f"{UNDERSTANDING}_{name}": hits[of == name] for name in names}

    def answers(self, parts: Mapping) -> tuple[np.ndarray, np.ndarray]:
        """The chosen option `[n]` of each question, and the log-probability `[n, k]` of each of its options."""
        # the program is the same whatever a stage adds to the decoder
        parts = {name: parts[name] for name in READ if name in parts}

        def batch(places: np.ndarray) -> tuple[Array, Array]:
            rows = [self._fields(int(place)) for place in places]
            fields, texts = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
            return self._answer(parts, *on_mesh((fields, texts), self.mesh))

        return in_batches(batch, self.size, np.arange(len(self.questions)))

    def _option_texts(self, question: Question) -> list[tuple[int, list[int], int]]:
        """(option, tokens, given tokens among them) of every text that is compared."""
        stated = {key: (Statement(key),) for key in question.options}
        if self.by == "text":
            stated = question.statements or {key: (Statement(text),) for key, text in question.options.items()}
        found = []
        for number, key in enumerate(question.options):
            for one in stated[key]:
                ids, given = (encode_caption(self.system.tokenizer, text) for text in (one.text, one.given))
                # an answer ends, a caption that states an option may go on
                kept = ids[:1] if self.by == "letter" else ids[:-1] if question.statements else ids
                found.append((number, kept, len(given) - 1))
        different = len({tuple(ids) for _, ids, _ in found}) == len(found)
        if not different or not all(len(ids) > given for _, ids, given in found):
            what = f"the options {', '.join(question.options)}" if self.by == "letter" else "the texts of its options"
            raise ValueError(
                f"question {question.index}: {what} are the same tokens for this tokenizer; set "
                f"evaluation.questions_by={'text' if self.by == 'letter' else 'letter'}"
            )
        return found

    def _prompt(self, question: Question) -> tuple[list[int], list]:
        """Prompt tokens, and patches with grid of each image."""
        tokenizer, processor = self.system.tokenizer, self.system.processor
        try:
            images = question.images()
            captioned = self.by == "text" and question.statements
            parts = [self.prompt, *images] if captioned else placed_images(question.text, images)
            return question_inputs(tokenizer, processor, parts)
        except ValueError as error:
            raise ValueError(f"question {question.index}: {error}") from error

    def _fields(self, place: int) -> tuple[Fields, Fields]:
        """The padded prompt of a question, and the padded texts of its options."""
        ids, seen = self._prompt(self.questions[place])
        pad = token_id(self.system.tokenizer, IMAGE_PAD)
        prompt = prompt_fields(ids, seen, self.system.processor, pad, self.room, self.length)
        texts, rows, width = self.texts[place], self.rows, np.arange(self.width)
        tokens = np.stack([pad_to(np.array(ids, np.int32), self.width) for _, ids, _ in texts])
        mask = np.stack([width < len(ids) for _, ids, _ in texts])
        counted = np.stack([(width >= given) & (width < len(ids)) for _, ids, given in texts])
        option = np.array([number for number, _, _ in texts], np.int32)
        return prompt, {
            "tokens": pad_to(tokens, rows),
            "mask": pad_to(mask, rows),
            "counted": pad_to(counted, rows),
            "option": pad_to(option, rows, NO_OPTION),
        }


def _slug(category: str) -> str:
    """A category as the last part of a score's name."""
    return re.sub(r"[^a-z0-9]+", "_", category.lower()).strip("_") or "all"
