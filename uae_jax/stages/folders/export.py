"""Writes an official folder or training workdir as another folder: official, or for transformers, diffusers and peft.

Tensors go from file to file one at a time, under their published names. In their stored precision they stay bit-equal.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from uae_jax.files.json_files import read_json, write_json
from uae_jax.files.paths import to_path
from uae_jax.hf.adapters import AdapterFiles
from uae_jax.hf.inventory import compare
from uae_jax.hf.items import Item, cast, stored_items, write_items
from uae_jax.hf.torch_file import open_tensors
from uae_jax.stages.decoders import FOLDER as DECODER
from uae_jax.stages.folders import adapters
from uae_jax.stages.folders.check import check_folder
from uae_jax.stages.folders.files import check_target, copy_file, replaced, small_files
from uae_jax.stages.folders.parts import (
    ADAPTERS,
    KINDS,
    PROJECTOR,
    Folder,
    Part,
    component_of,
    find_parts,
    has_openai_names,
    part_config,
    part_table,
    part_tensors,
    projector_sizes,
    published_settings,
    with_dtype,
)
from uae_jax.stages.model_card import converted_card, write_card

LAYOUTS = ("official", "hub")
SD3_MODULE = "diffusers.models.transformers.transformer_sd3"
DTYPES = ("keep", "float32", "bfloat16", "float16")
LLM_LORA = ("peft", "wrapped")
WRAPPED_SHARDS = 3  # as in the release
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_PIPELINE = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
    "image_encoder": (None, None),
    "feature_extractor": (None, None),
}


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Settings of an export.

    Attributes:
      layout: `official`, or `hub`: folders for transformers, diffusers and peft.
      dtype: of all weights, or `keep`.
      merge_adapters: add the adapters to their base models instead of writing adapter folders.
      llm_lora: in the official layout: `peft`, an adapter folder, or `wrapped`, the release's complete state in three
        files.
      max_shard_gb: size limit of one file in 10^9 bytes.
      parts: names of the parts to write (`SD3` stands for all its folders); empty for all parts.

    Raises:
      ValueError: an unknown choice, or a size limit that is not positive.
    """

    layout: str = "official"
    dtype: str = "keep"
    merge_adapters: bool = False
    llm_lora: str = "peft"
    max_shard_gb: float = 5.0
    parts: tuple[str, ...] = ()

    def __post_init__(self):
        for name, choices in (("layout", LAYOUTS), ("dtype", DTYPES), ("llm_lora", LLM_LORA)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {', '.join(choices)}")
        if self.max_shard_gb <= 0:
            raise ValueError(f"max_shard_gb is {self.max_shard_gb}; it must be above 0")
        if self.layout == "hub" and self.llm_lora == "wrapped":
            raise ValueError("llm_lora 'wrapped' is the release's own layout; it goes with layout 'official'")
        unknown = sorted(set(self.parts) - {*KINDS, "SD3"})
        if unknown:
            raise ValueError(f"there is no part {unknown[0]!r}; the parts are {', '.join((*KINDS, 'SD3'))}")


@dataclasses.dataclass(frozen=True)
class Output:
    """One folder to write.

    Attributes:
      name: path below the new folder.
      items: tensors.
      stem: of the names of the weight files.
      shards: number of weight files; 0 for a size limit.
      copies: files to copy.
      contents: file name to its JSON content.
      note: message to the user.
    """

    name: str
    items: tuple[Item, ...] = ()
    stem: str = "model"
    shards: int = 0
    copies: tuple[pathlib.Path, ...] = ()
    contents: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(item.nbytes for item in self.items)


def export_folder(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    config: ExportConfig,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda count, total: None,
) -> list[Output]:
    """Writes a model in another layout or precision; the new folder appears only when it is complete.

    Args:
      source: official folder, training workdir with an `export/`, or the folder of one model.
      out: a new or empty folder.
      config: settings.
      overwrite: replace a model folder at `out`.
      progress: called with the bytes of each written tensor and of all tensors.

    Returns:
      The written folders.

    Raises:
      FileNotFoundError, ValueError: a part of `source` is absent, broken or NaN, or `out` is in use; nothing is
        written.
    """
    folder = find_parts(source)
    if folder.layout == "pipeline":
        raise ValueError(f"{source} is no official UAE folder or training workdir; build one with `convert import`")
    if folder.layout == "part" and any(part.name in ADAPTERS or part.folder.is_file() for part in folder.parts):
        raise ValueError(f"{source} is no model; of an adapter, give the official UAE folder that it is in")
    check_target(to_path(out).absolute(), overwrite=overwrite, sources=[folder.path])
    chosen = [row for row in check_folder(folder, fast=True) if not config.parts or _chosen(row.part, config.parts)]
    problems = [problem for row in chosen for problem in row.problems]
    if problems:
        more = f" (and more, {len(problems)} problems in all; see `convert check`)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")
    outputs = [output for output in plan(folder, config) if not config.parts or _chosen(output.name, config.parts)]
    if not any(output.items or output.copies for output in outputs):
        raise ValueError(f"{folder.path} holds none of the parts {', '.join(config.parts)}")
    total = sum(output.nbytes for output in outputs)
    with replaced(out, overwrite=overwrite, sources=[folder.path]) as fresh:
        for output in outputs:
            _write(output, fresh / output.name, config.max_shard_gb * 1e9, lambda count: progress(count, total))
        write_card(fresh, converted_card(folder.path, {"layout": config.layout, "dtype": config.dtype}))
    return outputs


def _chosen(name: str, parts: tuple[str, ...]) -> bool:
    return name in parts or name == "projector" and "llm" in parts or "SD3" in parts and name.startswith("SD3")


def _write(output: Output, folder: pathlib.Path, limit: float, report: Callable[[int], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in output.copies:
        copy_file(file, folder)
    for name, content in output.contents.items():
        write_json(folder / name, content)
    if output.items:
        write_items(folder, output.items, stem=output.stem, max_shard_bytes=limit, shards=output.shards, report=report)


def plan(folder: Folder, config: ExportConfig) -> list[Output]:
    """Every folder that an export writes, in the order of `KINDS`; tensors are read at the time of writing.

    One model alone is written with its published names, as its library opens it.
    """
    dtype = None if config.dtype == "keep" else np.dtype(config.dtype)
    if folder.layout == "part":
        return [_plain(part, "", dtype) for part in folder.parts if part.kind != "processor"]
    if folder.layout == "unified":
        return _unified(folder, config, dtype)
    legal = [file for file in small_files(folder.path) if file.name.lower().startswith(("licen", "notice", "readme"))]
    return [
        Output("", copies=tuple(legal)),
        *_captioner(folder, config, dtype),
        *_decoder(folder, config, dtype),
        *(_plain(part, part.name, dtype) for part in folder.parts if part.kind == "image encoder"),
    ]


def _unified(folder: Folder, config: ExportConfig, dtype: np.dtype | None) -> list[Output]:
    """Janus as transformers opens it, its adapter in it or as peft opens it, and the image encoders."""
    network, adapted = folder.existing("janus"), folder.part("llm_lora")
    files, items = adapters.survey(adapted, folder) if adapted else None, part_items(network)
    merged = bool(files) and config.merge_adapters
    found = [_plain(network, "", dtype, adapters.merged(items, files, dtype) if files and merged else items)]
    if adapted and files and not merged:
        kept = stored_items(files.folder, ((name, name) for pair in files.pairs.values() for name in pair.values()))
        settings = {"adapter_config.json": read_json(adapted.folder, "adapter_config.json")}
        found.append(Output(adapted.name, tuple(cast(kept, dtype)), "adapter_model", contents=settings))
    return found + [_plain(part, part.name, dtype) for part in folder.parts if part.kind == "image encoder"]


def part_items(part: Part) -> list[Item]:
    """A part's tensors under their published names; a state with OpenAI's names keeps them."""
    if has_openai_names(part):
        stored = open_tensors(part.folder)
        return stored_items(stored, ((name, name) for name in sorted(stored.names())))
    stored = part_tensors(part)
    table = part_table(part, part_config(part), stored)
    fit = compare(stored, table.rules, table.abstract, aliases=table.aliases, ignore=table.ignore)
    return stored_items(stored, fit.published.items())


def _plain(part: Part, name: str, dtype: np.dtype | None, items: Iterable[Item] | None = None) -> Output:
    """A part with its files, and its config.json with the written precision."""
    items = cast(part_items(part) if items is None else items, dtype)
    files = {file.name: file for folder in {part.folder, part.config_folder} for file in small_files(folder)}
    copies = tuple(file for name, file in sorted(files.items()) if name not in ("config.json", "adapter_config.json"))
    contents = {} if has_openai_names(part) else {"config.json": stored_config(part, items)}
    stem = component_of(part).stem if part.kind == "decoder part" else STEMS.get(part.kind, "model")
    return Output(name, tuple(items), stem, copies=copies, contents=contents)


def stored_config(part: Part, items: Iterable[Item]) -> dict[str, Any]:
    """A part's config.json, with the precision of its tensors if that is one and the format has a field for it."""
    content, dtypes = published_settings(part), {item.dtype.name for item in items}
    if len(dtypes) != 1 or "_class_name" in content:
        return content
    return with_dtype(content, *dtypes)


def _captioner(folder: Folder, config: ExportConfig, dtype: np.dtype | None) -> list[Output]:
    part, processor, adapted = folder.captioner, folder.part("llm_processor"), folder.part("llm_lora")
    if part is None:
        return []
    base = [*part_items(part), *_projector_items(folder, part)]
    files, reference = adapters.survey(adapted, folder) if adapted else None, folder.part("llm_reference")
    items = adapters.merged(base, files, dtype) if files and config.merge_adapters else base
    if config.layout == "hub":
        outputs = _hub_captioner(part, items, dtype, processor)
    else:
        outputs = [_plain(part, "llm", dtype, items)]
        if processor:
            names = {file.name for file in outputs[0].copies} if processor.folder == part.folder else set()
            copies = tuple(file for file in small_files(processor.folder) if file.name not in names)
            outputs += [Output("llm_processor", copies=copies)] if copies else []
    if adapted and files and not config.merge_adapters:
        outputs.append(_language_adapter(part, adapted, files, base, config, dtype))
    if reference:
        items = part_items(reference)
        if config.layout == "hub":
            items = [item for item in items if not item.name.startswith("projector.")]
        note = "the decoder's text encoder: llm before its training"
        outputs.append(dataclasses.replace(_plain(reference, reference.name, dtype, items), note=note))
    return outputs


def _projector_items(folder: Folder, captioner: Part) -> list[Item]:
    """A projector outside of the captioner's weights: in its own folder, or in `llm` beside `llm_lora`."""
    if projector_sizes(part_tensors(captioner)):
        return []
    own, plain = folder.part("projector"), folder.part("llm")
    source = own or (plain if plain != captioner else None)
    return [item for item in part_items(source) if item.name.startswith("projector.")] if source else []


def _hub_captioner(part: Part, items: list[Item], dtype: np.dtype | None, processor: Part | None) -> list[Output]:
    """The captioner without projector, with its tokenizer; the projector in its own folder."""
    model = _plain(part, "llm", dtype, [item for item in items if not item.name.startswith("projector.")])
    there = ("config.json", "generation_config.json", *(copy.name for copy in model.copies))
    beside = [file for file in small_files(processor.folder) if file.name not in there] if processor else []
    projector = cast([item for item in items if item.name.startswith("projector.")], dtype)
    model = dataclasses.replace(model, copies=(*model.copies, *beside))
    if not projector:
        return [model]
    shapes = {item.name: item.shape for item in projector}
    content = {
        "model_type": PROJECTOR,
        "in_features": shapes["projector.0.weight"][1],
        "hidden_features": shapes["projector.0.weight"][0],
        "out_features": shapes["projector.2.weight"][0],
        "hidden_act": "gelu",
    }
    return [
        model,
        Output(
            "projector",
            tuple(projector),
            contents={"config.json": content},
            note=(
                "UAE's two-layer projector, unknown to transformers: projector.0, GELU, projector.2 on the last hidden "
                "states"
            ),
        ),
    ]


def _language_adapter(
    captioner: Part, part: Part, files: AdapterFiles, base: list[Item], config: ExportConfig, dtype: np.dtype | None
) -> Output:
    # files in the captioner's folder belong to the captioner
    files_there = small_files(part.folder) if part.folder != captioner.folder else []
    copies = tuple(file for file in files_there if not file.name.endswith("config.json"))
    if config.llm_lora == "wrapped":
        tied = part_config(captioner).text.tied
        contents = {} if files.assumed else {"adapter_config.json": adapters.peft_config(files, "text", "llm")}
        return Output(
            "llm_lora",
            tuple(cast(adapters.wrapped_items(base, files, tied), dtype)),
            shards=WRAPPED_SHARDS,
            copies=copies,
            contents=contents,
            note="the complete captioner with its text model wrapped by peft, as in the release",
        )
    layout, model = ("text", "its text model (model.model.language_model)")
    if config.layout == "hub" or not adapters.in_text_model(files):
        layout, model = "whole", "Qwen2_5_VLForConditionalGeneration"
    return Output(
        "llm_lora",
        tuple(cast(adapters.adapter_items(files, layout), dtype)),
        "adapter_model",
        copies=copies,
        contents={"adapter_config.json": adapters.peft_config(files, layout, "llm")},
        note=f"peft adapter around {model}",
    )


def _decoder(folder: Folder, config: ExportConfig, dtype: np.dtype | None) -> list[Output]:
    outputs = _pipeline_folders(folder, dtype)
    part, adapted, own = folder.transformer, folder.part("dit_lora"), folder.own_decoder
    name = "SD3/transformer" if config.layout == "hub" and not own else part.name if part else ""
    if own:
        outputs += _own_pipeline(folder, own, dtype)
    if part:
        items, files = part_items(part), adapters.survey(adapted, folder) if adapted else None
        merged = adapters.merged(items, files, dtype) if files and config.merge_adapters else items
        outputs.append(_plain(part, name, dtype, merged))
        if adapted and files and not config.merge_adapters:
            outputs.append(_decoder_adapter(adapted, files, name, wrapped_class(part), dtype))
    if config.layout == "hub" and not own:
        outputs.append(_pipeline_index(folder, {output.name for output in outputs}))
    return outputs


def wrapped_class(part: Part) -> tuple[str, str]:
    """The class of a transformer in diffusers, and its module."""
    module = component_of(part).module if part.kind == "decoder part" else SD3_MODULE
    return str(published_settings(part)["_class_name"]), module


def _own_pipeline(folder: Folder, pipeline: pathlib.Path, dtype: np.dtype | None) -> list[Output]:
    """The folders of a decoder with its own text encoder, but for its transformer."""
    outputs = [Output(DECODER, copies=tuple(small_files(pipeline)))]
    for part in folder.parts:
        if part.kind == "decoder part" and part.folder.name != "transformer":
            outputs.append(_plain(part, part.name, dtype))
        elif part.kind in ("decoder tokenizer", "decoder scheduler"):
            outputs.append(Output(part.name, copies=tuple(small_files(part.folder))))
    return outputs


def _decoder_adapter(
    part: Part, files: AdapterFiles, base: str, wrapped: tuple[str, str], dtype: np.dtype | None
) -> Output:
    return Output(
        "dit_lora",
        tuple(cast(adapters.adapter_items(files, "transformer"), dtype)),
        "adapter_model",
        copies=tuple(file for file in small_files(part.folder) if not file.name.endswith("config.json")),
        contents={"adapter_config.json": adapters.peft_config(files, "transformer", base, wrapped)},
        note=f"peft adapter around {wrapped[0]}",
    )


def _pipeline_folders(folder: Folder, dtype: np.dtype | None) -> list[Output]:
    """The folders of SD3 except its transformer: known weights in the chosen precision, all others unchanged."""
    root = folder.path / "SD3"
    if not root.is_dir():
        return []
    outputs = [Output("SD3", copies=tuple(small_files(root)))]
    for inner in sorted(
        path
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != "transformer"
    ):
        part = folder.part(f"SD3/{inner.name}")
        if part and part.kind in ("vae", "text encoder"):
            outputs.append(_plain(part, part.name, dtype))
        else:
            outputs.append(
                Output(f"SD3/{inner.name}", copies=tuple(file for file in sorted(inner.iterdir()) if file.is_file()))
            )
    return outputs


def _pipeline_index(folder: Folder, written: set[str]) -> Output:
    """model_index.json of the pipeline, the source's or a new one, without absent components."""
    file = folder.path / "SD3" / "model_index.json"
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    index = json.loads(file.read_text()) if file.is_file() else index
    for name, classes in _PIPELINE.items():
        index[name] = list(index.get(name) or classes) if f"SD3/{name}" in written else [None, None]
    absent = [f"{name}=None" for name, (library, _) in _PIPELINE.items() if library and index[name] == [None, None]]
    opened = f"StableDiffusion3Pipeline.from_pretrained(..., {', '.join(absent)})"
    note = f"without {len(absent)} components, opens as {opened}" if absent else ""
    return Output("SD3", contents={"model_index.json": index}, note=note)
