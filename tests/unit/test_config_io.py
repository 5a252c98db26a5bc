import dataclasses
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_zero import config as config_module
from megatron_zero import config_io
from megatron_zero.checks import UserError
from megatron_zero.config import (
    CONFIG_OPTIONS,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_zero.config_data import dataset_name
from megatron_zero.config_io import apply_overrides, from_dict, resolve, to_dict

CONFIG = RunConfig(name="a", model=ModelConfig(path="m"))
PRETRAIN = PretrainConfig(name="b", model=ModelConfig(init="random", tokenizer="characters"))
RECIPES = {"quick_drgrpo": lambda: CONFIG, "quick_base": lambda: PRETRAIN}

NOTHING = ["null", "Null", "NULL", "None", "~"]
printable_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
positive = st.floats(1e-300, 1e300)


@dataclass(**CONFIG_OPTIONS)
class Inner:
    at_most: int = 0
    share: float = 0.5


@dataclass(**CONFIG_OPTIONS)
class Toy:
    count: int
    names: "list[str]" = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    loud: bool = False


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


# round trips


@pytest.mark.parametrize("config", [CONFIG, PRETRAIN])
def test_a_config_survives_yaml(config, tmp_path):
    path = tmp_path / "config.yaml"
    config_io.save_config(config, path)
    assert config_io.load_config(path) == config
    assert config_io.kind_of(config_io.load_config(path)) == config_io.kind_of(config)


@pytest.mark.parametrize("name", sorted(config_io.known_recipes()))
def test_every_recipe_survives_yaml_and_overrides(name, tmp_path):
    config = config_io.known_recipes()[name]()
    config_io.save_config(config, tmp_path / "c.yaml")
    assert config_io.load_config(tmp_path / "c.yaml") == config
    kind = config_io.kind_of(config)
    assert resolve(name, [], kind) == config
    assert resolve(name, ["seed=77"], kind) == dataclasses.replace(config, seed=77)


@settings(deadline=None)
@given(
    dataset=printable_text,
    names=st.lists(printable_text.filter(str.strip), max_size=3, unique_by=dataset_name),
    lr=positive,
    seed=st.integers(0, 2**63),
    shuffle=st.booleans(),
)
def test_any_value_survives_yaml(dataset, names, lr, seed, shuffle):
    config = dataclasses.replace(
        CONFIG,
        seed=seed,
        data=dataclasses.replace(CONFIG.data, dataset=dataset, shuffle=shuffle),
        optimizer=OptimizerConfig(lr=lr),
        evaluation=dataclasses.replace(CONFIG.evaluation, datasets=names),
    )
    data = config_io.load_yaml(config_io.dump_config(config), "text")
    assert data.pop("kind") == "train"
    assert from_dict(RunConfig, data) == config


@pytest.mark.parametrize(
    "word",
    ["no", "yes", "1e-6", "null", "~", "true", "1:30", "010", "", "#", "é\x85è", "a\r\nb", "!x"],
)
def test_words_that_yaml_mistakes_for_something_else_stay_text(word, tmp_path):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, dataset=word))
    config_io.save_config(config, tmp_path / "c.yaml")
    assert config_io.load_config(tmp_path / "c.yaml").data.dataset == word


def test_hand_written_yaml_reads_as_meant(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "kind: train\nname: x\nmodel: {path: m}\noptimizer: {lr: 1e-6, clip_grad: 2}\n"
        "data: {template: no, shuffle: false}\nseed: 010\n"
        "evaluation: {datasets: [math500, aime24]}\n"
    )
    config = config_io.load_config(path)
    assert config.optimizer.lr == 1e-6
    assert config.optimizer.clip_grad == 2.0 and isinstance(config.optimizer.clip_grad, float)
    assert config.seed == 10
    assert config.data.template == "no" and config.data.shuffle is False
    assert config.evaluation.datasets == ["math500", "aime24"]
    assert config.rollout == RolloutConfig()


def test_every_setting_of_every_section_can_be_overridden_by_its_own_value():
    for config in (CONFIG, PRETRAIN):
        for path, value in config_io.flatten(config).items():
            text = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
            text = ",".join(value) if isinstance(value, list) else text
            assert apply_overrides(config, [f"{path}={text}"]) == config, path


# overrides


@settings(deadline=None)
@given(lr=positive)
def test_a_float_override_is_exact(lr):
    assert apply_overrides(CONFIG, [f"optimizer.lr={lr!r}"]).optimizer.lr == lr


@settings(deadline=None)
@given(seed=st.integers(0, 2**70))
def test_an_int_override_is_exact(seed):
    assert apply_overrides(CONFIG, [f"seed={seed}"]).seed == seed


@settings(deadline=None)
@given(text=printable_text)
def test_a_text_override_is_taken_as_it_is(text):
    assume(text not in NOTHING)
    assert apply_overrides(CONFIG, [f"data.dataset={text}"]).data.dataset == text


@settings(deadline=None)
@given(text=printable_text)
def test_an_int_field_takes_integers_only(text):
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is not None and text.isascii():
        return
    assert refusal(apply_overrides, CONFIG, [f"seed={text}"]).startswith("seed=")


@settings(deadline=None)
@given(text=printable_text)
def test_a_float_field_takes_finite_numbers_only(text):
    try:
        value = apply_overrides(CONFIG, [f"optimizer.weight_decay={text}"]).optimizer.weight_decay
    except ValueError as error:
        assert str(error).startswith("optimizer.weight_decay=")
    else:
        assert math.isfinite(value) and value == float(text)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("evaluation.datasets=a,b", "evaluation.datasets", ["a", "b"]),
        ("evaluation.datasets=[a, 'b,c']", "evaluation.datasets", ["a", "b,c"]),
        ("evaluation.datasets=", "evaluation.datasets", []),
        ("model.tokenizer=", "model.tokenizer", ""),
        ("model.path=a=b", "model.path", "a=b"),
        ("optimizer.lr=1e-6", "optimizer.lr", 1e-6),
        ("optimizer.lr=2", "optimizer.lr", 2.0),
        ("optimizer.lr=.5", "optimizer.lr", 0.5),
        ("seed=1_000", "seed", 1000),
        ("seed= +05 ", "seed", 5),
        ("rollout.sleep=false", "rollout.sleep", False),
        ("rollout.sleep=False", "rollout.sleep", False),
        ("rollout.sleep=FALSE", "rollout.sleep", False),
        ("data.shuffle=true", "data.shuffle", True),
        ("data.shuffle= True ", "data.shuffle", True),
        ("data.shuffle=TRUE", "data.shuffle", True),
        ("evaluation.datasets= a , b ", "evaluation.datasets", ["a", "b"]),
        ("evaluation.datasets=[a, b,]", "evaluation.datasets", ["a", "b"]),
        ("evaluation.datasets=['null']", "evaluation.datasets", ["null"]),
        ("model.tokenizer=none", "model.tokenizer", "none"),
        ("model.tokenizer=true", "model.tokenizer", "true"),
        ("model.tokenizer= 'x' ", "model.tokenizer", " 'x' "),
        ("model.architecture.num_hidden_layers=2", "model.architecture.num_hidden_layers", 2),
    ],
)
def test_overrides_by_type(override, path, value):
    found = config_io.flatten(apply_overrides(CONFIG, [override]))[path]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.group_size=3.5", ["rollout.group_size='3.5'", "an integer"]),
        ("rollout.group_size=abc", ["rollout.group_size='abc'", "an integer"]),
        ("rollout.group_size=1e3", ["rollout.group_size='1e3'", "an integer"]),
        ("rollout.group_size=", ["rollout.group_size=''", "an integer"]),
        ("rollout.sleep=1", ["rollout.sleep='1'", "true or false"]),
        ("rollout.sleep=no", ["rollout.sleep='no'", "true or false"]),
        ("optimizer.lr=nan", ["optimizer.lr='nan'", "finite number"]),
        ("optimizer.lr=1e999", ["optimizer.lr=inf", "finite number"]),
        ("optimizer.lr=fast", ["optimizer.lr='fast'", "finite number"]),
        ("evaluation.datasets=[1, 2]", ["evaluation.datasets=[1, 2]", "list of text"]),
        ("evaluation.datasets=[a", ["evaluation.datasets", "not valid YAML"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1.0", "at least 0"]),
        ("rollout=3", ["rollout='3'", "section", "group_size"]),
        ("rollout.group_size.x=3", ["rollout.group_size.x='3'", "rollout.group_size is a value"]),
        ("rollout.group_size", ["rollout.group_size", "dotted.key=value"]),
        ("=4", ["=4", "dotted.key=value"]),
        ("rollout..group_size=4", ["unknown key"]),
        (
            "rollout.group_sise=4",
            [
                "rollout.group_sise='4'",
                "did you mean rollout.group_size?",
                "rollout has num_prompts",
            ],
        ),
        ("group_size=4", ["group_size='4'", "did you mean rollout.group_size?"]),
        ("rolout.group_size=4", ["rolout.group_size='4'", "did you mean rollout.group_size?"]),
        (
            "tensor_model_parallel_size=2",
            ["rollout.tensor_model_parallel_size or parallel.tensor_model_parallel_size"],
        ),
        ("model.architecture.depth=2", ["model.architecture.depth='2'", "num_hidden_layers"]),
        ("zzz=1", ["zzz='1'", "unknown key; the config has name, seed"]),
    ],
)
def test_refused_overrides_name_path_value_and_what_is_valid(override, parts):
    message = refusal(apply_overrides, CONFIG, [override])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1e3", "seed='1e3': must be an integer; write 1000"),
        ("seed=5.", "seed='5.': must be an integer; write 5"),
        ("seed=1.5", "seed='1.5': must be an integer"),
        ("seed=1e400", "seed='1e400': must be an integer"),
        ("seed='5'", "seed=\"'5'\": must be an integer; write it without the quotes"),
        ("seed='five'", "seed=\"'five'\": must be an integer"),
        ("seed=0x10", "seed='0x10': must be an integer"),
        ("seed=1__0", "seed='1__0': must be an integer"),
        ("seed=None", "seed='None': must be an integer"),
        ("seed=true", "seed='true': must be an integer"),
        (
            'optimizer.lr="1e-6"',
            "optimizer.lr='\"1e-6\"': must be a finite number; write it without the quotes",
        ),
        ("optimizer.lr=1,5", "optimizer.lr='1,5': must be a finite number"),
        ("optimizer.lr=1 e-6", "optimizer.lr='1 e-6': must be a finite number"),
        ("optimizer.lr=null", "optimizer.lr='null': must be a finite number"),
        *[
            (f"rollout.sleep={word}", f"rollout.sleep={word!r}: must be true or false")
            for word in ("tRUE", "yes", "no", "on", "off", "y", "0", "None", "~", "")
        ],
        (
            "rollout.sleep='true'",
            "rollout.sleep=\"'true'\": must be true or false; write it without the quotes",
        ),
        *[
            (
                f"logging.wandb_project={word}",
                f"logging.wandb_project={word!r}: is a text here, not nothing; "
                "for nothing write logging.wandb_project=",
            )
            for word in NOTHING
        ],
        *[
            (
                f"evaluation.datasets={word}",
                f"evaluation.datasets={word!r}: {word!r} is a text here, not nothing; "
                "for an empty list write evaluation.datasets=",
            )
            for word in NOTHING
        ],
        (
            "evaluation.datasets=a,,b",
            "evaluation.datasets='a,,b': an item is empty; "
            "for an empty list write evaluation.datasets=",
        ),
        (
            "evaluation.datasets=[1]",
            "evaluation.datasets=[1]: must be a list of text, as [a, b] "
            "(on a command line also a,b); put 1 in quotes",
        ),
    ],
)
def test_refused_texts_say_what_to_write(override, message):
    assert refusal(apply_overrides, CONFIG, [override]) == message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer: {lr: '1e-6'}", "optimizer.lr='1e-6': must be a finite number; QUOTED"),
        ('optimizer: {lr: "1e-6"}', "optimizer.lr='1e-6': must be a finite number; QUOTED"),
        ("optimizer: {lr: '2'}", "optimizer.lr='2': must be a finite number; QUOTED"),
        ("optimizer: {lr: ' 2 '}", "optimizer.lr=' 2 ': must be a finite number; QUOTED"),
        ("optimizer: {lr: 1e-6f}", "optimizer.lr='1e-6f': must be a finite number"),
        ("optimizer: {lr: .inf}", "optimizer.lr=inf: must be a finite number"),
        ("optimizer: {lr: }", "optimizer.lr=None: must be a finite number"),
        ("seed: '5'", "seed='5': must be an integer; QUOTED"),
        ("seed: '1e3'", "seed='1e3': must be an integer"),
        ("seed: 1e3", "seed=1000.0: must be an integer; write 1000"),
        ("seed: 1_000", "seed='1_000': must be an integer; in YAML without _: 1000"),
        ("seed: true", "seed=True: must be an integer"),
        ("data: {shuffle: 'true'}", "data.shuffle='true': must be true or false; QUOTED"),
        ("data: {shuffle: yes}", "data.shuffle='yes': must be true or false"),
        ("data: {shuffle: 1}", "data.shuffle=1: must be true or false"),
        ("data: {dataset: 7}", "data.dataset=7: must be text; put it in quotes"),
        ("data: {dataset: true}", "data.dataset=True: must be text; put it in quotes"),
        ("data: {data_dir: }", "data.data_dir=None: must be text; for nothing write ''"),
        ("data: {data_dir: ~}", "data.data_dir=None: must be text; for nothing write ''"),
        ("data: {dataset: [a]}", "data.dataset=['a']: must be text"),
        ("evaluation: {datasets: a}", "evaluation.datasets='a': LIST; a list of one is [a]"),
        ("evaluation: {datasets: 'a,b'}", "evaluation.datasets='a,b': LIST"),
        ("evaluation: {datasets: }", "evaluation.datasets=None: LIST; for nothing write []"),
        ("evaluation: {datasets: [a, 1]}", "evaluation.datasets=['a', 1]: LIST; put 1 in quotes"),
        ("evaluation: {datasets: [a, ~]}", "evaluation.datasets=['a', None]: LIST"),
    ],
)
def test_values_of_another_type_say_what_to_write(setting, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"kind: train\nname: x\nmodel: {{path: m}}\n{setting}\n")
    message = message.replace("QUOTED", "in quotes it is text: take them away")
    message = message.replace(
        "LIST", "must be a list of text, as [a, b] (on a command line also a,b)"
    )
    assert refusal(config_io.load_config, path) == f"{path}: {message}"


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "false", "False", "FALSE"])
def test_a_word_is_the_same_boolean_in_yaml_and_on_a_command_line(word, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"kind: train\nname: x\nmodel: {{path: m}}\ndata: {{shuffle: {word}}}\n")
    shuffle = config_io.load_config(path).data.shuffle
    assert shuffle is (word.lower() == "true")
    assert apply_overrides(CONFIG, [f"data.shuffle={word}"]).data.shuffle is shuffle


def test_overrides_are_checked_together_not_one_by_one():
    both = ["batch.global_batch_size=12", "rollout.num_prompts_per_step=3", "rollout.group_size=4"]
    config = apply_overrides(CONFIG, both)
    assert config.responses_per_step == config.batch.global_batch_size == 12
    assert "must divide" in refusal(apply_overrides, CONFIG, both[:1])


def test_the_last_override_of_a_key_wins_and_the_original_is_untouched():
    before = to_dict(CONFIG)
    assert apply_overrides(CONFIG, ["seed=1", "seed=2"]).seed == 2
    apply_overrides(CONFIG, ["evaluation.datasets=a"])
    assert to_dict(CONFIG) == before


# dictionaries


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({}, ["count=<missing>", "required: an integer"]),
        ({"count": True}, ["count=True", "an integer"]),
        ({"count": 1.0}, ["count=1.0", "an integer"]),
        ({"count": "1"}, ["count='1'", "an integer"]),
        ({"count": None}, ["count=None", "an integer"]),
        ({"count": 1, "loud": 1}, ["loud=1", "true or false"]),
        ({"count": 1, "names": "a"}, ["names='a'", "a list of text"]),
        ({"count": 1, "names": ["a", 1]}, ["names=['a', 1]", "a list of text"]),
        ({"count": 1, "inner": 3}, ["inner=3", "a section with keys at_most, share"]),
        ({"count": 1, "inner": None}, ["inner=None", "a section"]),
        ({"count": 1, "inner": {"share": True}}, ["inner.share=True", "a finite number"]),
        ({"count": 1, "inner": {"share": math.inf}}, ["inner.share=inf"]),
        ({"count": 1, "inner": {"share": math.nan}}, ["inner.share=nan"]),
        ({"count": 1, "inner": {"share": 10**400}}, ["inner.share=1000"]),
        ({"count": 1, "inner": {"sahre": 1}}, ["inner.sahre=1", "did you mean inner.share?"]),
        ({"count": 1, 3: 4}, ["3=4", "unknown key"]),
        ([], ["config=[]", "a section"]),
    ],
)
def test_refused_dictionaries(data, parts):
    message = refusal(from_dict, Toy, data)
    for part in parts:
        assert part in message


def test_missing_required_settings_are_named():
    assert "model=<missing>" in refusal(from_dict, RunConfig, {"name": "x"})
    assert "name=<missing>" in refusal(from_dict, RunConfig, {"model": {"path": "m"}})


def test_every_field_type_of_the_config_is_supported():
    for cls in vars(config_module).values():
        if dataclasses.is_dataclass(cls):
            for hint in config_io._field_types(cls).values():
                assert config_io._describe(hint)


# files and targets


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["config=None", "must be a mapping"]),
        ("name: x", ["kind=<missing>", "train, pretrain"]),
        ("kind: evaluate", ["kind='evaluate'", "train, pretrain"]),
        ("kind: [train]", ["kind=['train']"]),
        ("kind: train\nname: x\nmodel: m", ["model='m'", "a section"]),
        ("kind: train\nname: x\nmodel: {path: m}\nseed: 1.5", ["seed=1.5", "an integer"]),
        ("kind: train\nname: x\nname: y", ["line 3", "key 'name' is given twice"]),
        ("kind: train\nname: [", ["not valid YAML", "line 2"]),
        ("kind: train\n? [a]\n: 1", ["line 2", "is not text"]),
        ("kind: train\nname: !!python/object:os.system x", ["not valid YAML"]),
        ("a: \x00", ["not valid YAML"]),
    ],
)
def test_refused_files_are_named(text, parts, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = refusal(config_io.load_config, path)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in refusal(config_io.load_config, tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(config_io.load_config, tmp_path / "binary.yaml")


HEAD = b"kind: train\nname: x\nmodel: {path: m}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + "data: {dataset: é}".encode("latin-1"), ", line 4: cannot be read: not UTF-8 text"),
        (HEAD.decode().encode("utf-16"), ", line 1: cannot be read: not UTF-8 text (byte 0xff)"),
        (HEAD + b"data:\n\tdataset: a", ", line 5: not valid YAML: found character '\\t' that can"),
        (HEAD + b"seed: \0", ", line 4: not valid YAML: it holds the character '\\x00'"),
        (HEAD + b"data: {split: a, split: b}", ", line 4: not valid YAML: key 'split' is given tw"),
        (HEAD + b"---\n" + HEAD, ", line 4: not valid YAML: expected a single document in the str"),
        (HEAD + b"seed: " + b"9" * 5000, ", line 4: not valid YAML: '99999"),
        (HEAD + b"seed: !!int x", ", line 4: not valid YAML: 'x' cannot be read as int"),
        (HEAD + b"data: {shuffle: !!bool x}", ", line 4: not valid YAML: 'x' cannot be read as bo"),
        (HEAD + b"data: " + b"[" * 500, ": not valid YAML: it is nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_files_that_are_no_yaml_are_refused_by_line(content, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    text = refusal(config_io.load_config, path)
    assert text.startswith(f"{path}{message}") and "\n" not in text


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("\ufeff".encode() + HEAD.replace(b"\n", b"\r\n"))
    assert config_io.load_config(path) == dataclasses.replace(CONFIG, name="x")


def test_resolve_finds_recipes_and_files(tmp_path):
    config = resolve("quick_drgrpo", ["seed=5"], "train", RECIPES)
    assert config == dataclasses.replace(CONFIG, seed=5)
    config_io.save_config(config, tmp_path / "c.yaml")
    again = resolve(str(tmp_path / "c.yaml"), ["num_steps=7"], "train", RECIPES)
    assert again == dataclasses.replace(config, num_steps=7)


def test_resolve_refuses(tmp_path):
    message = refusal(resolve, "quick_drgpo", [], "train", RECIPES)
    assert (
        "did you mean quick_drgrpo?" in message and "recipes: quick_base, quick_drgrpo" in message
    )
    message = refusal(resolve, "quick_base", [], "train", RECIPES)
    assert message == "quick_base: is for `megatron-zero pretrain`, not `train`"
    (tmp_path / "config.yaml").write_text("")
    assert f"did you mean {tmp_path}/config.yaml?" in refusal(
        resolve, str(tmp_path), [], "train", RECIPES
    )


def test_a_recipe_with_a_value_of_the_wrong_type_is_refused():
    bad = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(clip_grad=True))
    assert "optimizer.clip_grad=True" in refusal(resolve, "bad", [], "train", {"bad": lambda: bad})


def test_changed_settings():
    new = apply_overrides(CONFIG, ["num_steps=7", "optimizer.lr=2e-6"])
    assert config_io.changed_settings(CONFIG, new) == {
        "num_steps": (100, 7),
        "optimizer.lr": (1e-6, 2e-6),
    }
    assert config_io.changed_settings(CONFIG, CONFIG) == {}
