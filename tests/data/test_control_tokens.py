"""Names of control tokens in texts are text; as in the release on demand."""

import shutil

import pytest

from uae_jax import api
from uae_jax.data import tokenizer as tok
from uae_jax.model_flags import add_model_flags
from uae_jax.stages.weights import BUILTIN

NAMES = ("<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Byte-level BPE with Qwen's control tokens and the built-in template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    place = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a red circle"], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tok.SPECIAL_TOKENS])
    tokenizer.save(str(place / "tokenizer.json"))
    shutil.copy(BUILTIN / "llm_processor" / "tokenizer_config.json", place)
    return place


@pytest.fixture(scope="module")
def plain(folder):
    return tok.load_tokenizer(folder)


@pytest.fixture(scope="module")
def released(folder):
    return tok.load_tokenizer(folder, control_tokens=True)


def controls(tokenizer, ids):
    known = {tok.token_id(tokenizer, name) for name in tok.SPECIAL_TOKENS}
    return [tokenizer.convert_ids_to_tokens(index) for index in ids if index in known]


@pytest.mark.parametrize("name", NAMES)
def test_a_caption_with_such_a_name_is_text(plain, released, name):
    ids = tok.encode_caption(plain, f"a sign says {name} in red")
    assert controls(plain, ids) == ["<|im_end|>"] and ids[-1] == tok.token_id(plain, "<|im_end|>")
    assert plain.decode(ids[:-1]) == f"a sign says {name} in red"
    assert name in controls(released, tok.encode_caption(released, f"a sign says {name} in red")[:-1])


@pytest.mark.parametrize("where", ["prompt", "system"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_or_question_with_such_a_name_is_text(plain, name, where):
    texts = {"prompt": "what is this", "system": "answer"}
    ids = tok.caption_prompt_ids(plain, texts["prompt"], [2, 1], system=texts["system"])
    texts[where] += f" {name}!"
    changed = tok.caption_prompt_ids(plain, texts["prompt"], [2, 1], system=texts["system"], images_first=True)
    assert controls(plain, changed).count("<|image_pad|>") == 3
    assert sorted(controls(plain, changed)) == sorted(controls(plain, ids))
    assert f"{texts['prompt']}<|im_end|>" in plain.decode(changed)
    assert texts["system"] in plain.decode(changed)


def test_texts_without_such_names_are_encoded_as_in_the_release(plain, released):
    for text in ("a red circle", "what is < | > this?\n\n  so"):
        assert tok.encode_caption(plain, text) == tok.encode_caption(released, text)
        ours = tok.caption_prompt_ids(plain, text, [3], system="be kind")
        assert ours == tok.caption_prompt_ids(released, text, [3], system="be kind")
    assert tok.condition_template(plain) == tok.condition_template(released)


def test_the_releases_behaviour_on_demand(released):
    ids = tok.caption_prompt_ids(released, "say <|im_end|> now", [1])
    assert controls(released, ids).count("<|im_end|>") == 2
    with pytest.raises(ValueError, match="must not contain <|image_pad|>"):
        tok.caption_prompt_ids(released, "say <|image_pad|> now", [1])


def test_half_of_a_character_is_one_line(plain):
    with pytest.raises(ValueError, match=r"the text 'red \\ud83d' holds half of a character") as stop:
        tok.encode_caption(plain, "red \ud83d")
    assert "\n" not in str(stop.value)


def test_the_setting_reaches_the_model_and_its_texts():
    import argparse

    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    assert parser.parse_args(["--control_tokens"]).control_tokens is True
    assert parser.parse_args([]).control_tokens is None
    text = "gray background <|im_end|> red circle"
    ids = {}
    for mode in (False, True):
        model = api.load("", control_tokens=mode, negative_prompt="red <|im_end|>")
        end = tok.token_id(model.engine.system.tokenizer, "<|im_end|>")
        ids[mode] = list(model.engine.text_fields(text)["caption_ids"]).count(end)
        assert (end in model.engine.system.model.template.negative) == mode
    assert ids == {False: 1, True: 2}
