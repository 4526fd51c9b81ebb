"""Reads the norms of queries and keys from a Hugging Face configuration."""

from collections.abc import Collection
from typing import Any, NamedTuple

from torch_rope._arguments import check_number, message
from torch_rope._config import NUM_HEADS, check_size, get, get_first, text_part

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

# No norms of queries and keys next to the rotation (Llama).
WITHOUT_NORMS = frozenset(
    """
    arcee aria aria_text axk1 axk2 bailing_hybrid bamba bitnet blt blt_global_transformer
    blt_local_decoder blt_local_encoder blt_patcher clvp clvp_decoder clvp_encoder codegen
    cohere2 cohere2_moe cohere_compass cohere_compass_text cohere_compass_vision cosmos3_edge
    cosmos3_edge_text cosmos3_edge_vision csm csm_depth_decoder_model cwm dbrx deepseek_ocr2
    deepseek_ocr2_encoder deepseek_ocr2_sam_vision_model deepseek_ocr2_text deepseek_ocr2_vision
    deepseek_v2 deepseek_v3 deepseek_v32 dia dia_decoder dia_encoder diffllama dinov3_vit
    dots3_note dots3_note_audio_encoder dots3_note_text edgetam_video edgetam_video_mask_decoder
    edgetam_video_prompt_encoder efficientloftr emu3 emu3_text_model emu3_vqgan eomt_dinov3
    ernie4_5 ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text ernie4_5_vl_moe_vision esm
    eurobert evolla exaone4_5_vision falcon falcon_h1 gemma gemma2 glm glm4 glm4_moe_lite glm4v
    glm4v_moe glm4v_moe_text glm4v_moe_vision glm4v_text glm4v_vision glm_image glm_image_text
    glm_image_vision glm_image_vqmodel glm_moe_dsa glm_ocr glm_ocr_text glmasr glmasr_encoder
    gpt_neox gpt_neox_japanese gpt_oss gptj gradium_phonon_tts granite granite4_vision
    granite4_vision_text granite_docling granite_docling_text granite_docling_vision granite_swa
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared gte helium higgs_audio_v2
    hrm_text hy_v4 hy_v4_vl hy_v4_vl_text hy_v4_vl_vision hyperclovax inkling2 inkling2_text
    inkling2_vision jais2 jetmoe jina_embeddings_v3 kimi_k25 kimi_k25_vision
    kyutai_speech_to_text lasr_ctc lasr_encoder lightglue llama llama4_vision_model
    longcat_flash mimi mimi_decoder mimi_encoder mimo_v2_flash minicpm3 minimax
    minimax_m3_vl_vision ministral ministral3 mistral mistral4 mistral_large4
    mistral_large4_text mixtral mlcd_vision_model mllama mllama_text_model mllama_vision_model
    modernbert modernbert-decoder moonshine moonshine_streaming moonshine_streaming_encoder
    moshi moshi_depth muse_glimmer_vision muse_spark_vision musicflamingo nemotron
    nemotron3_diarization nemotron3_diarization_audio neucodec nomic_bert olmo
    openai_privacy_filter paddleocr_vl paddleocr_vl_text paddleocr_vl_vision phi3
    phi4_multimodal phi4_multimodal_audio phi4_multimodal_vision phimoe pixtral pocket_tts
    pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder
    pocket_tts_audio_tokenizer_encoder qwen2 qwen2_5_omni qwen2_5_omni_audio_encoder
    qwen2_5_omni_bigvgan qwen2_5_omni_dit qwen2_5_omni_talker qwen2_5_omni_text
    qwen2_5_omni_thinker qwen2_5_omni_token2wav qwen2_5_omni_vision_encoder qwen2_5_vl
    qwen2_5_vl_text qwen2_5_vl_vision qwen2_moe qwen2_vl qwen2_vl_text qwen2_vl_vision
    qwen3_5_moe_vision qwen3_5_vision qwen3_omni_moe_vision_encoder qwen3_vl_moe_vision
    qwen3_vl_vision qwen4_exp_vision recurrent_gemma roformer sam2_video sam2_video_mask_decoder
    sam2_video_prompt_encoder sam3 sam3_detr_decoder sam3_detr_encoder sam3_geometry_encoder
    sam3_mask_decoder sam3_tracker_video sam3_tracker_video_mask_decoder
    sam3_tracker_video_prompt_encoder sam3_vision_model sam3_vit_model seamless_m4t seed_oss
    smollm3 solar_open starcoder2 step3p5_vision t5_gemma_module t5gemma ultrabert unlimited_ocr
    unlimited_ocr_sam_vision_model unlimited_ocr_text unlimited_ocr_vision
    unlimited_ocr_vision_encoder vaultgemma video_llama_3 video_llama_3_vision vjepa2
    voxtral_realtime voxtral_realtime_encoder voxtral_realtime_text wav2vec2-bert
    wav2vec2-conformer xcodec2 youtu zamba2
    """.split()  # noqa: SIM905
)

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
    """Options of ``QKNormRotaryEmbedding``; None for those that the caller passes."""

    eps: float | None
    weight_offset: float
    norm_last: bool
    num_heads: tuple[int, int] | None
    has_weight: bool


def read_norms(function: str, config: Any, given: Collection[str]) -> NormConfig:
    """Reads a configuration, an object or a dictionary.

    Args:
        function: The public name that messages have.
        config: The configuration.
        given: The names of options that are not read.
    """
    config, model_type = text_part(function, config)
    if model_type in UNSUPPORTED or model_type in WITHOUT_NORMS:
        rule = "have RMSNorms of queries and keys next to the rotation"
        got = f"{model_type}, which has {UNSUPPORTED.get(model_type, 'none')}"
        raise ValueError(message(function, "config", rule, got))
    for switch in _SWITCHES:
        if get(config, switch) is False:
            rule = "be True for a model with norms of queries and keys"
            raise ValueError(message(function, switch, rule, "False"))
    over_heads = model_type in OVER_HEADS or get(config, "qk_norm_type") == "olmo"  # Molmo 2.
    return NormConfig(
        eps=None if "eps" in given else _eps(function, config),
        weight_offset=1.0 if model_type in OFFSET_BY_ONE else 0.0,
        norm_last=model_type in AFTER_ROTATION,
        num_heads=(
            _num_heads(function, config) if over_heads and "num_heads" not in given else None
        ),
        has_weight=model_type not in WITHOUT_WEIGHT,
    )


def _eps(function: str, config: Any) -> float:
    for key in _EPS:
        eps = get(config, key)
        if eps is not None:
            check_number(function, key, eps)
            return float(eps)
    rule = "have rms_norm_eps or norm_eps (or pass eps=)"
    raise ValueError(message(function, "config", rule, "a configuration without"))


def _num_heads(function: str, config: Any) -> tuple[int, int]:
    """Returns the numbers of query and key heads."""
    num_heads = get_first(config, *NUM_HEADS)
    if num_heads is None:
        rule = "have num_attention_heads (or pass num_heads=)"
        raise ValueError(message(function, "config", rule, "a configuration without"))
    check_size(function, "num_attention_heads", num_heads)
    num_key_heads = get(config, "num_key_value_heads")
    if num_key_heads is None:
        num_key_heads = num_heads
    check_size(function, "num_key_value_heads", num_key_heads)
    return int(num_heads), int(num_key_heads)
