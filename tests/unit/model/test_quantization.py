"""Quantised models are named by method, from what their own programs write into configs, else from their tensors."""

from __future__ import annotations

from typing import Any

import pytest

from llava_convert.model.tables.quantization import methods, quantization

# As transformers 5.23 and the programs themselves write them (docs and sources of each), less what tells nothing.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes 4": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}},
        "bitsandbytes, 4 bits",
    ),
    "bitsandbytes 8": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}},
        "bitsandbytes, 8 bits",
    ),
    "bitsandbytes before quant_method": ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "GPTQ, 4 bits"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, "AWQ, 4 bits"),
    "w_bit": ({"quantization_config": {"w_bit": 4, "q_group_size": 128}}, "AWQ, 4 bits"),
    "compressed-tensors": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            }
        },
        "compressed-tensors, pack-quantized, 4 bits",
    ),
    "its older key": (
        {"compression_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        "compressed-tensors, float-quantized",
    ),
    "DeepSeek's": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "FP8, 8 bits"),
    "fbgemm": ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "FP8, 8 bits"),
    "hqq": ({"quantization_config": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}},
            "HQQ, 4 bits"),
    "eetq": ({"quantization_config": {"quant_method": "eetq", "weights": "int8"}}, "EETQ, 8 bits"),
    "quanto": ({"quantization_config": {"quant_method": "quanto", "weights": "int8"}}, "Quanto, 8 bits"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
    "both of mlx": (
        {"quantization": {"group_size": 64, "bits": 8}, "quantization_config": {"group_size": 64, "bits": 8}},
        "MLX, 8 bits",
    ),
    "the text half": ({"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}, "AWQ, 4 bits"),
    "a new one": ({"quantization_config": {"quant_method": "fancy"}}, "fancy"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_by_config(case: str) -> None:
    config, wanted = CONFIGS[case]
    found = quantization(config, {}, ["model.layers.0.mlp.up_proj.qweight"])
    assert str(found) == wanted


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "GPTQ, 4 bits"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, "AWQ, 4 bits"),
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
            "FP8, 8 bits",
        ),
    ],
)
def test_by_a_file_beside_the_config(file: str, content: dict[str, Any], wanted: str) -> None:
    assert str(quantization({}, {file: content}, [])) == wanted


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.q_proj.qweight", "a.q_proj.qzeros", "a.q_proj.scales", "a.q_proj.g_idx"], "GPTQ"),
        (["a.q_proj.qweight", "a.q_proj.qzeros", "a.q_proj.scales"], "AWQ"),
        (["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["a.weight", "a.SCB"], "bitsandbytes"),
        (["a.weight_packed", "a.weight_scale", "a.weight_shape"], "compressed-tensors"),
        (["a.weight", "a.weight_scale_inv"], "FP8, 8 bits"),
        (["a.weight", "a.weight_scales"], "EETQ, 8 bits"),
        (["a.W_q", "a.meta"], "HQQ"),
    ],
)
def test_by_tensors(names: list[str], wanted: str) -> None:
    assert str(quantization({}, {}, names)) == wanted


def test_what_is_not_quantised() -> None:
    assert quantization({"quantization_config": None, "hidden_size": 4}, {}, ["a.weight", "a.bias"]) is None
    assert quantization({"quantization_config": {}}, {}, []) is None


def test_only_methods_of_fp8_have_scales() -> None:
    assert {method.name for method in methods() if method.scales} == {"compressed-tensors", "FP8"}
