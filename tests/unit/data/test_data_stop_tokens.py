"""Which tokens end a response: three files may say it, and one function decides."""

import json
from pathlib import Path
from typing import Any, Optional

import pytest
import transformers

from megatron_zero.config import ArchitectureConfig, ModelConfig
from megatron_zero.data.arithmetic import build_character_tokenizer
from megatron_zero.data.stop_tokens import (
    check_responses_can_end,
    describe_stop_tokens,
    stop_token_ids,
)
from megatron_zero.model_files import check_token_ids, complete_hf_config, write_model_files
from megatron_zero.types import Prompt
from tests import tiny

EOS = 1  # of the tokenizer


def write_folder(
    folder: Path, *, config: Any = None, generation: Any = None, tokenizer: Optional[Any] = None
) -> Path:
    """A model's folder; `config` and `generation` are the `eos_token_id` of its two files."""
    folder.mkdir(exist_ok=True)
    settings = tiny.hf_config(tied=True) | {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps(settings))
    if generation is not None:
        settings = {"eos_token_id": generation, "temperature": 0.7}
        (folder / "generation_config.json").write_text(json.dumps(settings))
    (build_character_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, (1,)),
        (1, None, (1,)),
        (7, None, (1, 7)),
        ([7, 1, 8], None, (1, 7, 8)),
        (7, 9, (1, 9)),  # the generation settings are read before the config
        (7, [9, 8], (1, 9, 8)),
        (7, [9, 9, 1], (1, 9)),
        (7, [], (1,)),
        (7, [9, 131, -1], (1, 9)),  # the model has 131 tokens: others are never drawn
    ],
)
@pytest.mark.parametrize("given", ["", "same", "link", "elsewhere", "characters"])
def test_where_the_tokenizer_comes_from_does_not_matter(
    tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...], given: str
) -> None:
    source = write_folder(tmp_path / "model", config=config, generation=generation)
    (tmp_path / "link").symlink_to(source)
    write_folder(tmp_path / "elsewhere")
    places = {"same": source, "link": tmp_path / "link", "elsewhere": tmp_path / "elsewhere"}
    model = ModelConfig(path=str(source), tokenizer=str(places.get(given, given)))
    for init in ("pretrained", "random"):
        model = ModelConfig(path=str(source), tokenizer=model.tokenizer, init=init)
        ids = stop_token_ids(model, build_character_tokenizer(), source)
        assert ids == expected
        # what the run leaves says the same to whoever loads it
        directory = tmp_path / init
        tokenizer = build_character_tokenizer()
        hf_config = complete_hf_config(
            ModelConfig(path=str(source), tokenizer="characters", init=init), tokenizer
        )
        write_model_files(directory, model, hf_config, tokenizer, source, ids)
        exported = ModelConfig(path=str(directory))
        assert set(stop_token_ids(exported, tokenizer, directory)) == set(expected)
        assert read_by_transformers(directory) == set(expected)


def read_by_transformers(directory: Path) -> set[int]:
    try:
        generation = transformers.GenerationConfig.from_pretrained(directory)
    except OSError:  # no such file: it is made from the model's config
        config = transformers.AutoConfig.from_pretrained(directory)
        generation = transformers.GenerationConfig.from_model_config(config)
    value = generation.eos_token_id
    return set(value if isinstance(value, list) else [value])


def test_other_generation_settings_and_a_folder_that_says_it_already_stay(tmp_path: Path) -> None:
    tokenizer = build_character_tokenizer()
    source = write_folder(tmp_path / "model", config=7, generation=[9, 1])
    text = (source / "generation_config.json").read_text()
    model = ModelConfig(path=str(source))
    hf_config = complete_hf_config(model, tokenizer)
    write_model_files(tmp_path / "a", model, hf_config, tokenizer, source, (1, 9))
    assert (tmp_path / "a" / "generation_config.json").read_text() == text
    source = write_folder(tmp_path / "model", config=7, generation=[9])
    write_model_files(tmp_path / "b", model, hf_config, tokenizer, source, (1, 9))
    written = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [9, 1], "temperature": 0.7}


def test_a_model_from_scratch_ends_with_its_tokenizers_eos(tmp_path: Path) -> None:
    tokenizer = build_character_tokenizer()
    model = ModelConfig(init="random", tokenizer="characters", architecture=ArchitectureConfig())
    assert stop_token_ids(model, tokenizer, None) == (EOS,)
    hf_config = complete_hf_config(model, tokenizer)
    write_model_files(tmp_path / "made", model, hf_config, tokenizer, None, (EOS,))
    assert not (tmp_path / "made" / "generation_config.json").exists()
    assert read_by_transformers(tmp_path / "made") == {EOS}


def renamed_tokenizer() -> Any:
    """Where the character tokenizer has token 7, this one has another."""
    data = json.loads(build_character_tokenizer().backend_tokenizer.to_str())
    vocab = data["model"]["vocab"]
    seventh, eighth = (token for token, place in vocab.items() if place in (7, 8))
    vocab[seventh], vocab[eighth] = 8, 7
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(data))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_tokenizer_that_has_another_token_there(tmp_path: Path) -> None:
    """Trained weights would end with what it takes for something else; random ones know nothing."""
    source, tokenizer = write_folder(tmp_path / "model", generation=[1, 7]), renamed_tokenizer()
    random = ModelConfig(path=str(source), tokenizer="other", init="random")
    assert stop_token_ids(random, tokenizer, source) == (1,)
    old, new = (t.convert_ids_to_tokens(7) for t in (build_character_tokenizer(), tokenizer))
    trained = ModelConfig(path=str(source), tokenizer="other")
    with pytest.raises(ValueError) as refused:
        stop_token_ids(trained, tokenizer, source)
    assert str(refused.value) == (
        f"model.tokenizer='other': its token 7 is {new!r}: generation_config.json of "
        f"model.path={str(source)!r} ends responses with it as {old!r}; take the model's own "
        "tokenizer, or correct eos_token_id there"
    )
    # without a tokenizer of its own the model's ids are what its weights draw
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    assert stop_token_ids(trained, tokenizer, source) == (1, 7)
    assert stop_token_ids(random, tokenizer, source) == (1,)


@pytest.mark.parametrize("value", ["</s>", True, [1, "2"], 1.0, {"a": 1}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_token_id_is_refused_by_file(tmp_path: Path, name: str, value: Any) -> None:
    kind = name.removesuffix("_config.json").removesuffix(".json")
    source = write_folder(tmp_path / "model", **{kind: value})
    message = f"{source / name}: eos_token_id={value!r}: must be one or more token ids"
    with pytest.raises(ValueError) as refused:
        stop_token_ids(ModelConfig(path=str(source)), build_character_tokenizer(), source)
    assert str(refused.value) == message


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_generation_settings_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    source = write_folder(tmp_path / "model")
    (source / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        stop_token_ids(ModelConfig(path=str(source)), build_character_tokenizer(), source)


def test_something_must_end_a_response() -> None:
    model = ModelConfig(path="m")
    check_responses_can_end((1,), (), model)
    check_responses_can_end((), ("</answer>",), model)
    with pytest.raises(ValueError, match=r"^model\.path='m': nothing would end a response: neith"):
        check_responses_can_end((), (), model)


def test_chat_models_end_with_the_turn_and_with_the_text(
    tmp_path: Path, qwen_tokenizer_dir: Path
) -> None:
    """Qwen2.5-Instruct: the tokenizer's EOS ends the turn, the generation settings add the text's.

    A base model with the chat model's tokenizer ends with both too.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen_tokenizer_dir)
    tokenizer.eos_token = "<|im_end|>"
    config = tiny.hf_config(tied=True, vocab_size=151936)
    for generation in ([151645, 151643], 151643):
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 151645}))
        settings = {"eos_token_id": generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        for given in ("", str(qwen_tokenizer_dir)):
            model = ModelConfig(path=str(tmp_path), tokenizer=given)
            ids = stop_token_ids(model, tokenizer, tmp_path)
            assert ids == (151645, 151643)
    said = describe_stop_tokens(ids, tokenizer)
    assert said == "<|im_end|> (151645), <|endoftext|> (151643)"
    assert describe_stop_tokens((200000,), tokenizer) == "not in the tokenizer (200000)"


@pytest.mark.parametrize(
    ("tokenizer", "setting"), [("", "model.path='m'"), ("t", "model.tokenizer='t'")]
)
def test_a_prompt_that_the_model_has_no_embedding_of(tokenizer: str, setting: str) -> None:
    """The engine would take it: it looks at the tokenizer's size."""
    prompts = [Prompt(index=0, text="", token_ids=ids, answers=("",)) for ids in ((1, 9), (5,))]
    model = ModelConfig(path="m", tokenizer=tokenizer)
    check_token_ids(model, 10, prompts)
    check_token_ids(model, 10, [])
    with pytest.raises(ValueError) as refused:
        check_token_ids(model, 9, prompts)
    said = f"{setting}: the tokenizer makes token 9 of a prompt, where the model has vocab_size=9"
    assert str(refused.value) == said


def test_ids_with_gaps_count_by_the_largest(tmp_path: Path) -> None:
    """A tokenizer of 99 tokens and a 100th with id 140: the model needs 141 rows."""
    data = json.loads(build_character_tokenizer().backend_tokenizer.to_str())
    data["model"]["vocab"]["far"] = 140
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(data))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    source = write_folder(tmp_path / "model", config=1)
    with pytest.raises(ValueError, match=r"its tokenizer has 141 tokens, .* vocab_size=131$"):
        complete_hf_config(ModelConfig(path=str(source)), tokenizer)
