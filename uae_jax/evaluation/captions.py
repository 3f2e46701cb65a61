"""Scores captions: facts of the built-in scenes; length, variety, repetition and CLIP similarity of any data set.

    python -m uae_jax.evaluate captions --scenes=200 --checkpoint=runs/tiny --out=said --output=facts.json
    python -m uae_jax.evaluate captions --data=folder --clip=clip-vit-large-patch14 --output=captions.json
    python -m uae_jax.evaluate captions --captions=bench/captions.jsonl --images=originals --clip=DIR \\
        --output=captions.json

With --scenes the model captions held-out built-in scenes. By attribute, recall is the share of facts that a caption
says, and precision the share of its claims that are true. --data is a folder of images with captions.jsonl, lines
{"image" or "file_name": ..., "caption": text or list}; --captions and --images name file and folder. --clip adds the
similarity of caption and image. CLIP truncates captions to 77 tokens, --longclip to 248.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from uae_jax.command_line import in_range
from uae_jax.files.json_files import write_json
from uae_jax.files.paths import to_path
from uae_jax.model_flags import add_model_flags, load_model

if TYPE_CHECKING:
    from uae_jax.evaluation.pairs import Captioned

SCORE_SCALE = 2.5  # CLIPScore of a cosine: arXiv 2104.08718, section 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    scenes = parser.add_argument_group("built-in scenes")
    scenes.add_argument("--scenes", default=0, metavar="N", help="number of held-out scenes", **in_range(int, low=0))
    scenes.add_argument(
        "--out",
        type=to_path,
        metavar="DIR",
        help="folder of the model's captions; an interrupted run continues",
    )
    add_model_flags(parser)
    data = parser.add_argument_group("any captioned data")
    data.add_argument("--data", metavar="DIR", help="folder with captions.jsonl and images")
    data.add_argument("--captions", metavar="FILE", help="captions, without --data")
    data.add_argument("--images", metavar="DIR", help="images of --captions; --clip needs them")
    data.add_argument("--clip", metavar="DIR", help="CLIP with its tokenizer, as openai/clip-vit-large-patch14")
    data.add_argument(
        "--longclip", metavar="FILE", help="Long-CLIP, which replaces the weights of --clip, for long captions"
    )
    data.add_argument(
        "--encoder_batch_size",
        **in_range(int, low=1),
        default=16,
        metavar="N",
        help="pairs in one call of CLIP",
    )
    parser.add_argument("--output", type=to_path, required=True, metavar="FILE", help="the result, JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Scores captions and writes the result.

    Raises:
      ValueError: conflicting flags or unreadable files; or, after the result is written, unreadable images.
      FileNotFoundError: a file is missing.
    """
    if bool(options.scenes) == bool(options.data or options.captions) or options.data and options.captions:
        raise ValueError("give --scenes, or --data, or --captions")
    if options.longclip and not options.clip:
        raise ValueError("--longclip needs --clip for the tokenizer")
    result = _scene_result(options) if options.scenes else _data_result(options)
    write_json(options.output, result)
    _print(result)
    print(f"result: {options.output}")
    errors = result.get("errors", [])
    if errors:
        raise ValueError(
            f"{len(errors)} images could not be scored, the first: {errors[0]['image']}: {errors[0]['error']}; all "
            f"are listed in {options.output}"
        )


def _scene_result(options: argparse.Namespace) -> dict[str, Any]:
    from uae_jax.data.scenes import draw, scene_at
    from uae_jax.evaluation.caption_scores import facts_summary, text_statistics

    if not options.out:
        raise ValueError("--scenes needs --out, the folder of the model's captions")
    scenes = [scene_at("test", index) for index in range(options.scenes)]
    names = [f"scene_{index:05d}" for index in range(options.scenes)]
    captions = _scene_captions(options, names, [draw(scene) for scene in scenes])
    return {
        "n": len(scenes),
        "facts": facts_summary(scenes, captions),
        "text": text_statistics(captions),
        "captions": dict(zip(names, captions)),
    }


def _scene_captions(options: argparse.Namespace, names: Sequence[str], images: Sequence) -> list[str]:
    """The model's captions, in order; captions that are in --out already are kept."""
    from uae_jax.evaluation.drawing import CAPTIONS, sample_number
    from uae_jax.evaluation.records import RecordLog
    from uae_jax.evaluation.run_settings import ANSWERING, begin, model_settings

    model = load_model(options, len(names))
    begin(options.out / CAPTIONS, {"data": "scenes", **model_settings(options, model, (*ANSWERING, "prompt"))})
    with RecordLog(options.out / CAPTIONS) as log:
        known = {record["image_id"]: record["caption"] for record in log.records}
        missing = [index for index, name in enumerate(names) if name not in known]
        written = model.each_caption(
            [images[index] for index in missing], sample_ids=[sample_number(names[index]) for index in missing]
        )
        for number, caption in tqdm(
            written, total=len(names), initial=len(names) - len(missing), desc="caption", disable=None
        ):
            name = names[missing[number]]
            known[name] = caption
            log.append({"image_id": name, "caption": caption})
    return [known[name] for name in names]


def _data_result(options: argparse.Namespace) -> dict[str, Any]:
    from uae_jax.evaluation.caption_scores import text_statistics
    from uae_jax.evaluation.pairs import read_captions

    file = to_path(options.captions or to_path(options.data) / "captions.jsonl")
    captions = read_captions(file)
    result: dict[str, Any] = {
        "n": len(captions),
        "captions_file": str(file),
        "text": text_statistics([captioned.caption for captioned in captions.values()]),
    }
    folder = options.images or options.data
    if options.clip and not folder:
        raise ValueError("--clip compares captions with images; give --images")
    return result | (_clip_result(options, captions, folder) if options.clip else {})


def _clip_result(options: argparse.Namespace, captions: "Mapping[str, Captioned]", folder: str) -> dict[str, Any]:
    """Mean cosine and CLIPScore, the cosine of every image, and the images that cannot be scored."""
    from uae_jax.evaluation.encoders import caption_cosines, open_text_scorer
    from uae_jax.evaluation.pairs import image_files
    from uae_jax.training.summary import interval

    files = image_files(folder, captions)
    scorer = open_text_scorer(options.clip, options.longclip)
    scores: dict[str, float | None] = dict.fromkeys(captions)
    errors, cut = [], 0
    texts = [captioned.caption for captioned in captions.values()]
    results = caption_cosines(scorer, list(files.values()), texts, options.encoder_batch_size)
    for (name, path), (score, was_cut) in zip(
        files.items(), tqdm(results, total=len(files), desc="clip", disable=None)
    ):
        cut += was_cut
        if isinstance(score, str):
            errors.append({"image": str(path), "error": score})
        else:
            scores[name] = score
    valid = [score for score in scores.values() if score is not None]
    means = (
        {"cosine": interval(valid), "clip_score": interval([SCORE_SCALE * max(score, 0.0) for score in valid])}
        if valid
        else {}
    )
    return {
        "clip": {
            "model": scorer.encoder.name,
            "n_valid": len(valid),
            "captions_cut": cut,
            "tokens": scorer.positions,
            **means,
            "scores": scores,
        },
        "errors": errors,
    }


def _print(result: dict[str, Any]) -> None:
    def show(name: str, entry: dict[str, Any] | None) -> None:
        if entry:
            print(f"{name:24} {entry['value']:.4f}  [{entry['low']:.4f}, {entry['high']:.4f}]")

    for name in ("fact_recall", "fact_precision"):
        show(name, result.get("facts", {}).get(name))
    for attribute, entry in result.get("facts", {}).get("attributes", {}).items():
        show(f"  {attribute} recall", entry["recall"])
        show(f"  {attribute} precision", entry["precision"])
    text = result["text"]
    show("words", text["words"])
    print(f"{'distinct 1, 2, 3':24} {text['distinct_1']:.4f}, {text['distinct_2']:.4f}, {text['distinct_3']:.4f}")
    show("repetition", text["repetition"])
    for name in ("cosine", "clip_score"):
        show(f"clip {name}", result.get("clip", {}).get(name))
