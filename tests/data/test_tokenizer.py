import json

import numpy as np
import pytest

from uae_jax.data import scene_captions, scenes
from uae_jax.data import tokenizer as tok

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CAPTIONS = ["a small red dog left of a large blue ball on green grass", "Two cats, one hat.", "3 birds (flying)!"]


@pytest.fixture(scope="module")
def scene_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    tok.write_scene_tokenizer(folder, scene_captions.WORDS)
    # The model's config may lie in the same folder; it must not change the tokenizer's class.
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    return tok.load_tokenizer(folder)


@pytest.fixture(scope="module")
def bpe_tokenizer(tmp_path_factory):
    """Byte-level BPE with Qwen's special tokens, and the template in chat_template.json as in the release."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(tok.SPECIAL_TOKENS)
    )
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}))
    return tok.load_tokenizer(folder)


def test_scene_captions_round_trip(scene_tokenizer):
    rng = np.random.default_rng(0)
    for i in range(100):
        text = scene_captions.mixed_caption(scenes.scene_at("train", i), rng)
        ids = tok.encode_caption(scene_tokenizer, text)
        assert len(ids) == len(text.split()) + 1 and ids[-1] == tok.token_id(scene_tokenizer, "<|im_end|>")
        assert tok.decode_caption(scene_tokenizer, ids + [5, 6]) == text
    assert len(scene_tokenizer) == len(scene_captions.WORDS) + len(tok.SPECIAL_TOKENS) + len(tok.ROLES)
    assert tok.encode_caption(scene_tokenizer, "Red circle, square") == tok.encode_caption(
        scene_tokenizer, "red circle , square"
    )
    unknown = tok.token_id(scene_tokenizer, "<|unknown|>")
    assert tok.encode_caption(scene_tokenizer, "red zebra")[1] == unknown


def test_words_that_a_model_does_not_know_are_named(scene_tokenizer, bpe_tokenizer):
    texts = ["Red circle, square", "a red Zebra !", "zebra and Zebra"]
    assert tok.unknown_words(scene_tokenizer, texts) == ["a", "Zebra", "!", "zebra"]
    assert tok.unknown_note(scene_tokenizer, ["red zebra"]) == "the model does not know 1 word: 'zebra'"
    six = tok.unknown_note(scene_tokenizer, ["uno due tre quattro cinque sei"])
    assert six == "the model does not know 6 words: 'uno', 'due', 'tre', 'quattro', 'cinque', ..."
    assert tok.unknown_words(scene_tokenizer, ["half \ud83d of red"]) == ["half"]
    assert not tok.unknown_note(scene_tokenizer, ["red circle"]) and not tok.unknown_note(bpe_tokenizer, texts)


def test_scene_templates_are_a_handful_of_tokens(scene_tokenizer):
    prefix, suffix = tok.condition_template(scene_tokenizer)
    assert scene_tokenizer.convert_ids_to_tokens(prefix) == ["<|im_start|>", "generate"]
    assert scene_tokenizer.convert_ids_to_tokens(suffix) == ["<|im_end|>", "<|im_start|>", "assistant"]
    ids = tok.caption_prompt_ids(scene_tokenizer, scene_captions.CAPTION_PROMPT, [2])
    assert scene_tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>",
        "user",
        "describe",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|image_pad|>",
        "<|vision_end|>",
        "<|im_end|>",
        "<|im_start|>",
        "assistant",
    ]


@pytest.mark.parametrize("name", ["scene_tokenizer", "bpe_tokenizer"])
def test_condition_template_equals_tokenising_the_whole(name, request):
    tokenizer = request.getfixturevalue(name)
    prefix, suffix = tok.condition_template(tokenizer)
    for text in [*CAPTIONS, "gray background , red circle"]:
        turn = {"role": "generate", "content": [{"type": "text", "text": text}]}
        chat = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        whole = tokenizer(chat, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        assert prefix + tok.encode_caption(tokenizer, text)[:-1] + suffix == whole


def test_prompt_has_text_before_images_and_pads_in_order(bpe_tokenizer):
    ids = tok.caption_prompt_ids(bpe_tokenizer, "Describe this image in detail.", [3, 5])
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nDescribe this image in detail."
        + "".join("<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in (3, 5))
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert bpe_tokenizer.decode(ids) == expected


def test_stop_ids_are_found_by_string(scene_tokenizer, bpe_tokenizer):
    for tokenizer in (scene_tokenizer, bpe_tokenizer):
        assert tokenizer.convert_ids_to_tokens(list(tok.stop_ids(tokenizer))) == ["<|im_end|>", "<|endoftext|>"]
    with pytest.raises(ValueError, match="zebra"):
        tok.token_id(scene_tokenizer, "zebra")


def test_missing_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tok.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        tok.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        tok.load_tokenizer(tmp_path)


def test_folder_without_template_is_refused(tmp_path):
    tok.write_scene_tokenizer(tmp_path, scene_captions.WORDS)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no chat template"):
        tok.load_tokenizer(tmp_path)
