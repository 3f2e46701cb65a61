"""Checks of a model folder: names, shapes and numbers of every tensor, and whether the parts fit together."""

import dataclasses
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from uae_jax.data import tokenizer as tokens
from uae_jax.data.qwen_inputs import load_image_processor
from uae_jax.diffusion.schedule import ScheduleConfig
from uae_jax.hf.adapters import NOT_A_FACTOR, adapter_table
from uae_jax.hf.file_sets import unread_weights
from uae_jax.hf.finite import count_non_finite
from uae_jax.hf.inventory import Fit, compare, cut_short
from uae_jax.hf.rules import listed
from uae_jax.hf.safetensors import TensorFolder, Tensors, dtype_name
from uae_jax.settings import one_line
from uae_jax.stages import decoders
from uae_jax.stages.folders.adapters import in_text_model, survey
from uae_jax.stages.folders.parts import (
    ADAPTERS,
    ENCODERS,
    KINDS,
    Folder,
    Part,
    check_head,
    part_config,
    part_encoder,
    part_table,
    part_tensors,
    projector_sizes,
)

NEEDED = ("llm", "llm_processor", "SD3/vae", "SD3/text_encoder", "SD3/text_encoder_2", "SD3/scheduler")
OWN_NEEDED = ("llm", "llm_processor", *(name for name in KINDS if name.startswith("decoder/")))
_LISTED = 4  # names in a message; the JSON has all names
TITLES = {
    "official": "official layout",
    "pipeline": "diffusers pipeline",
    "unified": "one network that captions and draws",
    "part": "one part alone",
}


@dataclasses.dataclass
class Row:
    """The result of the check of one part.

    Attributes:
      part: name of the part.
      folder: folder of the part.
      files: number of weight files.
      matched, expected: numbers of tensors; both 0 for parts without weights.
      dtypes: stored precision to number of tensors.
      parameters: number of scalars in all matched tensors.
      missing, unknown: names of tensors.
      problems: one sentence each with error, place and remedy.
      notes: remarks.
      licence: file name, or `README: NAME` from the front matter; None without either.
      config: of `part_config`, for the checks between parts.
    """

    part: str
    folder: pathlib.Path
    files: int = 0
    matched: int = 0
    expected: int = 0
    dtypes: dict[str, int] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    missing: list[str] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    licence: str | None = None
    config: Any = None

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "config"}
        return values | {"folder": str(self.folder), "ok": not self.problems}


def check_folder(
    folder: Folder, *, fast: bool = False, progress: Callable[[int], None] = lambda count: None
) -> list[Row]:
    """A row for every part, and for every part that an official folder lacks.

    Args:
      folder: of `find_parts`.
      fast: read the headers only, not the numbers.
      progress: called with the bytes of each tensor.
    """
    rows = [check_part(part, folder, fast=fast, progress=progress) for part in folder.parts]
    if folder.layout == "official":
        rows += _missing_parts(folder)
    found = {row.part: row for row in rows}
    check_fit(found, folder)
    if "dit" in found and "SD3/transformer" in found:
        found["SD3/transformer"].notes.append("not used beside dit")
    if "llm" in found and folder.captioner != folder.part("llm"):
        found["llm"].notes.append("not used beside the captioner in llm_lora")
    return rows


def _missing_parts(folder: Folder) -> list[Row]:
    """A row for each part that the model needs and the folder lacks."""
    remedy = "is not there; copy it there, or build the folder with `convert import`"
    needed = OWN_NEEDED if folder.own_decoder else NEEDED
    problems = {name: f"{folder.path / name} {remedy}" for name in needed if folder.part(name) is None}
    if folder.transformer is None:
        places = f"neither {folder.path / 'dit'} nor {folder.path / 'SD3' / 'transformer'}"
        problems["dit"] = f"{places} is there; copy one of them there"
    return [Row(name, folder.path / name, problems=[problem]) for name, problem in problems.items()]


def weight_bytes(folder: Folder) -> int:
    """Bytes of all weight files, for a progress bar."""
    return sum(file.stat().st_size for part in folder.parts for file in part.folder.glob("*.safetensors"))


def check_part(
    part: Part, folder: Folder, *, fast: bool = False, progress: Callable[[int], None] = lambda count: None
) -> Row:
    """The row of one part; errors are in its problems, nothing is raised."""
    row = Row(part.name, part.folder, licence=find_licence(part.folder, folder.path))
    try:
        if part.kind == "processor":
            _check_processor(row)
        elif part.kind == "scheduler":
            ScheduleConfig.from_folder(part.folder)
        elif part.kind == "decoder tokenizer":
            row.notes.append(f"{len(tokens.load_tokenizer(part.folder)):,} tokens")
        elif part.kind == "decoder scheduler":
            pass  # read with the other parts, `_check_own_decoder`
        else:
            _check_weights(row, part, folder, fast, progress)
    except (ValueError, FileNotFoundError) as error:
        row.problems.insert(0, cut_short(part.folder) or one_line(error))
    return row


def _check_processor(row: Row) -> None:
    tokenizer = tokens.load_tokenizer(row.folder)
    tokens.stop_ids(tokenizer)
    tokens.condition_template(tokenizer)
    row.config = (len(tokenizer), load_image_processor(row.folder, 1 << 20))
    row.files = sum(1 for file in row.folder.iterdir() if file.is_file())
    row.notes.append(f"{len(tokenizer):,} tokens")


def _check_weights(row: Row, part: Part, folder: Folder, fast: bool, progress: Callable[[int], None]) -> None:
    row.config = part_config(part)
    if part.kind == "image encoder":
        part_encoder(part).preprocess()
    stored = part_tensors(part)
    row.files = len(set(stored.files.values()))
    if others := unread_weights(part.folder):
        row.notes.append(f"not read, because safetensors are there: {listed(others, _LISTED)}")
    if not fast:
        check_head(part, stored, row.config)
    if part.name in ADAPTERS:
        fit = _compare_adapter(row, part, folder)
        row.problems += _misshapen(part, fit)
    else:
        table = part_table(part, row.config, stored)
        fit = compare(stored, table.rules, table.abstract, aliases=table.aliases, ignore=table.ignore)
        row.problems += _fit_problems(part, stored, fit)
    row.matched, row.expected = fit.matched, fit.expected
    row.missing, row.unknown = list(fit.missing), list(fit.unknown)
    names = fit.published.values()
    row.dtypes = dict(Counter(dtype_name(stored.dtype(name)) for name in names).most_common())
    row.parameters = sum(math.prod(stored.shape(name)) for name in names)
    if not fast:
        row.problems += _bad_numbers(stored, progress)


def _fit_problems(part: Part, stored: Tensors, fit: Fit) -> list[str]:
    wrong = [f"{part.folder} misses {listed(fit.missing, _LISTED)}"] if fit.missing else []
    if fit.unknown:
        file = stored.files[fit.unknown[0].split(" ")[0]]
        wrong.append(f"{file} has {listed(fit.unknown, _LISTED)}, which this model does not have")
    problems = [f"{'; '.join(wrong)}; copy weights and config.json again from one place"] if wrong else []
    return problems + _misshapen(part, fit)


def _misshapen(part: Part, fit: Fit) -> list[str]:
    return [
        f"{part.folder}: {sentence}; copy the config.json and weights of one model"
        for sentence in fit.misshapen[:_LISTED]
    ]


def _bad_numbers(stored: Tensors, progress: Callable[[int], None]) -> list[str]:
    problems = []
    for name in sorted(stored.names(), key=lambda name: (stored.files[name], name)):
        tensor = stored.read(name)
        count = count_non_finite(tensor)
        if count:
            problems.append(
                f"{stored.files[name]}: {name} has {count:,} of {tensor.size:,} numbers that are NaN or infinite; "
                "copy the file again"
            )
        progress(tensor.nbytes)
    return problems[:_LISTED] + (
        [f"and {len(problems) - _LISTED} more tensors with such numbers"] if len(problems) > _LISTED else []
    )


def _compare_adapter(row: Row, part: Part, folder: Folder) -> Fit:
    """Compares an adapter with its base model. Also checks a captioner that is stored only beside the adapter."""
    files = survey(part, folder)
    row.problems += files.problems
    captioner = folder.captioner if part.name == "llm_lora" else None
    if captioner and captioner.folder == part.folder:
        row.notes.append("the release's wrapped layout: the complete captioner is stored beside the adapter")
        if folder.part("llm") != captioner:  # else the captioner has its own row
            table = part_table(captioner, part_config(captioner), files.folder)
            base = compare(files.folder, table.rules, table.abstract, aliases=table.aliases, ignore=table.ignore)
            row.problems += _fit_problems(part, files.folder, base)
    ranks = ", ".join(str(rank) for rank in sorted(set(files.ranks.values())))
    row.notes.append(
        f"rank {ranks}, alpha {files.alpha:g}{' (assumed: no adapter_config.json)' if files.assumed else ''}"
    )
    if part.name == "llm_lora" and not in_text_model(files):
        row.notes.append(
            "adapts more than the text model: merge it, by model.merge_adapters=True or `convert export "
            "--merge-adapters`"
        )
    published = {
        f"{module}.lora_{side}.weight": name for module, pair in files.pairs.items() for side, name in pair.items()
    }
    fit = Fit(published, len(published) + len(files.missing), files.missing, files.unknown)
    if files.problems:
        return fit
    rules, shapes, _ = adapter_table(files)
    return compare(files.folder, rules, shapes, aliases=files.aliases, ignore=NOT_A_FACTOR)


def check_fit(rows: dict[str, Row], folder: Folder) -> None:
    """Adds a problem to each row whose part does not fit another part."""
    decoder = rows.get("dit") or rows.get("SD3/transformer")
    decoder = decoder if decoder and decoder.config else None
    if folder.own_decoder:
        _check_own_decoder(rows, folder, folder.own_decoder)
    else:
        _check_projector(rows, folder, decoder)
    if decoder:
        _check_decoder(rows, decoder)
    _check_reference(rows)
    captioner, processor = rows.get("llm"), rows.get("llm_processor")
    if captioner and captioner.config and processor and processor.config:
        (tokens_there, _), embedded = processor.config, captioner.config.text.vocab_size
        if tokens_there > embedded:
            processor.problems.append(
                f"{processor.folder} has {tokens_there:,} tokens, {captioner.folder} embeds {embedded:,}; copy the "
                "tokenizer of this model"
            )


def _check_own_decoder(rows: dict[str, Row], folder: Folder, pipeline: pathlib.Path) -> None:
    """The parts of a decoder with its own text encoder fit each other, and its tokenizer is the captioner's."""
    own = [row for name, row in rows.items() if name.startswith("decoder/")]
    words = folder.part("llm_processor")
    if any(row.problems for row in own) or words and rows["llm_processor"].problems:
        return
    place = words.folder if words else pipeline / "tokenizer"
    try:
        tokenizer = tokens.load_tokenizer(place)
        decoders.describe(pipeline, tokenizer, "", dtype="float32", remat="none", lora_alpha=1.0)
    except (ValueError, FileNotFoundError) as error:
        own[0].problems.append(one_line(error))


def _check_projector(rows: dict[str, Row], folder: Folder, decoder: Row | None) -> None:
    """The projector exists in an official folder, and gives the features that the decoder reads."""
    captioner = rows.get("llm")
    if captioner is None or not captioner.config or captioner.problems:
        return
    features = _projector_features(folder, rows.get("projector"))
    if features is None and folder.layout != "official":
        captioner.notes.append("no projector: plain Qwen2.5-VL")
    elif features is None:
        captioner.problems.append(
            f"{captioner.folder} has no projector.0 and projector.2 tensors; UAE's own llm folder has them, "
            "`convert import` makes new ones"
        )
    elif decoder and features != decoder.config.joint_attention_dim:
        captioner.problems.append(
            f"{captioner.folder}: the projector gives {features} features, {decoder.folder} needs "
            f"joint_attention_dim {decoder.config.joint_attention_dim}; use the projector and transformer of one model"
        )


def _check_decoder(rows: dict[str, Row], decoder: Row) -> None:
    """VAE and text encoders have the widths that the decoder reads."""
    vae, sizes = rows.get("SD3/vae"), decoder.config
    if vae and vae.config and vae.config.latent_channels != sizes.in_channels:
        vae.problems.append(
            f"{vae.folder} has {vae.config.latent_channels} latent channels, {decoder.folder} needs {sizes.in_channels}"
        )
    texts = [rows.get(f"SD3/{name}") for name in ("text_encoder", "text_encoder_2")]
    widths = [text.config.projection_dim for text in texts if text and text.config]
    if len(widths) == len(texts) and sum(widths) != sizes.pooled_projection_dim:
        rows["SD3/text_encoder"].problems.append(
            f"the text encoders give {' + '.join(map(str, widths))} features, {decoder.folder} needs "
            f"pooled_projection_dim {sizes.pooled_projection_dim}; copy both encoders of its own model"
        )


def _check_reference(rows: dict[str, Row]) -> None:
    """The captioner from before full fine-tuning has the same sizes, and there is no adapter beside it."""
    captioner, reference = rows.get("llm"), rows.get("llm_reference")
    if reference is None or reference.config is None:
        return
    reference.notes.append("the decoder's text encoder, and the reference of llm")
    if "llm_lora" in rows:
        reference.problems.append(
            f"{reference.folder} and {rows['llm_lora'].folder} are both there; a captioner is trained by an adapter "
            "or by full fine-tuning, so remove one of them"
        )
    if captioner and captioner.config and captioner.config.text != reference.config.text:
        reference.problems.append(
            f"{reference.folder} and {captioner.folder} have language models of different sizes; take both from one "
            "export"
        )


def _projector_features(folder: Folder, own: Row | None) -> int | None:
    """The features of the projector: in its own folder, else with the captioner that is used, else in `llm`."""
    places = [own.folder] if own else [part.folder for part in (folder.captioner, folder.part("llm")) if part]
    for place in places:
        try:
            sizes = projector_sizes(TensorFolder(place))
        except (ValueError, FileNotFoundError):
            continue
        if sizes:
            return sizes[-1]
    return None


def find_licence(folder: pathlib.Path, root: pathlib.Path) -> str | None:
    """The licence file nearest to a part, up to the model's folder: its name, or `README: NAME` from a front matter."""
    places = [folder, *(place for place in folder.parents if place == root or root in place.parents)]
    for place in places:
        names = [file.name for file in place.iterdir()] if place.is_dir() else []
        files = [name for name in names if re.match(r"licen[sc]e", name, re.IGNORECASE)]
        if files:
            return min(files)
        match = re.match(r"---\n.*?^license:\s*(\S+)", _readme(place), re.DOTALL | re.MULTILINE)
        if match:
            return f"README: {match.group(1)}"
    return None


def _readme(place: pathlib.Path) -> str:
    file = place / "README.md"
    text = file.read_text(errors="replace") if file.is_file() else ""
    return text[: text.find("\n---", 3) + 1] if text.startswith("---\n") else ""


def table_text(folder: Folder, rows: Sequence[Row]) -> str:
    """The rows as aligned text, with the problems under each row and a last line with counts."""
    titles = ("part", "files", "tensors", "stored as", "parameters", "licence", "result")
    lines = [titles, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    text = [f"{folder.path}: {TITLES[folder.layout]}"]
    for line, row in zip(lines, (None, *rows)):
        text.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        for sentence in row.problems if row else ():
            text.append(f"    {sentence}")
    broken = sum(bool(row.problems) for row in rows)
    count = f"{len(rows)} part{'s' * (len(rows) != 1)}"
    text.append(f"{broken} of {count} cannot be used" if broken else f"{count}, all complete")
    if folder.layout in ("official", "unified") and not broken and not any(row.part in ENCODERS for row in rows):
        text.append(f"no image encoder is there: inference works, training needs {folder.path / 'clip'} for its reward")
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    if not row.expected and row.parameters == 0:
        middle = ("-", "-", "-")
    else:
        dtypes = (
            ", ".join(row.dtypes)
            if len(row.dtypes) == 1
            else ", ".join(f"{name} ({count})" for name, count in row.dtypes.items())
        )
        middle = (f"{row.matched} of {row.expected}", dtypes or "-", readable(row.parameters))
    result = (
        f"{len(row.problems)} problem{'s' * (len(row.problems) > 1)}" if row.problems else "; ".join(("ok", *row.notes))
    )
    return (row.part, str(row.files or "-"), *middle, row.licence or "-", result)


def readable(count: int) -> str:
    """A count with its unit: `3.755 B`, `83.8 M`, `512`."""
    for limit, unit, digits in ((1e9, "B", 3), (1e6, "M", 1), (1e3, "k", 1)):
        if count >= limit:
            return f"{count / limit:.{digits}f} {unit}"
    return str(count)


def as_json(folder: Folder, rows: Sequence[Row]) -> str:
    """The rows as one JSON object."""
    return json.dumps(
        {
            "folder": str(folder.path),
            "layout": folder.layout,
            "ok": not any(row.problems for row in rows),
            "parts": [row.record() for row in rows],
        },
        indent=1,
    )
