"""Reads rotary position embedding from a Hugging Face configuration."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_rope._arguments import check_integer, check_number, kind_of, message

# The types whose trained length defaults to the configuration's.
_WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")

# Older names of types.
_NEWER_TYPES = {"mrope": "default", "su": "longrope"}

# Keys of rope_parameters that do not affect the angles. Llama 4's and Ministral 3's beta scales
# queries by position after the rotation; the trained length is read from the configuration itself.
_NOT_OF_ANGLES = ("type", "finetuned", "llama_4_scaling_beta", "max_position_embeddings")

# Configuration keys of code outside transformers that change the angles, with their neutral values.
_UNREADABLE = {
    "rope_ratio": (1, 1.0),  # ChatGLM
    "rotary_emb_scale_base": (),  # NomicBERT, XPos
    "rotary_scaling_factor": (1, 1.0),  # NomicBERT
}

# The model types in transformers 5.24 whose code pairs neighbouring elements (2n, 2n + 1) of
# queries and keys. Some reorder pairs into halves, which does not change attention scores. For
# multimodal models both the text part and the whole are listed.
INTERLEAVED_MODEL_TYPES = frozenset(
    [
        "axk1",
        "axk2",
        "bailing_hybrid",
        "blt",
        "blt_global_transformer",
        "blt_local_decoder",
        "blt_local_encoder",
        "blt_patcher",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "dots3_note",
        "dots3_note_text",
        "efficientloftr",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe_text",
        "glm",
        "glm4",
        "glm4_moe_lite",
        "glm4v",
        "glm4v_text",
        "glm_moe_dsa",
        "glm_ocr",
        "glm_ocr_text",
        "gptj",
        "helium",
        "hy_v4_vl",
        "hy_v4_vl_text",
        "llama4",
        "llama4_text",
        "longcat_flash",
        "mistral4",
        "mistral_large4",
        "mistral_large4_text",
        "moonshine",
        "moonshine_streaming",
        "openai_privacy_filter",
        "pe_audio_encoder",
        "pe_audio_video_encoder",
        "pe_video_encoder",
        "roformer",
        "sarvam_mla",
        "youtu",
    ]
)

# The model types in transformers 5.24 that rotate by negative angles.
_BACKWARDS = ("nanochat",)

# M-RoPE that mrope_frequencies does not support: the two elements of a pair follow different axes,
# or height and width alternate before time.
_OTHER_SECTIONS = frozenset(
    ("hunyuan_vl", "hunyuan_vl_text", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text")
)

# The base for layers with sliding attention, in dictionaries with two bases.
_LOCAL_THETA = ("rope_local_base_freq", "local_rope_theta", "swa_rope_theta")

# The names of sizes in dictionaries; objects always have the first.
_HEAD_DIM = ("head_dim", "qk_rope_head_dim", "attention_head_dim", "kv_channels")
_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
NUM_HEADS = ("num_attention_heads", "n_head", "n_heads")


class RotaryConfig(NamedTuple):
    """The arguments of ``frequencies``, the size of a head, M-RoPE sections, pair convention."""

    rotary_dim: int
    head_dim: int
    rope_parameters: dict[str, Any]
    max_position_embeddings: int | None
    mrope_section: list[int] | None
    interleaved: bool


def read_config(function: str, config: Any, layer_type: str | None) -> RotaryConfig:
    """Reads a configuration, an object or a dictionary, in the newer or older form.

    Args:
        function: The public name that messages have.
        config: The configuration.
        layer_type: The layer type, for configurations that differ between types.
    """
    config, model_type = text_part(function, config)
    _check_readable(function, config)
    if model_type in _BACKWARDS:
        rule = "rotate by positive angles (the operators have conjugate=True)"
        raise ValueError(message(function, "config", rule, f"that of {model_type}"))
    parameters = _rope_parameters(function, config, layer_type)
    if layer_type is not None:
        config = _of_layer_type(config, layer_type)

    max_position_embeddings = get(config, "max_position_embeddings")
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    parameters["rope_type"] = _NEWER_TYPES.get(rope_type, rope_type)
    if rope_type == "axial":
        rule = "be for positions along one axis (for images, use axial_frequencies)"
        raise ValueError(message(function, "rope_type", rule, repr(rope_type)))
    _set_default(
        parameters, "rope_theta", config, "rope_theta", "rotary_emb_base", "rotary_embedding_base"
    )
    if parameters["rope_theta"] is None:
        parameters["rope_theta"] = 10000.0
    _set_default(parameters, "partial_rotary_factor", config, "partial_rotary_factor", "rotary_pct")

    if parameters["rope_type"] in _WITH_TRAINED_LENGTH:
        own = get(config, "original_max_position_embeddings")
        if own is not None and layer_type is None:  # Phi-3.
            parameters["original_max_position_embeddings"] = own
        _set_default(
            parameters, "original_max_position_embeddings", config, "max_position_embeddings"
        )
    if parameters["rope_type"] == "yarn" and parameters.get("factor") is None:
        trained = parameters.get("original_max_position_embeddings")
        if trained is not None and max_position_embeddings is not None:
            parameters["factor"] = max_position_embeddings / trained
    head_dim = _head_dim(function, config, parameters)
    rotary_dim = _rotary_dim(function, config, parameters, head_dim)
    _read_own_keys(parameters, rotary_dim)
    sections = parameters.get("mrope_section")
    if sections is not None and model_type in _OTHER_SECTIONS:
        rule = "have sections that mrope_frequencies supports"
        raise ValueError(message(function, "config", rule, f"those of {model_type}"))
    return RotaryConfig(
        rotary_dim,
        head_dim,
        parameters,
        max_position_embeddings,
        sections,
        _is_interleaved(config, model_type),
    )


def text_part(function: str, config: Any) -> tuple[Any, str | None]:
    """Returns the part of a configuration that is about text, and its model type."""
    _check_config(function, config)
    model_type = get(config, "model_type")
    config = get(config, "text_config") or config
    return config, get(config, "model_type") or model_type


def _check_config(function: str, config: Any) -> None:
    """Raises unless ``config`` can be a configuration or its dictionary."""
    hint = ""
    if isinstance(config, nn.Module):
        hint = " (pass its model.config)"
    elif isinstance(config, type):
        hint = f" {config.__name__} (pass an instance)"
    elif isinstance(config, str | bytes | os.PathLike):
        hint = " (read the file with json.load)"
    elif isinstance(config, Mapping) or not (
        config is None
        or isinstance(config, Tensor | Sequence | float)
        or hasattr(config, "__int__")
    ):
        return
    rule = "be a Hugging Face configuration or its dictionary"
    raise TypeError(message(function, "config", rule, f"{kind_of(config)}{hint}"))


def _check_readable(function: str, config: Any) -> None:
    """Raises for keys with an unknown effect on the angles."""
    for key, harmless in _UNREADABLE.items():
        value = get(config, key)
        if value is not None and value not in harmless:
            rule = "be absent, since its effect on the angles is unknown"
            raise ValueError(message(function, key, rule, repr(value)))


def _read_own_keys(parameters: dict[str, Any], rotary_dim: int) -> None:
    """Translates model-specific keys into those of ``frequencies``, where possible."""
    if parameters.get("attn_factor") == 1:
        del parameters["attn_factor"]
    # HunYuan: "dynamic" with alpha has a base that does not depend on the length.
    alpha = parameters.get("alpha")
    if not alpha:
        parameters.pop("alpha", None)
    elif parameters["rope_type"] == "dynamic":
        parameters["rope_type"] = "default"
        parameters["rope_theta"] *= parameters.pop("alpha") ** (rotary_dim / (rotary_dim - 2))
    # Phi-3.5-MoE: attention factors within and beyond the trained length.
    if parameters["rope_type"] == "longrope":
        short_mscale = parameters.get("short_mscale")
        if short_mscale is not None and short_mscale == parameters.get("long_mscale"):
            parameters["attention_factor"] = parameters.pop("short_mscale")
            del parameters["long_mscale"]
    elif parameters["rope_type"] == "default":
        for key in ("short_mscale", "long_mscale"):
            parameters.pop(key, None)
    # Qwen3-Omni has both keys.
    interleaved = parameters.pop("interleaved", None)
    if parameters.get("mrope_interleaved") is None and parameters.get("mrope_section") is not None:
        parameters["mrope_interleaved"] = interleaved
    for key in _NOT_OF_ANGLES:
        parameters.pop(key, None)


def _is_interleaved(config: Any, model_type: str | None) -> bool:
    given = get(config, "rope_interleave")
    return bool(given) if given is not None else model_type in INTERLEAVED_MODEL_TYPES


def get(config: Any, key: str) -> Any:
    """Returns the value of a key of a configuration, or None."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def get_first(config: Any, *keys: str) -> Any:
    """Returns the value of the first key that the configuration has, or None."""
    return next((value for key in keys if (value := get(config, key)) is not None), None)


def _set_default(parameters: dict[str, Any], key: str, config: Any, *keys: str) -> None:
    """Sets a missing parameter to the first of ``keys`` that the configuration has."""
    if parameters.get(key) is None:
        parameters[key] = get_first(config, *keys)


def _rope_parameters(function: str, config: Any, layer_type: str | None) -> dict[str, Any]:
    """Returns a copy of the parameters, those of ``layer_type`` if each type has its own."""
    parameters = get(config, "rope_parameters") or get(config, "rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        rule = "be a dictionary"
        raise TypeError(message(function, "rope_parameters", rule, kind_of(parameters)))
    local = get_first(config, *_LOCAL_THETA)
    if local is not None and isinstance(config, Mapping) and "sliding_attention" not in parameters:
        # Older files of Gemma 3 and ModernBERT; objects have converted this already.
        own = get_first(config, "global_rope_theta", "rope_theta")
        full = dict(parameters) if own is None else {"rope_theta": own, **parameters}
        parameters = {"full_attention": full, "sliding_attention": {"rope_theta": local}}
    by_type = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if not by_type and layer_type is None:
        return dict(parameters)
    if layer_type not in by_type:
        known = ", ".join(sorted(by_type)) or "none: all layers use the same"
        raise ValueError(
            f"{function}(): expected layer_type to be one of those with rope_parameters ({known}), "
            f"but got {layer_type!r}"
        )
    return dict(by_type[layer_type])


def _of_layer_type(config: Any, layer_type: str) -> Any:
    """Returns the configuration with the overrides of a layer type, such as sizes."""
    if not isinstance(config, Mapping):
        is_heterogeneous = getattr(config, "is_heterogeneous", False)
        return config.per_layer_config[layer_type] if is_heterogeneous else config
    types = config.get("layer_types") or []
    for layer, changes in (config.get("per_layer_config") or {}).items():
        if types[int(layer)] == layer_type:
            return {**config, **changes}
    return config


def _head_dim(function: str, config: Any, parameters: Mapping[str, Any]) -> int:
    is_proportional = parameters["rope_type"] == "proportional"
    own = ("global_head_dim",) if is_proportional else ()  # Gemma 4.
    head_dim = get_first(config, *own, *_HEAD_DIM)
    if head_dim is None:
        hidden_size, num_heads = get_first(config, *_HIDDEN_SIZE), get_first(config, *NUM_HEADS)
        if hidden_size is None or num_heads is None:
            raise ValueError(
                f"{function}(): expected config to have head_dim, or hidden_size and "
                "num_attention_heads, but they are missing"
            )
        check_size(function, "hidden_size", hidden_size)
        check_size(function, "num_attention_heads", num_heads)
        head_dim = hidden_size // num_heads
    check_size(function, "head_dim", head_dim)
    return int(head_dim)


def _rotary_dim(function: str, config: Any, parameters: Mapping[str, Any], head_dim: int) -> int:
    if parameters["rope_type"] == "proportional":
        return head_dim
    share = parameters["partial_rotary_factor"]
    if share is None:
        return int(get(config, "rotary_dim") or head_dim)
    check_number(function, "partial_rotary_factor", share)
    if not (share > 0 and math.isfinite(share)):
        rule = "be positive and finite"
        raise ValueError(message(function, "partial_rotary_factor", rule, repr(share)))
    return int(head_dim * share)


def check_size(function: str, key: str, value: Any) -> None:
    """Raises unless a size in a configuration is a positive integer."""
    check_integer(function, key, value)
    if value < 1:
        raise ValueError(message(function, key, "be at least 1", value))
