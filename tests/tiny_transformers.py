"""Tiny random models of every family of transformers that rotates queries and keys.

A family is a folder of ``transformers.models``. Its models are built from their own configurations,
made small, and are given random inputs; nothing is downloaded.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch_rope.integrations.transformers import FUNCTIONS

VOCABULARY = 99

# The numbers that make a configuration small, by the names of its fields.
SMALL: dict[str, Any] = {
    name: value
    for names, value in {
        "hidden_size d_model n_embd dim embed_dim width model_dim out_hidden_size projection_dim "
        "text_hidden_size output_dim backbone_hidden_size condition_dim": 64,
        "intermediate_size ffn_dim n_inner d_ff mlp_dim ffn_hidden_size encoder_ffn_dim "
        "decoder_ffn_dim": 64,
        "moe_intermediate_size shared_expert_intermediate_size": 32,
        "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers "
        "num_decoder_layers num_encoder_layers decoder_num_hidden_layers "
        "encoder_num_hidden_layers": 2,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads": 4,
        "num_key_value_heads num_kv_heads encoder_num_key_value_heads "
        "decoder_num_key_value_heads": 2,
        "head_dim attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim q_lora_rank "
        "kv_lora_rank": 16,
        "vocab_size decoder_vocab_size text_vocab_size audio_vocab_size": VOCABULARY,
        # Every expert is chosen: a choice that rounding changes would compare nothing.
        "num_experts n_routed_experts num_local_experts moe_num_experts num_experts_per_tok moe_k "
        "moe_topk num_experts_per_token top_k_experts": 4,
        "n_group topk_group n_groups": 1,
        "max_position_embeddings": 128,
        "image_size": 32,
        "patch_size sliding_window": 8,
        "mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_key_heads": 4,
        "mamba_d_head mamba_head_dim": 32,
        "mamba_d_state ssm_state_size linear_key_head_dim linear_value_head_dim "
        "mamba_chunk_size chunk_size": 16,
        "pad_token_id audio_pad_token_id": 0,
        "bos_token_id decoder_start_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout hidden_dropout attention_probs_dropout_prob hidden_dropout_prob "
        "resid_pdrop embd_pdrop attn_pdrop dropout attention_dropout_prob": 0.0,
    }.items()
    for name in names.split()
}

# Of these, the ones that are set where the configuration leaves them open, too.
OPEN = ("head_dim", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "image_size")
OPEN += ("num_key_value_heads", "mamba_n_heads", "n_routed_experts", "num_experts_per_tok")

ALL_HEADS = {
    "num_key_value_heads": 4,
    "num_kv_heads": 4,
    "encoder_num_key_value_heads": 4,
    "decoder_num_key_value_heads": 4,
}

# What is tried for a model, one after the other: families differ in what they allow.
VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    ALL_HEADS,
    ALL_HEADS | {"rope_interleave": False},
    {"num_hidden_layers": 4},
)

# What a configuration needs besides.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
NEEDED: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 4}},
    "ChameleonVQVAEConfig": {"base_channels": 32, "num_embeddings": 64, "resolution": 32},
    "CodeGenConfig": {"rotary_dim": 8},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {
        "num_experts": 4,
        "top_k_experts": 4,
        "moe_intermediate_size": 32,
    },
    "Dots1Config": {"n_shared_experts": 1},
    "Dots3NoteVisionConfig": {"adapter_in_dim": 64},
    "Ernie4_5_VLMoeTextConfig": {
        "hidden_size": 512,
        "head_dim": 128,  # The sections of its M-RoPE are fixed.
        "num_key_value_heads": 4,
        "moe_intermediate_size": [32, 32],
    },
    "EsmConfig": {"position_embedding_type": "rotary"},
    "FalconH1Config": {"mamba_d_ssm": 128},
    "GPTJConfig": {"rotary_dim": 8},
    "Gemma3nTextConfig": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    "Gemma4TextConfig": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    "Glm4MoeConfig": {"use_qk_norm": True},
    "Glm4vMoeTextConfig": {
        "rope_parameters": SECTIONS | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    },
    "Glm4vTextConfig": {"rope_parameters": SECTIONS},
    "GlmImageTextConfig": {"rope_parameters": SECTIONS},
    "GlmOcrTextConfig": {"rope_parameters": SECTIONS},
    "GraniteMoeHybridConfig": {
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "HunYuanVLTextConfig": {"rope_parameters": SECTIONS | {"mrope_section": [2, 2, 2, 2]}},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MuseGlimmerConfig": {"projector_hidden_size": 64},
    "PaddleOCRTextConfig": {"rope_parameters": SECTIONS},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "Qwen2VLTextConfig": {"rope_parameters": SECTIONS},
    "Qwen2_5OmniTextConfig": {"rope_parameters": SECTIONS},
    "Qwen2_5_VLTextConfig": {"rope_parameters": SECTIONS},
    "Step3p7TextConfig": {"sliding_window": 8},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"], "use_mem_rope": True},
    "ZayaConfig": {"num_experts_per_tok": 1},
}

LISTS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")


def families() -> dict[str, str]:
    """Returns the modeling module of each family that defines one of the functions."""
    assert transformers.__file__ is not None
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for path in sorted(models.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if any(f"def {function}(" in text for function in FUNCTIONS):
            found[path.parent.name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


def small_config(config_class: type, variation: dict[str, Any]) -> Any:
    """Makes a configuration, and those inside it, small."""
    default = config_class()
    known = set(getattr(config_class, "__dataclass_fields__", ()))
    numbers = SMALL | variation
    fields: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PreTrainedConfig):
            fields[name] = small_config(type(value), variation)
        elif name not in known:
            continue
        elif name in LISTS_OF_LAYERS and isinstance(value, list | tuple) and len(value) > 2:
            fields[name] = list(dict.fromkeys(value))  # One of each kind.
        elif name in ("rope_parameters", "rope_scaling") and "mrope_section" in str(value):
            fields[name] = with_sections(value, numbers["head_dim"] // 2)
        elif name in numbers and (
            (isinstance(value, int | float) and not isinstance(value, bool))
            or (value is None and name in OPEN)
            or (name in variation)
        ):
            fields[name] = numbers[name]

    layers = max(2, *(len(fields.get(name, ())) for name in LISTS_OF_LAYERS))
    for name in set(LISTS_OF_LAYERS) & set(fields):
        fields[name] = (fields[name] * layers)[:layers]
    if layers > 2 and "num_hidden_layers" in fields:
        fields["num_hidden_layers"] = layers
    return config_class(**fields | NEEDED.get(config_class.__name__, {}))


def with_sections(rope_parameters: Any, pairs: int) -> Any:
    """Spreads the pairs of a head over the sections of M-RoPE."""
    if not isinstance(rope_parameters, dict):
        return rope_parameters
    changed = {name: with_sections(value, pairs) for name, value in rope_parameters.items()}
    if changed.get("mrope_section"):
        count = len(changed["mrope_section"])
        rotated = int(pairs * changed.get("partial_rotary_factor", 1.0))
        sections = [rotated // count] * count
        sections[-1] += rotated - sum(sections)
        changed["mrope_section"] = sections
    return changed


def inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Draws inputs that the model may take."""
    names = list(inspect.signature(type(model).forward).parameters)
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = torch.randint(3, VOCABULARY, (2, 11), generator=generator)
    decoder = {"decoder_input_ids": tokens} if "decoder_input_ids" in names else {}
    channels = next(
        (
            getattr(config, name)
            for name in ("num_channels", "in_channels", "in_chans")
            if isinstance(getattr(config, name, None), int)
        ),
        3,
    )
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names), None)
    if grid is not None and "input_ids" not in names:
        patches = "hidden_states" if "hidden_states" in names else "pixel_values"
        times = next(
            (
                getattr(config, name)
                for name in ("temporal_patch_size", "patch_temporal")
                if hasattr(config, name)
            ),
            1,
        )
        size = config.patch_size
        merged = {"merge_sizes": torch.tensor([2, 2])} if "merge_sizes" in names else {}
        grids = {grid: torch.tensor([[1, 4, 4], [1, 4, 4]])} | merged
        yield {patches: noise(32, channels * times * size**2)} | grids
        yield {patches: noise(32, channels, size, size)} | grids
        yield {patches: noise(1, 32, channels, size, size)} | grids
    elif "input_ids" in names:
        yield {"input_ids": tokens} | decoder
        if hasattr(config, "num_codebooks"):  # A token of text, and one of each codebook.
            yield {"input_ids": tokens[..., None].repeat(1, 1, config.num_codebooks + 1)}
        if "image_attention_mask" in names:
            yield {
                "input_ids": tokens,
                "pixel_values": noise(2, 1, channels, 32, 32),
                "image_attention_mask": torch.ones(2, 11, 1, dtype=torch.long),
            }
        elif "pixel_values" in names:
            yield {"input_ids": tokens, "pixel_values": noise(2, 1, channels, 32, 32)}
    elif "pixel_values" in names:
        yield {"pixel_values": noise(2, channels, 32, 32)}
        yield {"pixel_values": noise(1, 2, channels, 32, 32)}  # A pair of images.
    elif "input_features" in names:
        bands = getattr(config, "num_mel_bins", 80)
        yield {"input_features": noise(2, 64, bands)} | decoder
        yield {"input_features": noise(2, bands, 64)} | decoder
    elif "input_values" in names:
        yield {"input_values": noise(2, 1, 1920)} | decoder
        yield {"input_values": noise(2, 1920)} | decoder
    elif "past_values" in names:
        yield {"past_values": noise(2, 64)}
    elif "inputs_embeds" in names:
        yield {"inputs_embeds": noise(2, 11, config.hidden_size)}


@dataclass
class Subject:
    """A model that calls some of the functions, and what it is given.

    Attributes:
        model, inputs: The model, and what it is given.
        functions: The names of the functions that it calls.
        classes: The names of its layers' classes.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    functions: frozenset[str]
    classes: frozenset[str]


# Models whose classes end so come first.
PREFERRED = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForMaskedLM", "Model", "")


def subjects(
    module: ModuleType, functions: set[str], layers: set[str] | None = None
) -> Iterator[Subject]:
    """Builds models until one of them called each of these functions or has each of these layers.

    Args:
        module: The models' module.
        functions: The names of functions.
        layers: The names of classes.
    """
    missing = set(functions) | (layers or set())
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedModel)
        and value.__module__ == module.__name__
        and not value.__name__.endswith("PreTrainedModel")
    ]
    classes.sort(
        key=lambda cls: next(i for i, end in enumerate(PREFERRED) if cls.__name__.endswith(end))
    )
    for variation in VARIATIONS:
        for model_class in classes:
            if not missing:
                return
            subject = try_to_build(module, model_class, variation)
            if subject is not None and (subject.functions | subject.classes) & missing:
                missing -= subject.functions | subject.classes
                yield subject


def try_to_build(module: ModuleType, model_class: Any, variation: dict[str, Any]) -> Subject | None:
    """Builds a model and runs it, if both can be done."""
    torch.manual_seed(0)
    try:
        model = model_class(small_config(model_class.config_class, variation)).eval()
    except Exception:  # Whatever a family's code says to a configuration that does not suit it.
        return None
    enliven(model)
    for given in inputs(model):
        with calls_watched(module) as called:
            try:
                model(**given)
            except Exception:
                continue
        if called:
            classes = frozenset(type(layer).__name__ for layer in model.modules())
            return Subject(model, given, frozenset(called), classes)
    return None


def enliven(model: nn.Module) -> None:
    """Draws weights so large that attention is far from uniform, and so feels the rotation."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Embedding) and layer.weight.numel():
            with torch.no_grad():
                layer.weight.normal_(0.0, layer.weight.shape[-1] ** -0.5)


@contextmanager
def functions_wrapped(
    module: ModuleType, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Puts something around the module's functions for a while."""
    originals = {name: getattr(module, name) for name in FUNCTIONS if hasattr(module, name)}
    for name, original in originals.items():
        setattr(module, name, wrap(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


@contextmanager
def calls_watched(module: ModuleType) -> Iterator[set[str]]:
    """Gives the names of the module's functions that are called meanwhile."""
    called: set[str] = set()

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            called.add(name)
            return original(*arguments, **options)

        return watched

    with functions_wrapped(module, wrap):
        yield called


def load(family: str) -> ModuleType:
    """Imports the modeling module of a family."""
    return importlib.import_module(families()[family])
