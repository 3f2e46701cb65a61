"""The model card of an export: `README.md` at its root, with what the model was made of and what it scores.

The front matter is that of the Hub (huggingface.co/docs/hub/model-cards). Nothing is uploaded; the card says how.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import uae_jax
from uae_jax.files.whole import write_bytes
from uae_jax.models.decoders import PUBLISHED

if TYPE_CHECKING:
    from uae_jax.stages.run_config import RunConfig

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2509.09666"
# part of a preset's sizes -> Hub id and licence of the published model
BASES = {
    "qwen2_5_vl_3b": ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen research licence, no commercial use"),
    "qwen2_5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", "Apache 2.0"),
    "sd3_5_medium": ("stabilityai/stable-diffusion-3.5-medium", "Stability AI Community licence"),
    "janus_pro_1b": ("deepseek-community/Janus-Pro-1B", "DeepSeek model licence, which restricts use"),
    "janus_pro_7b": ("deepseek-community/Janus-Pro-7B", "DeepSeek model licence, which restricts use"),
    "sd3_5_large": ("stabilityai/stable-diffusion-3.5-large", "Stability AI Community licence"),
} | {name: (sizes.hub, sizes.licence) for name, sizes in PUBLISHED.items()}
SHOWN = ("reward", "unified_score", "heldout_score", "caption_tokens", "fact_recall", "fact_precision", "geneval")


def base_models(sizes: str) -> list[tuple[str, str]]:
    """Hub id and licence of the published models of a preset's sizes; none for other models."""
    return [BASES[name] for name in BASES if sizes.startswith(name) or sizes.endswith(f"_{name}")]


def front_matter(licence: str, bases: Sequence[tuple[str, str]]) -> str:
    """The YAML at the top of a card."""
    lines = ["---", f"license: {licence}", "library_name: uae_jax", "tags: [UAE, captioning, text-to-image, GRPO, jax]"]
    if bases:
        lines += ["base_model:", *(f"- {name}" for name, _ in bases)]
    return "\n".join([*lines, "---"])


def score_table(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Held-out scores before the first stage and after the last one, with 95 % intervals, in Markdown."""
    first = next((stage["before"] for stage in stages if stage["before"]), {})
    last = stages[-1]["after"] if stages else {}
    rows = [
        f"| {name} | {_score(first.get(name))} | {_score(last[name])} | {last[name]['n']} |"
        for name in SHOWN
        if isinstance(last.get(name), Mapping)
    ]
    return ["| score | before | after | images |", "|---|---|---|---|", *rows] if rows else ["None were taken."]


def _score(score: Any) -> str:
    if not isinstance(score, Mapping):
        return "-"
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def run_card(config: "RunConfig", summary: Mapping[str, Any]) -> str:
    """The card of a run's export.

    Args:
      config: of the run.
      summary: contents of `summary.json`.
    """
    bases, stages = base_models(config.model.sizes), summary["stages"]
    builtin = not config.model.folder
    licence = "apache-2.0" if builtin else "other"
    data = config.data.folder or ", ".join(config.data.mixture) or config.data.name
    origin = [f"- [{name}](https://huggingface.co/{name}): {terms}" for name, terms in bases]
    if not origin:
        place = "the built-in start model of uae_jax, Apache 2.0" if builtin else f"`{config.model.folder}`"
        origin = [f"- {place}" + ("" if builtin else "; its licences hold for this model too")]
    trained = [
        f"| {stage['name']} | {stage['steps']} | {config.stage(kind).batch_size} | {stage['seconds']:.0f} |"
        for stage, (_, kind) in zip(stages, config.order())
    ]
    return "\n".join(
        [
            front_matter(licence, bases),
            "",
            f"# UAE, preset {summary['preset']}",
            "",
            f"A captioner and a decoder that were trained as one auto-encoder whose code is text ([UAE]({PAPER})), by "
            f"uae_jax {uae_jax.__version__}.",
            "",
            "## Base models",
            "",
            *origin,
            "",
            "## Training",
            "",
            f"Data: {config.data.source} {data}".rstrip() + f"; images of {config.data.image_size} pixels. Seed "
            f"{summary['seed']}, on {summary['device']}.",
            "",
            "| stage | steps | images a step | seconds |",
            "|---|---|---|---|",
            *trained,
            "",
            "`config.json` of the run has every setting.",
            "",
            "## Held-out scores",
            "",
            *score_table(stages),
            "",
            "Means over images that were not trained on, with 95 % intervals over images, of one seed. Training raises "
            "`reward`, so the other scores count more.",
            "",
            *usage(),
        ]
    )


def usage() -> list[str]:
    """How the folder is opened, and how it is uploaded."""
    return [
        "## Use",
        "",
        "```python",
        "import uae_jax",
        "",
        'model = uae_jax.load("PATH_OF_THIS_FOLDER")',
        'model.reconstruct(["photo.png"])[0].strip().save("strip.png")',
        "```",
        "",
        "Upload it yourself, once the licences above allow that: `hf upload USER/NAME PATH_OF_THIS_FOLDER .`",
        "",
    ]


def converted_card(source: pathlib.Path, settings: Mapping[str, Any]) -> str:
    """The card of a folder that was converted: the source's own card, or a new one, and how it was converted.

    Args:
      source: the folder that was read.
      settings: of the conversion.
    """
    own = source / CARD
    words = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    made = f"Converted by uae_jax {uae_jax.__version__} from `{source.name}`: {words}."
    if own.is_file():
        return f"{own.read_text(encoding='utf-8').rstrip()}\n\n{made}\n"
    body = ["# UAE", "", made, "", "The licences of the models that it was made of hold for it too.", "", *usage()]
    return "\n".join([front_matter("other", ()), "", *body])


def write_card(folder: pathlib.Path, text: str) -> None:
    """Writes the card at the root of a model folder."""
    write_bytes(folder / CARD, text.encode("utf-8"))
