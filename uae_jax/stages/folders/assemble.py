"""Builds an official folder from the published folders of the single models."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from uae_jax.data.qwen_inputs import load_image_processor
from uae_jax.files.json_files import read_json, write_json
from uae_jax.files.paths import to_path
from uae_jax.hf.hub import local_folder
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import TensorFolder, dtype_name, write_tensors
from uae_jax.models.decoders import FAMILIES
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.stages.decoders import FOLDER as DECODER
from uae_jax.stages.folders.check import Row, check_folder
from uae_jax.stages.folders.files import check_target, copy_file, replaced, small_files, used_files
from uae_jax.stages.folders.parts import (
    ENCODERS,
    KINDS,
    NEW_PROJECTOR,
    Folder,
    Part,
    find_parts,
    has_tokenizer,
    identify,
    part_config,
    projector_sizes,
)

PROJECTOR_FACTOR = 4  # inner width over the language model's, as in the release: 2048, 8192, 4096
# of the captioner's images, as in the release's demo.py; Qwen2.5-VL publishes 12,845,056
MAX_PIXELS = 65536
_COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "scheduler")
_WITHOUT_WEIGHTS = ("scheduler", "decoder scheduler", "decoder tokenizer")
_MODEL_FILES = ("config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class Sources:
    """Folders of the published models.

    Attributes:
      llm: Qwen2.5-VL, with or without UAE's projector.
      sd3: an SD3 or SD3.5 pipeline folder, or empty with a `decoder`.
      decoder: a pipeline folder of a decoder with a text encoder of its own (`models.decoders`), in place of `sd3`.
      llm_processor: tokenizer and image processor; empty if they are in `llm`.
      projector: UAE's projector, written by `export --layout hub`.
      dit: a transformer in place of the pipeline's.
      llm_lora, dit_lora: adapters.
      llm_reference: the captioner before full fine-tuning of `llm`, written by `export`.
      clip, longclip, dinov2, dinov3: image encoders; `longclip` may be the published file.
    """

    llm: str
    sd3: str = ""
    decoder: str = ""
    llm_processor: str = ""
    projector: str = ""
    dit: str = ""
    llm_lora: str = ""
    dit_lora: str = ""
    llm_reference: str = ""
    clip: str = ""
    longclip: str = ""
    dinov2: str = ""
    dinov3: str = ""


def import_folder(
    sources: Sources,
    out: str | pathlib.Path,
    *,
    seed: int = 0,
    link: bool = False,
    overwrite: bool = False,
    fast: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[Row], list[str]]:
    """Builds an official folder at `out`, after a check of every part and of their fit.

    Args:
      sources: the folders.
      out: a new or empty folder.
      seed: of a new projector, created if the sources have none.
      link: hard links instead of copies.
      overwrite: replace a model folder at `out`.
      fast: check the headers only, not the numbers.
      progress: called with the bytes of each checked tensor.

    Returns:
      The rows of the check, and one sentence for each choice.

    Raises:
      FileNotFoundError, ValueError: a part is absent, of another model, broken, or does not fit; nothing is written.
    """
    folder = gather(sources)
    read = [to_path(path) for path in dataclasses.asdict(sources).values() if path]
    check_target(to_path(out).absolute(), overwrite=overwrite, sources=read)
    rows = check_folder(folder, fast=fast, progress=progress)
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        more = f" (and more, {len(problems)} problems in all; see `convert check`)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")
    with replaced(out, overwrite=overwrite, sources=read) as fresh:
        notes = _build(folder, sources, fresh, seed, link)
    return rows, notes


def gather(sources: Sources) -> Folder:
    """The parts in their source folders, under their names in the official folder.

    Raises:
      FileNotFoundError, ValueError: a folder is absent, or holds another model.
    """
    if bool(sources.sd3) == bool(sources.decoder):
        raise ValueError(
            "give one of --sd3, whose context the captioner makes, and --decoder, which has a text encoder of its own"
        )
    parts = {"llm": _expect("llm", sources.llm)}
    parts |= {
        name: _expect(name, getattr(sources, name))
        for name in ("projector", "llm_lora", "dit_lora", "llm_reference", "dit", *ENCODERS)
        if getattr(sources, name)
    }
    parts |= _own_decoder(sources) if sources.decoder else _sd3(sources)
    processor = local_folder(sources.llm_processor or sources.llm)
    if not has_tokenizer(processor):
        raise FileNotFoundError(
            f"{processor} has neither tokenizer_config.json nor tokenizer.json; give the folder of tokenizer and image "
            "processor with --llm_processor"
        )
    parts["llm_processor"] = Part("llm_processor", processor)
    return Folder(to_path(sources.llm).parent, "sources", tuple(parts[name] for name in KINDS if name in parts))


def _own_decoder(sources: Sources) -> dict[str, Part]:
    """The parts of a decoder with a text encoder of its own."""
    for name in ("dit", "projector"):
        if getattr(sources, name):
            raise ValueError(f"--{name} {getattr(sources, name)} goes with --sd3; a --decoder has no such part")
    pipeline = find_parts(sources.decoder)
    if pipeline.layout != "pipeline" or pipeline.own_decoder is None:
        raise ValueError(f"--decoder {sources.decoder} is no pipeline folder of {', '.join(FAMILIES)}")
    for name in (name for name in KINDS if name.startswith("decoder/")):
        if pipeline.part(name) is None:
            inner = name.removeprefix("decoder/")
            raise FileNotFoundError(
                f"--decoder {sources.decoder} has no {inner} folder; download the complete pipeline"
            )
    return {part.name: part for part in pipeline.parts}


def _sd3(sources: Sources) -> dict[str, Part]:
    """The parts of an SD3 pipeline, whose text encoders make the pooled embedding alone."""
    pipeline, parts = find_parts(sources.sd3), {}
    if pipeline.layout != "pipeline" or pipeline.own_decoder:
        raise ValueError(
            f"--sd3 {sources.sd3} is no SD3 pipeline folder; give one with vae, scheduler, text_encoder and "
            "text_encoder_2"
        )
    for name in _COMPONENTS:
        part = pipeline.part(f"SD3/{name}")
        if part is None:
            raise FileNotFoundError(f"--sd3 {sources.sd3} has no {name} folder; download the complete pipeline")
        parts[part.name] = part
    if not sources.dit:
        own = pipeline.part("SD3/transformer")
        if own is None:
            raise FileNotFoundError(
                f"--sd3 {sources.sd3} has no transformer folder; download it too, or give a transformer with --dit"
            )
        parts["dit"] = Part("dit", own.folder)
    return parts


def _expect(name: str, path: str) -> Part:
    """A part, if its folder holds that kind of model."""
    folder = local_folder(path)
    if not (folder.is_dir() or name == "longclip" and folder.is_file()):
        raise FileNotFoundError(f"--{name} {folder} {'does not exist' if not folder.exists() else 'is not a folder'}")
    found = identify(folder)
    same = {"longclip": "clip", "llm_reference": "llm"}.get(name, name)
    if found not in (name, same):
        raise ValueError(
            f"--{name} {folder} holds {f'the part {found}' if found else 'no model that is known'}, not {name}; give "
            "the folder of that model"
        )
    return Part(name, folder)


def _build(folder: Folder, sources: Sources, fresh: pathlib.Path, seed: int, link: bool) -> list[str]:
    notes: list[str] = []
    for part in folder.parts:
        if part.kind not in ("processor", "projector"):
            for file in small_files(part.folder) if part.kind in _WITHOUT_WEIGHTS else used_files(part):
                copy_file(file, fresh / part.name, link=link)
    for file in small_files(folder.existing("llm_processor").folder):
        if file.name not in _MODEL_FILES and not file.name.lower().startswith(("readme", "licen")):
            copy_file(file, fresh / "llm_processor", link=link)
    if sources.decoder:
        for file in small_files(local_folder(sources.decoder)):
            copy_file(file, fresh / DECODER, link=link)
        notes.append(f"the decoder is {folder.own_decoder}; it needs no projector, no align and no pretrain")
    else:
        notes += _add_sd3(folder, sources, fresh, seed, link)
    notes += _bound_images(fresh)
    if not any(folder.part(name) for name in ENCODERS):
        notes.append("no image encoder was given: inference works, training needs --clip for its reward")
    return notes


def _add_sd3(folder: Folder, sources: Sources, fresh: pathlib.Path, seed: int, link: bool) -> list[str]:
    """What an SD3 pipeline has beside its weights, and the projector."""
    notes, root = [], local_folder(sources.sd3)
    for file in small_files(root):
        if file.name != "model_index.json":
            copy_file(file, fresh / "SD3", link=link)
    for inner in ("tokenizer", "tokenizer_2"):
        if (root / inner).is_dir():
            for file in small_files(root / inner):
                copy_file(file, fresh / "SD3" / inner, link=link)
    if (root / "text_encoder_3").is_dir():
        notes.append("text_encoder_3 (T5) is left out: the captioner takes its place")
    if not sources.dit:
        notes.append(f"dit is the pipeline's own transformer, {folder.existing('dit').folder}")
    return notes + _add_projector(folder, fresh, seed)


def _bound_images(fresh: pathlib.Path) -> list[str]:
    """Lowers `max_pixels` of the image processor to the release's, in every copy of its settings."""
    before = load_image_processor(fresh / "llm_processor", 1 << 20).max_pixels
    if before <= MAX_PIXELS:
        return []
    # llm has a copy if captioner and processor were published in one folder
    for name in ("llm_processor", "llm"):
        for file in ("preprocessor_config.json", "processor_config.json"):
            path = fresh / name / file
            if not path.exists():
                continue
            whole = read_json(path.parent, path.name)
            settings = whole if file.startswith("pre") else whole.get("image_processor") or {}
            if not settings:
                continue  # an older file, of the processor as a whole
            if settings.get("size"):
                settings["size"] |= {"longest_edge": MAX_PIXELS}
            settings["max_pixels"] = MAX_PIXELS
            write_json(path, whole)  # a new file: a hard link must not change the source
    return [
        f"max_pixels of the image processor is lowered from {before} to the release's {MAX_PIXELS} (docs/weights.md)"
    ]


def _add_projector(folder: Folder, fresh: pathlib.Path, seed: int) -> list[str]:
    """Adds the given projector, or a new one, to a captioner's folder without projector."""
    part, own = folder.existing("llm"), folder.part("projector")
    stored = TensorFolder(part.folder)
    if projector_sizes(stored):
        return [f"the projector of {part.folder} is kept"] + ([f"{own.folder} is not used"] if own else [])
    width, features = part_config(part).text.width, part_config(folder.existing("dit")).joint_attention_dim
    if own:
        given = TensorFolder(own.folder)
        tensors = {name: given.read(name) for name in sorted(given.names())}
        note = f"the projector is that of {own.folder}"
    else:
        hidden = PROJECTOR_FACTOR * width
        params = qwen.init_projector(jax.random.key(seed), width, hidden, features)
        dtype = np.dtype(dtype_name(stored.dtype(next(iter(sorted(stored.names()))))))
        tensors = dict(published_tensors({"projector": params}, qwen_weights.projector_rules(), dtype))
        note = (
            f"{part.folder} has no projector: a new projector of {width} -> {hidden} -> {features} was made from seed "
            f"{seed} ({dtype.name}); its weights are random: a run that pretrains begins with the stage align"
        )
        write_json(fresh / "llm" / NEW_PROJECTOR, {"seed": seed})
    file = write_tensors(fresh / "llm", tensors, stem="projector")[0]
    for index in (fresh / "llm").glob("*.safetensors.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] |= {name: file.name for name in tensors}
        metadata = content.setdefault("metadata", {})
        metadata["total_size"] = metadata.get("total_size", 0) + sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, content)  # a new file: a hard link must not change the source
    return [note]
