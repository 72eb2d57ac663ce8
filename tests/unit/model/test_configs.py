"""Configs of every flavour are read, and the old one is kept."""

from __future__ import annotations

from typing import Any

import pytest

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.model.configs import family, named_config, old_flavour, ordered, without_stale

LLM = "language_model"
SIZES: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4}


def test_new_flavour_becomes_old() -> None:
    new = {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
        "hidden_size": 8,
    }
    assert old_flavour(new) == {
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "hidden_size": 8,
    }
    assert new["dtype"] == "bfloat16", "the caller's config is left alone"


def test_two_spellings_that_differ() -> None:
    """transformers 5.23 takes a null rope_scaling for nothing said, and of two thetas the nested one."""
    nested = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    found = old_flavour({"rope_scaling": None, "rope_theta": 1e4, "rope_parameters": nested})
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(UnsupportedError, match=r"rope_theta is 500000\.0, but 10000\.0 in rope_parameters"):
        old_flavour({"rope_theta": 5e5, "rope_parameters": nested})


def test_default_rope_is_no_scaling() -> None:
    found = old_flavour({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})
    assert found == {"rope_theta": 1e4, "rope_scaling": None}


def test_a_partial_rotation_stands_by_itself() -> None:
    """Phi-4-mini's, as transformers 5 writes it; 4.x looks for it at the top alone."""
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert old_flavour({"rope_parameters": {**rope, "rope_type": "default"}}) == {**rope, "rope_scaling": None}
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert old_flavour({"rope_parameters": {**rope, **long}}) == {**rope, "rope_scaling": long}


def test_old_flavour_stays() -> None:
    old = {"torch_dtype": "float16", "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert old_flavour(old) == old
    assert old_flavour({**old, "dtype": "float32"})["torch_dtype"] == "float16"


def test_old_flavour_against_transformers() -> None:
    """What 5.x makes of our old flavour is what it meant by the new one."""
    from transformers.models.llama import LlamaConfig

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    new = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e5, **scaling})
    old = old_flavour(new.to_dict())
    assert "rope_parameters" not in old and "dtype" not in old
    assert LlamaConfig(**old).rope_parameters == new.rope_parameters


LISTS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
PHI3 = {"model_type": "phi3", "max_position_embeddings": 8192}


@pytest.mark.parametrize("name", [{"type": "su"}, {"type": "yarn"}, {"type": "longrope"}, {"rope_type": "longrope"}])
def test_phi_3s_longrope_in_the_flavour_of_every_release(name: dict[str, str]) -> None:
    """4.46 to 4.57 take three fields, of these names; the length of the first training stands beside them."""
    inside = {**name, **LISTS, "original_max_position_embeddings": 512}
    found = named_config({**PHI3, "rope_scaling": inside}, LLM, where="x")
    assert found["rope_scaling"] == {"type": "longrope", **LISTS}
    assert found["original_max_position_embeddings"] == 512
    beside = named_config({**PHI3, "rope_scaling": inside, "original_max_position_embeddings": 256}, LLM, where="x")
    assert beside["original_max_position_embeddings"] == 256, "transformers 5.23 takes this one"


def test_phi_3s_attention_factor_stays_where_the_lengths_do_not_give_it() -> None:
    """16 times 512: the factor is the root of 1 + 4/9."""
    inside = {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 512}

    def stated(**more: float) -> float | None:
        return named_config({**PHI3, "rope_scaling": {**inside, **more}}, LLM, where="x")["rope_scaling"].get(
            "attention_factor"
        )

    assert stated(attention_factor=(13 / 9) ** 0.5) is None and stated(factor=16.0) is None
    assert stated(attention_factor=1.3) == 1.3
    assert stated(factor=2.0) == pytest.approx((10 / 9) ** 0.5)


def test_llamas_scaling_keeps_its_fields() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert named_config({"model_type": "llama", "rope_scaling": scaling}, LLM, where="x")["rope_scaling"] == scaling


def test_defaults_are_filled_and_what_is_stated_wins() -> None:
    found = named_config({"model_type": "llama", "rms_norm_eps": 1e-5}, LLM, where="x")
    assert (found["rms_norm_eps"], found["hidden_size"], found["rope_theta"]) == (1e-5, 4096, 10000.0)


def test_stale_keys_and_order() -> None:
    assert without_stale({"transformers_version": "5", "auto_map": {}, "b": 1}) == {"b": 1}
    assert list(ordered({"b": 1, "a": 2})) == ["a", "b"]


@pytest.mark.parametrize("kind", [None, 3, ["llama"], True])
def test_no_model_type(kind: Any) -> None:
    with pytest.raises(InputError, match="model_type is missing"):
        named_config({"model_type": kind}, LLM, where="x/config.json")


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="'gpt2' is not a known language model family") as caught:
        named_config({"model_type": "gpt2"}, LLM, where="x")
    assert caught.value.hint is not None and "llama, mistral, olmo2, phi3, qwen2" in caught.value.hint
    with pytest.raises(UnsupportedError):
        family("vision_tower", {"model_type": "llama"})
    assert family(LLM, {"model_type": "mistral"}).part == LLM
