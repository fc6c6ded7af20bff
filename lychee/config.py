# SPDX-License-Identifier: Apache-2.0
"""Validated configuration, from a config.json: the decoder's shape, the memory's geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from lychee.errors import MemoryConfigError, UnsupportedModelError

FAMILIES = ("qwen2", "qwen3", "llama")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder; field names follow `transformers`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"):
            if getattr(self, name) < 1:
                raise UnsupportedModelError(
                    f"config: {name}: expected at least 1, got {getattr(self, name)}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"config: num_attention_heads: expected a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_attention_heads}"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise UnsupportedModelError(
                f"config: head_dim: expected a multiple of 8 up to 256, got {self.head_dim}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read a `transformers` config.json of version 4 or 5; refuse what this decoder lacks."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedModelError(
                f"config: model_type: expected one of {', '.join(FAMILIES)}, got {family!r}"
            )
        refuse_unsupported(raw)
        try:
            heads = raw["num_attention_heads"]
            rope = rope_parameters(raw)
            theta = float(rope.pop("rope_theta", raw.get("rope_theta", 10000.0)))
            return cls(
                model_type=family,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=rope if rope.get("rope_type", "default") != "default" else None,
                max_position_embeddings=raw.get("max_position_embeddings", 32768),
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                attention_bias=family == "qwen2" or bool(raw.get("attention_bias", False)),
                output_bias=family != "qwen2" and bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
                qk_norm=family == "qwen3",
                eos_token_ids=as_tuple(raw.get("eos_token_id")),
                bos_token_id=raw.get("bos_token_id"),
                pad_token_id=raw.get("pad_token_id"),
            )
        except KeyError as error:
            raise UnsupportedModelError(
                f"config: {error.args[0]}: expected a value, got nothing"
            ) from error

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary inverse frequencies [head_dim / 2], float64, with Llama 3 scaling applied."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        inverse = self.rope_theta**-exponent
        if self.rope_scaling is None:
            return inverse
        factor = self.rope_scaling["factor"]
        if self.rope_scaling["rope_type"] == "linear":
            return inverse / factor
        low = self.rope_scaling["low_freq_factor"]
        high = self.rope_scaling["high_freq_factor"]
        original = self.rope_scaling["original_max_position_embeddings"]
        turns = original * inverse / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * ((1 - blend) / factor + blend)


def as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    """Normalise a token id that configs give as nothing, a number or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """Rope settings from either config style: `rope_parameters` (5.x) or `rope_scaling` (4.x)."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    kind = rope.get("rope_type", "default")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in needed:
        raise UnsupportedModelError(
            f"config: rope_type: expected default, linear or llama3, got {kind!r}"
        )
    missing = [name for name in needed[kind] if name not in rope]
    if missing:
        raise UnsupportedModelError(
            f"config: rope_scaling: expected {', '.join(missing)} for {kind}, got {sorted(rope)}"
        )
    for name in (*needed[kind], "rope_theta"):
        number = rope.get(name, raw.get(name, 1.0))
        if not isinstance(number, (int, float)) or isinstance(number, bool) or number <= 0:
            raise UnsupportedModelError(
                f"config: {name}: expected a positive number, got {number!r}"
            )
    return rope


def refuse_unsupported(raw: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for features that would silently change the result."""
    if raw.get("use_sliding_window"):
        raise UnsupportedModelError("config: use_sliding_window: expected false, got true")
    if raw.get("model_type") != "qwen2" and raw.get("sliding_window") and "layer_types" not in raw:
        raise UnsupportedModelError(
            f"config: sliding_window: expected none, got {raw['sliding_window']}"
        )
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise UnsupportedModelError(
            f"config: layer_types: expected only full_attention, got {sorted(layer_types)}"
        )
    for name in ("num_experts", "num_local_experts"):
        if raw.get(name):
            raise UnsupportedModelError(
                f"config: {name}: expected a dense model without experts, got {raw[name]}"
            )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"config: hidden_act: expected silu, got {activation!r}")
    for name in ("quantization_config", "partial_rotary_factor"):
        if raw.get(name) not in (None, 1.0):
            raise UnsupportedModelError(f"config: {name}: expected none, got {raw[name]}")


# The prompts that a checkpoint may bring with it: of the reading loop, and of training on texts.
TEMPLATES = ("update", "answer", "no_memory", "recite", "continue")


@dataclass(frozen=True)
class MemoryConfig:
    """Geometry of the compressed memory and limits of the reading loop.

    Names without prefix; in config.json each stands as `lychee_memory_<name>`, as the released
    checkpoints have it (window, ratio, param, embed_init), next to this project's own (chunk,
    size, answer, question, passes, together, templates, cut, margin).

    `margin` is the number of blank tokens that are compressed behind a chunk's text, as a part of
    its `chunk` tokens: what a token says may be kept by the memory tokens of the next few groups,
    which the last tokens of a chunk would not have.
    """

    window: int = 1024
    chunk: int = 1024
    ratio: int = 4
    param: tuple[str, ...] = ()
    embed_init: str = "eos"
    size: int = 1024
    answer: int = 128
    question: int = 1024
    passes: int = 1
    together: int = 1
    cut: str = "tokens"
    margin: int = 0
    templates: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.ratio < 1 or self.window % self.ratio:
            raise MemoryConfigError(
                f"ratio: expected a divisor of the window of {self.window} tokens, got {self.ratio}"
            )
        if self.chunk < self.window or self.chunk % self.window:
            raise MemoryConfigError(
                f"chunk: expected a multiple of the window of {self.window} tokens, "
                f"got {self.chunk}"
            )
        unknown = set(self.param) - set("qkvo")
        if unknown:
            raise MemoryConfigError(
                f"lychee_memory_param: expected letters of q, k, v, o, got {sorted(unknown)}"
            )
        if self.embed_init not in ("eos", "bos"):
            raise MemoryConfigError(
                f"lychee_memory_embed_init: expected eos or bos, got {self.embed_init!r}"
            )
        if self.cut not in ("tokens", "sentence"):
            raise MemoryConfigError(
                f"lychee_memory_cut: expected tokens or sentence, got {self.cut!r}"
            )
        if not 0 <= self.margin < self.chunk:
            raise MemoryConfigError(
                f"margin: expected 0 to {self.chunk - 1} of the chunk's tokens, got {self.margin}"
            )
        for name, text in self.templates.items():
            if name not in TEMPLATES or not isinstance(text, str):
                raise MemoryConfigError(
                    f"lychee_memory_templates: expected texts named {', '.join(TEMPLATES)}, "
                    f"got {name}: {text!r:.40}"
                )
        for name in ("size", "answer", "question", "passes", "together"):
            if getattr(self, name) < 1:
                raise MemoryConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def text(self) -> int:
        """Tokens of the text that a full chunk holds."""
        return self.chunk - self.margin

    @property
    def slots(self) -> int:
        """Memory tokens of a full chunk, which the prompt's positions start from."""
        return self.chunk // self.ratio

    @classmethod
    def from_dict(cls, raw: dict[str, Any], **overrides: Any) -> MemoryConfig:
        """Read the `lychee_memory_*` fields of a config.json; `overrides` win where not None."""
        refused = {
            "lychee_memory_attn": "full-coverage",
            "lychee_memory_pos": "interleave",
            "lychee_memory_sink_size": 0,
            "lychee_memory_parallel_window": 1,
        }
        for name, expected in refused.items():
            if raw.get(name, expected) != expected:
                raise MemoryConfigError(f"config: {name}: expected {expected!r}, got {raw[name]!r}")
        window = overrides.get("window") or raw.get("lychee_memory_window", 1024)
        stride = raw.get("lychee_memory_stride", window)
        if stride != raw.get("lychee_memory_window", window):
            raise MemoryConfigError(
                f"config: lychee_memory_stride: expected the window {window}, got {stride}"
            )
        values: dict[str, Any] = {"window": window, "chunk": window}
        for name in (item.name for item in fields(cls)):
            if name not in ("window", "ratio", "param") and f"lychee_memory_{name}" in raw:
                values[name] = raw[f"lychee_memory_{name}"]
        ratio = raw.get("lychee_memory_ratio", 4)
        if isinstance(ratio, list):
            # Released configs list every ratio trained; 4 is the paper's choice among them.
            ratio = 4 if 4 in ratio else ratio[0]
        values["ratio"] = ratio
        values["param"] = tuple(raw.get("lychee_memory_param") or ())
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Fields for config.json, readable by `from_dict`."""
        values = {f"lychee_memory_{name}": value for name, value in vars(self).items()}
        values["lychee_memory_ratio"] = [self.ratio]
        values["lychee_memory_param"] = list(self.param)
        values["lychee_memory_stride"] = self.window
        return values
