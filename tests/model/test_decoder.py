# SPDX-License-Identifier: Apache-2.0
"""The decoder against `transformers` on tiny random models, and the configs it refuses."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lychee.config import MemoryConfig, ModelConfig
from lychee.errors import UnsupportedModelError
from lychee.weights import load_decoder, read_config

TOLERANCE = {"rtol": 0, "atol": 1e-5}
SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Of 8 frequencies the first is kept, two are blended and the rest divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied-mha": (Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
    "qwen3-tied-mqa-bias": (
        Qwen3Config,
        {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "attention_bias": True,
        },
    ),
    "llama": (LlamaConfig, {}),
    "llama3-rope": (LlamaConfig, {"rope": LLAMA3_ROPE}),
    "llama-linear-rope": (LlamaConfig, {"rope": {"rope_type": "linear", "factor": 4.0}}),
    "llama-attention-bias": (LlamaConfig, {"attention_bias": True}),
    "llama-mlp-bias": (LlamaConfig, {"mlp_bias": True}),
}


def make_config(case, **changes):
    """A config of a case; rope settings go where the installed transformers wants them."""
    kind, fields = CASES[case]
    fields = SHAPE | fields | changes
    rope = {"rope_theta": 5000.0} | fields.pop("rope", {"rope_type": "default"})
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return kind(**fields, rope_parameters=rope)
    theta = rope.pop("rope_theta")
    scaled = rope["rope_type"] != "default"
    return kind(**fields, rope_theta=theta, rope_scaling=rope if scaled else None)


def save_random_model(config, folder, seed=0):
    """A transformers model with weights large enough that every part shapes the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2
            # Vocabulary rows half as large: logits of about 0.5, their rounding below 1e-5.
            if name.startswith(("model.embed_tokens", "lm_head")):
                scale /= 2
            parameter.normal_(0, scale, generator=generator)
            if "norm" in name:
                parameter += 1
    model.save_pretrained(folder)
    return model


def load(folder):
    raw = read_config(folder)
    return load_decoder(folder, raw, MemoryConfig.from_dict(raw))[0]


@pytest.fixture(params=CASES)
def models(request, tmp_path):
    """The model of one case as transformers runs it and as the decoder does."""
    reference = save_random_model(make_config(request.param), tmp_path)
    return reference, load(tmp_path)


def random_ids(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SHAPE["vocab_size"], (batch, length), generator=generator)


def left_padded(lengths):
    """valid [B, S] and positions [B, S] of rows padded on the left."""
    width = max(lengths)
    valid = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return valid, (valid.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def run(decoder, ids, positions=None, **arguments):
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    top = int(positions.max())
    hidden = decoder(ids, positions=positions, max_position=top, **arguments)
    return decoder.logits(hidden)


@torch.no_grad()
def test_decoder_matches_transformers(models):
    """150 tokens pass the llama3 case's original 64 positions."""
    reference, decoder = models
    ids = random_ids(2, 150)
    expected = reference(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(run(decoder, ids), expected, **TOLERANCE)


@torch.no_grad()
def test_decoder_matches_transformers_left_padded(models):
    reference, decoder = models
    ids = random_ids(3, 21)
    valid, positions = left_padded([21, 13, 1])
    expected = reference(ids, attention_mask=valid.long(), position_ids=positions).logits
    logits = run(decoder, ids, positions, valid=valid)
    torch.testing.assert_close(logits[valid], expected[valid], **TOLERANCE)
    alone = run(decoder, ids[1:2, 8:])
    torch.testing.assert_close(logits[1:2, 8:], alone, **TOLERANCE)


@torch.no_grad()
def test_decoder_cached_decode_matches_transformers(models):
    """Prefill of a left-padded batch, a piece of three tokens, then single tokens."""
    reference, decoder = models
    ids = random_ids(2, 17)
    valid, positions = left_padded([17, 12])
    expected = reference(ids, attention_mask=valid.long(), position_ids=positions).logits
    cache = decoder.new_cache(2, 17)
    pieces = []
    for start, stop in ((0, 10), (10, 13), (13, 14), (14, 15), (15, 16), (16, 17)):
        step = slice(start, stop)
        seen = valid[:, :stop]
        pieces.append(run(decoder, ids[:, step], positions[:, step], cache=cache, valid=seen))
    logits = torch.cat(pieces, dim=1)
    torch.testing.assert_close(logits[valid], expected[valid], **TOLERANCE)
    with pytest.raises(ValueError, match="cache: expected at most 17 tokens, got 18"):
        run(decoder, ids[:, :1], positions[:, -1:] + 1, cache=cache)


def test_a_cast_decoder_keeps_its_rotary_tables_in_float32(models):
    _, decoder = models
    ids = random_ids(2, 9)
    expected, tables = run(decoder, ids), decoder.rope_tables(9)
    cast = copy.deepcopy(decoder).to(torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(cast.rope_tables(9), tables, strict=True))
    torch.testing.assert_close(run(cast, ids).float(), expected, rtol=0, atol=0.1)


@torch.no_grad()
def test_decoder_select_returns_those_rows(models):
    _, decoder = models
    ids = random_ids(2, 9)
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([8, 3, 0])
    everything = run(decoder, ids)
    selected = run(decoder, ids, select=(rows, columns))
    torch.testing.assert_close(selected, everything[rows, columns], **TOLERANCE)
    last = run(decoder, ids, select=(slice(None), -1))
    torch.testing.assert_close(last, everything[:, -1], **TOLERANCE)


@pytest.mark.parametrize("case", ["llama3-rope", "llama-linear-rope", "qwen2", "qwen3"])
def test_both_config_styles_give_the_same_model(case, tmp_path):
    """Files of transformers 4 and 5 differ in where they put the rope settings."""
    reference = save_random_model(make_config(case), tmp_path)
    ids = random_ids(1, 90)
    rope = {"rope_type": "default"} | CASES[case][1].get("rope", {})
    raw = read_config(tmp_path)
    neutral = {k: v for k, v in raw.items() if k not in ("rope_parameters", "rope_theta", "dtype")}
    scaling = rope if rope["rope_type"] != "default" else None
    old_key = scaling and {"type": rope["rope_type"]} | scaling
    if old_key:
        del old_key["rope_type"]
    styles = [
        {"rope_parameters": rope | {"rope_theta": 5000.0}, "dtype": "float32"},
        {"rope_theta": 5000.0, "rope_scaling": scaling, "torch_dtype": "float32"},
        {"rope_theta": 5000.0, "rope_scaling": old_key},
    ]
    for style in styles:
        (tmp_path / "config.json").write_text(json.dumps(neutral | style))
        with torch.no_grad():
            expected = reference(ids).logits
        torch.testing.assert_close(run(load(tmp_path), ids), expected, **TOLERANCE)


def changed(kind=Qwen2Config, **fields):
    return kind(**SHAPE).to_dict() | fields


REFUSED = {
    "sliding window": (
        changed(use_sliding_window=True, sliding_window=64),
        "use_sliding_window: expected false, got true",
    ),
    "sliding window of llama": (
        changed(LlamaConfig, sliding_window=4096),
        "sliding_window: expected none, got 4096",
    ),
    "some sliding layers": (
        changed(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        "layer_types: expected only full_attention, got .*sliding_attention",
    ),
    "experts": (
        transformers.Qwen3MoeConfig().to_dict(),
        "model_type: expected one of qwen2, qwen3, llama, got 'qwen3_moe'",
    ),
    "experts in llama": (
        changed(LlamaConfig, num_local_experts=8),
        "num_local_experts: expected a dense model without experts, got 8",
    ),
    "mistral": (
        transformers.MistralConfig().to_dict(),
        "model_type: expected one of qwen2, qwen3, llama, got 'mistral'",
    ),
    "no model_type": ({"hidden_size": 64}, "model_type: expected one of .*, got None"),
    "yarn, version 5": (
        changed(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
        "rope_type: expected default, linear or llama3, got 'yarn'",
    ),
    "yarn, version 4": (
        changed(rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_type: expected default, linear or llama3, got 'yarn'",
    ),
    "incomplete llama3 rope": (
        changed(LlamaConfig, rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling: expected low_freq_factor, high_freq_factor, .* for llama3, got",
    ),
    "odd head_dim": (
        changed(Qwen3Config, head_dim=17),
        "head_dim: expected a multiple of 8 up to 256, got 17",
    ),
    "large head_dim": (
        changed(Qwen3Config, head_dim=264),
        "head_dim: expected a multiple of 8 up to 256, got 264",
    ),
    "uneven groups": (
        changed(num_key_value_heads=3),
        r"num_attention_heads: expected a multiple of num_key_value_heads \(3\), got 4",
    ),
    "activation": (changed(hidden_act="gelu"), "hidden_act: expected silu, got 'gelu'"),
    "quantised": (
        changed(quantization_config={"quant_method": "gptq"}),
        "quantization_config: expected none, got .*gptq",
    ),
    "partial rotary": (
        changed(LlamaConfig, partial_rotary_factor=0.5),
        "partial_rotary_factor: expected none, got 0.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_config_is_refused_by_name(name):
    raw, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        ModelConfig.from_dict(raw)
    assert "\n" not in str(caught.value)


def test_config_without_a_needed_field_is_refused():
    raw = changed()
    del raw["intermediate_size"]
    with pytest.raises(UnsupportedModelError, match="intermediate_size: expected a value, got"):
        ModelConfig.from_dict(raw)
