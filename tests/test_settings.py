"""Failures caught here: a setting that means something else than it says (YAML 1.1's seconds, truth values and octals,
a path with an emoji), one given twice or dropped, an unknown key without the name that was meant, a bad value that is
noticed only after minutes of work.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dsv4 import ModelConfig, UserError
from dsv4.config import LlamaConfig, V32Config, preset_of
from dsv4.settings import read_yaml, write_yaml
from dsv4.train.recipes import RECIPES, resolve
from dsv4.train.runconfig import LossConfig


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return read_yaml(file)


# --- overrides are data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["smile 😀/a.txt", "no", "1:03", "1e3", "null", "a: b", "[x", "#c", "'q'", "~", "ü\u2028"]
)
def test_a_path_is_the_path_that_was_given(path: str) -> None:
    assert resolve("tiny", data=path).data.path == path
    assert resolve("tiny", None, [f"data.path={path}"]).data.path == path


@pytest.mark.parametrize(
    "override", ["schedule.steps=1:03", "schedule.steps=0x10", "schedule.steps=1_0", "schedule.steps=1e2"]
)
def test_a_number_is_decimal_or_refused(override: str) -> None:
    """YAML 1.1 reads 1:03 as 63 seconds."""
    with pytest.raises(UserError, match="schedule.steps=.* must be of type int"):
        resolve("tiny", None, [override])


def test_a_list_of_groups_is_written_as_in_a_file() -> None:
    """With and without quotes; the README's own line was refused."""
    mix = resolve("tiny", None, ["data.mix=[{path: a/, weight: 3}, {path: hf:OWNER/NAME, weight: 1}]"]).data.mix
    assert [(source.path, source.weight) for source in mix] == [("a/", 3), ("hf:OWNER/NAME", 1)]
    assert mix == resolve("tiny", None, [f"data.mix={json.dumps([vars(source) for source in mix])}"]).data.mix
    for text in ("[{path: a/, path: b/}]", "[{path: a/}", "[*a]", "[" * 10_000):
        with pytest.raises(UserError, match="data.mix=.* must be of type tuple"):
            resolve("tiny", None, [f"data.mix={text}"])


def test_values_are_read_as_the_fields_type() -> None:
    run = resolve("tiny", None, ["schedule.steps=0100", "optim.lr=1e-3", "recompute=true", "optim.clip=inf"])
    assert (run.schedule.steps, run.optim.lr, run.recompute, run.optim.clip) == (100, 1e-3, True, math.inf)
    assert resolve("tiny", None, ["model.compress_ratios=[0,4,128,4,128,0]"]).model == ModelConfig.preset("tiny")
    assert resolve("tiny", None, ["model.eos_token_id=[1, 2]"]).model.eos_token_id == (1, 2)
    assert resolve("tiny", None, ["model.eos_token_id=null"]).model.eos_token_id is None
    assert resolve("demo", None, ["model.preset=tiny"]).model == ModelConfig.preset("tiny")
    assert resolve("demo", None, ["model.hidden_size=64", "model.preset=tiny"]).model.hidden_size == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"unknown configuration key 'optim\.lrr'; did you mean 'lr'"),
        (["lr=1e-3"], r"unknown configuration key 'lr'; did you mean 'optim\.lr'"),
        (["steps=3"], r"did you mean 'schedule\.steps'"),
        (["optm.lr=1e-3"], r"unknown configuration key 'optm'; did you mean 'optim'"),
        (["optim.lr=1", "optim.lr=2"], r"optim\.lr is given twice"),
        (["model.preset=tiny", "model.preset=small"], r"model\.preset is given twice"),
        (["optim.lr.x=1"], r"optim\.lr is a single value"),
        (["optim=3"], "must be a group of settings"),
        (["optim=3", "optim.lr=1"], "must be a group of settings"),
        (["=3"], "not of the form key=value"),
        (["recompute=yes"], "must be of type bool"),
        (["schedule.steps=" + "9" * 5000], "must be of type int"),
        (["schedule.steps=" + "9" * 300], "beyond all reason"),
        (["model.compress_ratios=" + "[" * 100_000], "must be of type tuple"),
    ],
)
def test_overrides_that_say_nothing_or_too_much(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve("demo", None, overrides)
    assert len(str(error.value)) < 500


# --- the kind of a model decides what its settings are ----------------------------------------------------------------


@pytest.mark.parametrize(("kind", "of"), [("v32", V32Config), ("llama", LlamaConfig), ("v4", ModelConfig)])
def test_a_kind_takes_its_own_settings(tmp_path: Path, kind: str, of: type) -> None:
    """In overrides and in YAML, in any order; what was resolved reads back as what it was, whatever the recipe."""
    run = resolve("tiny", None, ["model.hidden_size=64", f"model.kind={kind}", "model.eos_token_id=[1, 2]"])
    assert run.model == preset_of(kind, "tiny").with_(hidden_size=64, eos_token_id=(1, 2)) and type(run.model) is of
    assert resolve("base", None, [f"model.kind={kind}", "model.preset=small"]).model == preset_of(kind, "small")
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(run.to_dict()))
    assert resolve("small", file) == replace(run, recompute=False)
    assert ("kind" in run.to_dict()["model"]) == (kind != "v4"), "older runs of V4 do not say it, and go on"
    file.write_text(f"model: {{kind: {kind}, rms_norm_eps: 1e-4}}")
    assert resolve("tiny", file, ["model.vocab_size=300"]).model == preset_of(kind, "tiny").with_(
        rms_norm_eps=1e-4, vocab_size=300
    )
    file.write_text(f"model: {{kind: {kind}, preset: small}}")
    assert resolve("tiny", file).model == preset_of(kind, "small")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.kind=lama"], "model.kind='lama' is unknown: use one of v4, v32, llama; did you mean 'llama'"),
        (["model.kind=v32", "model.kind=llama"], r"model\.kind is given twice"),
        (["model.kind=v32", "model.sliding_window=64"], r"unknown configuration key 'model\.sliding_window'"),
        (["model.kind=v32", "model.kv_lora_rnk=64"], r"'model\.kv_lora_rnk'; did you mean 'kv_lora_rank'"),
        (["model.kind=llama", "model.index_topk=64"], r"unknown configuration key 'model\.index_topk'"),
        (["model.kind=llama", "model.num_attention_heads=5"], "must be a multiple of num_key_value_heads=2"),
        (["model.kind=llama", "model.head_dim=wide"], r"model\.head_dim='wide' must be of type int"),
        (["model.kind=llama", "model.eos_token_id=512"], "eos_token_id=512 must be at least 0 and below vocab_size"),
        (["model.kind=llama", "model.preset=flash"], "no preset 'flash' of kind llama: choose .* tiny, small"),
        (["model.kind"], "not of the form key=value"),
    ],
)
def test_a_setting_of_another_kind_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("tiny", None, overrides)


def test_a_recipe_without_such_a_model_says_so_and_a_files_settings_are_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no preset 'base' of kind v32"):
        resolve("base", None, ["model.kind=v32"])
    file = tmp_path / "run.yaml"
    file.write_text("model: {sliding_window: 64}")
    with pytest.raises(UserError, match=r"unknown configuration key 'model\.sliding_window'"):
        resolve("tiny", file, ["model.kind=v32"])


def test_data_may_not_be_named_twice() -> None:
    with pytest.raises(UserError, match="given twice"):
        resolve("tiny", None, ["data.path=a"], data="b")


# --- all settings are judged before any work -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *((f"optim.lr={x}", r"optim\.lr=.* must be a positive finite number") for x in ("nan", "inf", "0", "-1")),
        *((f"optim.weight_decay={x}", r"optim\.weight_decay=") for x in ("-5", "nan", "inf")),
        *((f"optim.momentum={x}", r"optim\.momentum=") for x in ("1", "-0.1", "nan")),
        *((f"optim.clip={x}", r"optim\.clip=") for x in ("0", "-1", "nan")),
        ("optim.newton_schulz=foo", r"optim\.newton_schulz='foo' must be one of hybrid10"),
        ("optim.newton_schulz_dtype=fp8", r"optim\.newton_schulz_dtype='fp8' must be one of float32, bfloat16"),
        *((f"loss.{n}={x}", rf"loss\.{n}=") for n in vars(LossConfig()) for x in ("-1", "nan")),
        *((f"seed={x}", "seed=") for x in ("-1", str(1 << 64))),
        *((f"schedule.{n}={x}", n.split("_")[0]) for n in ("decay_fraction", "final") for x in ("nan", "-1", "2")),
        ("schedule.steps=0", "must be positive"),
        ("schedule.warmup=-1", "must not be negative"),
        ("schedule.warmup=100000", "exceed"),
        ("data.micro_batches=4096", "must be at most"),
        *((f"data.{n}=0", "must be positive") for n in ("seq_len", "tokens_per_step", "micro_batches")),
        *((f"save.{n}=0", "must be positive") for n in ("every", "keep", "eval_every", "eval_tokens")),
        (f"data.tokens_per_step={2**62}", "beyond all reason"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_when_it_is_read(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("demo", None, [override])


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_yaml_means_what_version_1_2_says(tmp_path: Path) -> None:
    text = "a: 1:03\nb: no\nc: 010\nd: 1e-3\ne: on\nf: 2024-01-01\ng: 😀\nh: 0x1f\ni: true\nj:\n"
    want = {"a": "1:03", "b": "no", "c": 10, "d": 1e-3, "e": "on", "f": "2024-01-01", "g": "😀", "h": "0x1f", "i": True}
    assert read(tmp_path, text) == {**want, "j": None}


_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
_odd = st.sampled_from(
    ["1e3", "no", "1:03", "010", "null", "true", "0x1f", "1.5", "", "~", "<<", "=", "- x", "a: b", "1_0"]
)


@given(
    st.dictionaries(
        _texts | _odd, _texts | _odd | st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False)
    )
)
def test_what_is_written_is_read_back(values: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.yaml"
        file.write_text(write_yaml({"x": 1, **values}), encoding="utf-8", newline="")
        assert read_yaml(file) == {"x": 1, **values}


@pytest.mark.parametrize("name", RECIPES)
def test_settings_round_trip_through_yaml(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    run = resolve(name, None, ["optim.clip=inf", "data.path=smile 😀/1:03"])
    file.write_text(write_yaml(run.to_dict()), encoding="utf-8")
    assert resolve("tiny", file) == run
    file.write_text(yaml.safe_dump(run.to_dict()))  # the old way, with its escapes
    assert resolve("tiny", file) == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("[" * 200_000, "not valid YAML"),
        ("a: 1\na: 2", "not valid YAML .*twice"),
        ("a: &x [1]\nb: *x", "not valid YAML .*alias"),
        ("a: !!python/object:os.system 1", "not valid YAML"),
        ("just text", "holds no settings"),
        ("- 1", "holds no settings"),
        ("", "holds no settings"),
        ("\0", "not valid YAML"),
    ],
)
def test_a_damaged_yaml_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    for make in (lambda f: None, lambda f: f.mkdir(), lambda f: f.write_bytes(b"a: \xff")):
        file = tmp_path / f"{id(make)}.yaml"
        make(file)
        with pytest.raises(UserError, match="cannot read|not UTF-8"):
            read_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: 3", "must be a group of settings"),
        ("optim: {lr: null}", r"optim\.lr=None must be of type float"),
        ("optim: {lr: true}", "must be of type float"),
        ("schedule: {steps: 1.0}", "must be of type int"),
        ("data: {path: 3}", "must be of type str"),
        ("model: {compress_ratios: 4}", "must be of type tuple"),
        ("model: {compress_ratios: [[4]]}", "compress_ratios"),
        ("model: {eos_token_id: [[1]]}", "eos_token_id"),
        ("model: {preset: [1]}", "unknown preset"),
        ("modle: {}", "unknown configuration key 'modle'; did you mean 'model'"),
        ("1: 2", "unknown configuration key '1'"),
    ],
)
def test_wrong_types_in_yaml_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        resolve("tiny", file)


def test_a_drafter_is_not_trained_and_not_a_setting() -> None:
    """Its keys are no part of what a run is compared with when it resumes."""
    config = resolve("tiny")
    named = [key for key in config.to_dict()["model"] if key.startswith("dspark_")]
    assert named == ["dspark_stages"]
    with pytest.raises(UserError, match="model.dspark_stages=3: a DSpark drafter is not trained here"):
        replace(config, model=ModelConfig.preset("flash-0731"))
