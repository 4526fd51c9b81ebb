"""Reads the norms of queries and keys from a Hugging Face configuration."""

from typing import Any, NamedTuple

from torch_rope._arguments import check_number, message
from torch_rope._config import NUM_HEADS, check_size, get, get_first, text_part

_FUNCTION = "torch_rope.QKNormRotaryEmbedding.from_config"

# The model types in transformers 5.24 whose norms differ from Qwen3's, an RMSNorm of each head with
# a weight, before the rotation. For multimodal models both the text part and the whole are listed.

# The weight is added to 1.
OFFSET_BY_ONE = frozenset(
    [
        "gemma3",
        "gemma3_text",
        "minimax_m3_vl",
        "minimax_m3_vl_text",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
        "step3p5",
        "step3p7",
        "t5gemma2",
        "t5gemma2_decoder",
        "t5gemma2_encoder",
        "t5gemma2_text",
    ]
)

# One norm over all heads of a token.
OVER_HEADS = frozenset(["flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmo_hybrid", "olmoe"])

# After the rotation.
AFTER_ROTATION = frozenset(
    [
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hunyuan_vl",
        "hunyuan_vl_text",
        "idefics",
        "llama4",
        "llama4_text",
        "timesfm2_5",
    ]
)

WITHOUT_WEIGHT = frozenset(["llama4", "llama4_text", "neomme"])

# What the layer does not compute.
UNSUPPORTED = {
    "chameleon": "a LayerNorm",
    "cohere": "a LayerNorm",
    "deepseek_v4": "different norms of queries and of compressed keys",
    "dory": "a norm of the sum of squares instead of their mean",
    "esmc": "a LayerNorm",
    "muse_glimmer": "a factor between norm and rotation",
    "muse_glimmer_text": "a factor between norm and rotation",
    "muse_spark": "a factor between norm and rotation",
    "muse_spark_text": "a factor between norm and rotation",
    "nanochat": "a rotation by negative angles",
    "nemotron3_5_transcribe_asr_audio": "a LayerNorm",
    "persimmon": "a LayerNorm",
    "phi": "a LayerNorm",
    "stablelm": "a LayerNorm",
    "zaya": "a norm with a learned temperature",
}

# Keys that switch the norms off.
_SWITCHES = ("use_qk_norm", "qk_layernorm", "qk_layer_norms")

_EPS = ("rms_norm_eps", "norm_eps")


class NormConfig(NamedTuple):
    """Options of ``QKNormRotaryEmbedding``."""

    eps: float
    weight_offset: float
    norm_last: bool
    num_heads: tuple[int, int] | None
    has_weight: bool


def read_norms(config: Any) -> NormConfig:
    """Reads a configuration, an object or a dictionary."""
    config, model_type = text_part(config)
    if model_type in UNSUPPORTED:
        rule = "have RMSNorms of queries and keys next to the rotation"
        got = f"{model_type}, which has {UNSUPPORTED[model_type]}"
        raise ValueError(message(_FUNCTION, "config", rule, got))
    for switch in _SWITCHES:
        if get(config, switch) is False:
            rule = "be True for a model with norms of queries and keys"
            raise ValueError(message(_FUNCTION, switch, rule, "False"))
    eps = get_first(config, *_EPS)
    if eps is None:
        rule = "have rms_norm_eps"
        raise ValueError(message(_FUNCTION, "config", rule, "a configuration without it"))
    check_number(_FUNCTION, "rms_norm_eps", eps)
    over_heads = model_type in OVER_HEADS or get(config, "qk_norm_type") == "olmo"  # Molmo 2.
    return NormConfig(
        eps=float(eps),
        weight_offset=1.0 if model_type in OFFSET_BY_ONE else 0.0,
        norm_last=model_type in AFTER_ROTATION,
        num_heads=_num_heads(config) if over_heads else None,
        has_weight=model_type not in WITHOUT_WEIGHT,
    )


def _num_heads(config: Any) -> tuple[int, int]:
    """Returns the numbers of query and key heads."""
    num_heads = get_first(config, *NUM_HEADS)
    check_size("num_attention_heads", num_heads)
    num_key_heads = get(config, "num_key_value_heads")
    if num_key_heads is None:
        num_key_heads = num_heads
    check_size("num_key_value_heads", num_key_heads)
    return int(num_heads), int(num_key_heads)
