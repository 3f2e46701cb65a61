"""One target a reader: it reads a changed input as the commands do, and may end with an error of one line alone."""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz import corpus
from benchmarks.fuzz.mutations import ODD_NUMBERS, ODD_TEXTS, changed_bytes, changed_json, json_bytes
from uae_jax.config_file import apply_overrides, load_config
from uae_jax.data.folder import open_folder
from uae_jax.data.formats.tf_example import bytes_features
from uae_jax.data.images import decode_image, square_image
from uae_jax.data.qwen_inputs import ImageProcessor, load_image_processor
from uae_jax.data.tokenizer import caption_prompt_ids, encode_caption, load_tokenizer
from uae_jax.diffusion.schedule import ScheduleConfig
from uae_jax.evaluation.judge import _verdicts
from uae_jax.evaluation.judge_protocols import PROTOCOLS
from uae_jax.evaluation.judging import Question
from uae_jax.evaluation.pairs import image_files, read_captions
from uae_jax.hf.adapters import adapter_table, survey_adapter
from uae_jax.hf.inventory import cut_short
from uae_jax.hf.rules import Rule
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.models.qwen2_5_vl import config as qwen
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.settings import Mistakes, read
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import BUILTIN


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
      name: of the target.
      inputs: hypothesis' strategy of its inputs.
      run: reads an input; the folder is its own, and files of the last input may be in it.
    """

    name: str
    inputs: st.SearchStrategy
    run: Callable[[Any, pathlib.Path], None]


def finding(target: Target, value: Any, folder: pathlib.Path) -> str:
    """What is wrong with how a reader ends: empty for a result and for an error of one line."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(open(os.devnull, "w")):
            warnings.simplefilter("ignore")
            target.run(value, folder)
    except Mistakes as error:
        return "" if all(line and "\n" not in line for line in error.lines) else f"Mistakes: {error}"
    except (ValueError, OSError) as error:
        text = str(error)
        return "" if text.strip() and "\n" not in text.strip() else f"{type(error).__name__} of no line or many: {text}"
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f"{pathlib.Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:120]}"
    return ""


def _image(data: bytes, folder: pathlib.Path) -> None:
    image = decode_image(data, "a.png")
    square_image(image, 32)
    ImageProcessor(patch_size=4, min_pixels=64, max_pixels=1024, window_size=16)(image)


def _tensors(data: bytes, folder: pathlib.Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    cut_short(folder)
    stored = TensorFolder(folder)
    for name in stored.names():
        stored.read(name)


def _with_header(document: Any) -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 64


def _index(data: bytes, folder: pathlib.Path) -> None:
    if not list(folder.glob("*.safetensors")):
        write_tensors(folder, {name: corpus.np.ones(8, corpus.np.float32) for name in "abc"}, max_shard_bytes=40)
    (folder / "model.safetensors.index.json").write_bytes(data)
    TensorFolder(folder).names()


def _adapter(data: bytes, folder: pathlib.Path) -> None:
    rules = [Rule("layers/query/kernel", "model.layers.{}.q_proj.weight", "dense", (0, 1))]
    if not list(folder.glob("*.safetensors")):
        names = [
            f"base_model.model.model.layers.{layer}.q_proj.lora_{side}.weight" for layer in (0, 1) for side in "AB"
        ]
        shapes = {"A": (2, 4), "B": (4, 2)}
        tensors = {name: corpus.np.ones(shapes[name[-8]], corpus.np.float32) for name in names}
        write_tensors(folder, tensors, stem="adapter_model")
    (folder / "adapter_config.json").write_bytes(data)
    import jax

    abstract = {"layers": {"query": {"kernel": jax.ShapeDtypeStruct((2, 4, 4), corpus.np.float32)}}}
    files = survey_adapter(TensorFolder(folder), rules, abstract, aliases=((r"^base_model\.model\.", ""),))
    if not files.problems:
        adapter_table(files)


CONFIGS: dict[str, tuple[str, Callable[[pathlib.Path], Any]]] = {
    "llm": ("config.json", qwen.from_folder),
    "dit": ("config.json", TransformerConfig.from_folder),
    "SD3/vae": ("config.json", VAEConfig.from_folder),
    "SD3/scheduler": ("scheduler_config.json", ScheduleConfig.from_folder),
    "SD3/text_encoder": ("config.json", CLIPTextConfig.from_folder),
    "clip": ("config.json", CLIPConfig.from_folder),
    "dinov2": ("config.json", Dinov2Config.from_folder),
    "llm_processor": ("preprocessor_config.json", lambda folder: load_image_processor(folder, 16)),
    "clip_images": ("preprocessor_config.json", Preprocess.from_folder),
}


def _config(given: tuple[str, bytes], folder: pathlib.Path) -> None:
    part, data = given
    name, reader = CONFIGS[part]
    (folder / name).write_bytes(data)
    reader(folder)


def _read_folder(folder: pathlib.Path) -> None:
    source = open_folder(folder).source
    for index in range(len(source)):
        source[index]


def _pictures(folder: pathlib.Path) -> None:
    (folder / "b").mkdir(exist_ok=True)
    for name in ("a.png", "b/a.png"):
        if not (folder / name).is_file():
            (folder / name).write_bytes(corpus.picture(transparency=(len(name), 0, 0)))


def _caption_lines(data: bytes, folder: pathlib.Path) -> None:
    _pictures(folder)
    (folder / "captions.jsonl").write_bytes(data)
    with contextlib.suppress(ValueError, OSError):
        image_files(folder, read_captions(folder / "captions.jsonl"))
    read_captions(folder / "captions.jsonl")
    _read_folder(folder)


def _caption_file(name: str) -> Callable[[bytes, pathlib.Path], None]:
    def run(data: bytes, folder: pathlib.Path) -> None:
        if name in ("a.txt", "coco.json"):
            _pictures(folder)
            (folder / "b" / "a.png").unlink(missing_ok=True)
        (folder / name).write_bytes(data)
        _read_folder(folder)

    return run


QUESTIONS = [Question(name, order, f"which? {name}") for name in "ab" for order in ("ab", "ba")]
ANSWER = {"image_id": "a", "order": "ab", "answer": '{"detail": "A", "overall": "tie"}', "judge": "m"}


def _answers(data: bytes, folder: pathlib.Path) -> None:
    (folder / "answers.jsonl").write_bytes(data)
    options = argparse.Namespace(answers=folder / "answers.jsonl", endpoint=None, model="m")
    for protocol in PROTOCOLS.values():
        _verdicts(options, protocol.from_file(), QUESTIONS)


def _override(pairs: list[tuple[str, str]], folder: pathlib.Path) -> None:
    config, mistakes = apply_overrides(_base_config(), pairs)
    mistakes += read(RunConfig, config)[1]
    if any("\n" in line or not line for line in mistakes):
        raise AssertionError(f"a mistake is not one line: {mistakes}")


_CACHE: dict[str, Any] = {}


def _base_config() -> dict[str, Any]:
    if "config" not in _CACHE:
        _CACHE["config"] = load_config("configs/unified_grpo.py:tiny").to_dict()
    return _CACHE["config"]


def _fields(config: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for name, value in config.items():
        found += [before + name] + (_fields(value, f"{before}{name}.") if isinstance(value, dict) else [])
    return found


def _text(text: str, folder: pathlib.Path) -> None:
    if "tokenizer" not in _CACHE:
        _CACHE["tokenizer"] = load_tokenizer(BUILTIN / "llm_processor")
    encode_caption(_CACHE["tokenizer"], text)
    caption_prompt_ids(_CACHE["tokenizer"], text, [2], system=text)


def _lines(documents: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    line = st.one_of(json_bytes(documents), st.sampled_from(documents).map(lambda value: json.dumps(value).encode()))
    return st.lists(line, min_size=1, max_size=3).map(b"\n".join)


def make_targets() -> dict[str, Target]:
    """All targets by name."""
    headers = [corpus.header(data) for data in corpus.tensors()]
    index = {"metadata": {}, "weight_map": {n: f"model-0000{k}-of-00003.safetensors" for k, n in enumerate("abc", 1)}}
    texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=20), st.sampled_from(ODD_NUMBERS).map(str))
    config_inputs = [st.tuples(st.just(part), json_bytes(found)) for part, found in corpus.configs().items()]
    fields = st.one_of(st.sampled_from(_fields(_base_config())), st.text(max_size=8))
    listed = [
        Target("images", changed_bytes(corpus.images(), first=64), _image),
        Target("safetensors", changed_bytes(corpus.tensors(), first=200), _tensors),
        Target("safetensors headers", changed_json(headers).map(_with_header), _tensors),
        Target("indexes", json_bytes([index]), _index),
        Target("adapter configs", json_bytes(corpus.adapters()), _adapter),
        Target("model configs", st.one_of(config_inputs), _config),
        Target("captions.jsonl", _lines(corpus.CAPTIONS), _caption_lines),
        Target(
            "captions beside images", st.one_of(st.binary(max_size=40), texts.map(_encoded)), _caption_file("a.txt")
        ),
        Target("COCO captions", json_bytes([corpus.COCO]), _caption_file("coco.json")),
        Target("parquet", changed_bytes([corpus.parquet_file()]), _caption_file("a.parquet")),
        Target("webdataset", changed_bytes([corpus.tar_file()], first=2048), _caption_file("a.tar")),
        Target("tf.train.Example", changed_bytes([corpus.example_message()], first=64), _message),
        Target("judge answers", _lines([ANSWER]), _answers),
        Target("judge texts", st.one_of(texts, json_bytes([{"detail": "A", "overall": "tie"}])), _verdict),
        Target("config overrides", st.lists(st.tuples(fields, texts), min_size=1, max_size=3), _override),
        Target("texts", texts, _text),
    ]
    return {target.name: target for target in listed}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _message(data: bytes, folder: pathlib.Path) -> None:
    bytes_features(data)


def _verdict(text: str | bytes, folder: pathlib.Path) -> None:
    said = text if isinstance(text, str) else text.decode("utf-8", "replace")
    for protocol in PROTOCOLS.values():
        protocol.from_file().parse(said)
