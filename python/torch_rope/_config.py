"""What a Hugging Face configuration says about rotary position embedding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# The types whose trained length is the configuration's where the dictionary has none.
_WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")

# Names that types had in configurations of their time.
_NEWER_TYPES = {"mrope": "default", "su": "longrope"}

# Names that sizes have in dictionaries; an object has the first of each.
_HEAD_DIM = ("head_dim", "qk_rope_head_dim", "attention_head_dim", "kv_channels")
_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
_NUM_HEADS = ("num_attention_heads", "n_head", "n_heads")


class RotaryConfig(NamedTuple):
    """The arguments of ``frequencies``, and the sections of M-RoPE."""

    rotary_dim: int
    rope_parameters: dict[str, Any]
    max_position_embeddings: int | None
    mrope_section: list[int] | None


def read_config(config: Any, layer_type: str | None) -> RotaryConfig:
    """Reads a configuration, an object or a dictionary, of newer or older form."""
    config = _get(config, "text_config") or config
    parameters = _rope_parameters(config, layer_type)
    if layer_type is not None:
        config = _of_layer_type(config, layer_type)

    max_position_embeddings = _get(config, "max_position_embeddings")
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    parameters["rope_type"] = _NEWER_TYPES.get(rope_type, rope_type)
    _set_default(parameters, "rope_theta", config, "rope_theta", "rotary_emb_base")
    if parameters["rope_theta"] is None:
        parameters["rope_theta"] = 10000.0
    _set_default(parameters, "partial_rotary_factor", config, "partial_rotary_factor", "rotary_pct")

    if parameters["rope_type"] in _WITH_TRAINED_LENGTH:
        own = _get(config, "original_max_position_embeddings")
        if own is not None and layer_type is None:  # As Phi-3 has it.
            parameters["original_max_position_embeddings"] = own
        _set_default(
            parameters, "original_max_position_embeddings", config, "max_position_embeddings"
        )
    if parameters["rope_type"] == "yarn" and parameters.get("factor") is None:
        trained = parameters.get("original_max_position_embeddings")
        if trained is not None and max_position_embeddings is not None:
            parameters["factor"] = max_position_embeddings / trained
    return RotaryConfig(
        _rotary_dim(config, parameters),
        parameters,
        max_position_embeddings,
        parameters.get("mrope_section"),
    )


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _get_first(config: Any, *keys: str) -> Any:
    """Returns what the configuration has under the first key that it has, or None."""
    return next((value for key in keys if (value := _get(config, key)) is not None), None)


def _set_default(parameters: dict[str, Any], key: str, config: Any, *keys: str) -> None:
    """Sets what is missing to what the configuration has under the first key that it has."""
    if parameters.get(key) is None:
        parameters[key] = _get_first(config, *keys)


def _rope_parameters(config: Any, layer_type: str | None) -> dict[str, Any]:
    """Returns a copy of the dictionary, for a layer type where each has its own."""
    parameters = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    by_type = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if not by_type and layer_type is None:
        return dict(parameters)
    if layer_type not in by_type:
        known = ", ".join(sorted(by_type)) or "none: all layers are alike"
        raise ValueError(
            "torch_rope.RotaryEmbedding.from_config(): expected layer_type to be one of those with "
            f"rope_parameters ({known}), but got {layer_type!r}"
        )
    return dict(by_type[layer_type])


def _of_layer_type(config: Any, layer_type: str) -> Any:
    """Returns the configuration with what is different in the layers of a type, such as sizes."""
    if not isinstance(config, Mapping):
        is_heterogeneous = getattr(config, "is_heterogeneous", False)
        return config.per_layer_config[layer_type] if is_heterogeneous else config
    types = config.get("layer_types") or []
    for layer, changes in (config.get("per_layer_config") or {}).items():
        if types[int(layer)] == layer_type:
            return {**config, **changes}
    return config


def _rotary_dim(config: Any, parameters: Mapping[str, Any]) -> int:
    is_proportional = parameters["rope_type"] == "proportional"
    own = ("global_head_dim",) if is_proportional else ()  # As Gemma 4 has it.
    head_dim = _get_first(config, *own, *_HEAD_DIM)
    if head_dim is None:
        hidden_size, num_heads = _get_first(config, *_HIDDEN_SIZE), _get_first(config, *_NUM_HEADS)
        if hidden_size is None or num_heads is None:
            raise ValueError(
                "torch_rope.RotaryEmbedding.from_config(): expected config to have head_dim, or "
                "hidden_size and num_attention_heads, but they are missing"
            )
        head_dim = hidden_size // num_heads
    if is_proportional:
        return int(head_dim)
    share = parameters["partial_rotary_factor"]
    if share is None:
        return int(_get(config, "rotary_dim") or head_dim)
    return int(head_dim * share)
