"""What the generic shrinking of configs cannot know about a model type, by its name, in any model that contains it."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "num_key_value_heads": 2,
}
_VOCABULARY_MAP = {"<image>": 200, **{f"IMGIMG{chr(ord('A') + i)}Z": 210 + i for i in range(10)}}
_NO_LAYER_INPUTS = {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
_CODEC = {"num_filters": 4, "depths": [1, 1, 1, 1, 1, 1, 1]}
_MROPE = {**_ROPE, "mrope_section": [2, 3, 3]}
_WITH_MROPE = (  # text parts that fall back on sections of heads of their own size
    "glm4v_text",
    "glm_image_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
    "qwen2_5_omni_talker",
    "hunyuan_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "qwen3_omni_moe_text",
)
# Where a config keeps its rotary parameters.
_ROPE_NAME = "rope_parameters" if hasattr(PretrainedConfig, "convert_rope_params_to_dict") else "rope_scaling"
_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
_MUSIC = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}


def _small_vision() -> Any:
    """In place of a vision tower from the timm library."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CONFIG_MAPPING["siglip_vision_model"](**sizes, image_size=28, patch_size=14, model_args={"embed_dim": 64})


# Keys are arguments of the config class, dotted where they belong to a part of it. "" holds arguments for the config
# that is shrunk, where the class has no usable default.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 64, "audio_token_offset": 128, "vision_config.codebook_size": 64},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 200},
    "blt": {"num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": _VOCABULARY_MAP},
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": _WINDOW_AND_FULL * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dots1": {"n_shared_experts": 1, "layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 1},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {
        "num_hidden_layers": 4,
        "layer_types": _WINDOW_AND_FULL * 2,
        "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "dots3_note_text": {
        "per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}},
    },
    "encoder-decoder": {"": {"encoder": {"model_type": "bert"}, "decoder": _DECODER}},
    "encodec": {"num_filters": 4},
    **{name: {_ROPE_NAME: _MROPE} for name in _WITH_MROPE},
    "emu3": {"vocabulary_map": _VOCABULARY_MAP},
    "glm4v_moe_text": {_ROPE_NAME: {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "fast_vlm": {"vision_config": _small_vision},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "glm5_next_text": {"index_kpool": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1, 1, 1, 1],
    },
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"]},
    "gemma4_assistant": {
        "": {"text_config": {"model_type": "gemma4_text", **_NO_LAYER_INPUTS}},
        "text_config.num_kv_shared_layers": 4,
    },
    "instructblip": {"image_token_index": 200},
    "instructblipvideo": {"video_token_index": 200},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kosmos-2": {"latent_query_num": 8},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"": {"vision_config": {"model_type": "gemma4_vision"}}},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": _WINDOW_AND_FULL * 2,
        "num_kv_shared_layers": 2,
        "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
    },
    "laguna": {"layer_types": _WINDOW_AND_FULL},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mllama_text_model": {_ROPE_NAME: _ROPE},
    "mllama": {"vision_config.vision_output_dim": 128},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "mistral": {"sliding_window": None},  # as in all but the first release
    "mistral_large4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["indexed_attention"] * 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "indexer_types": ["full"] * 4,
        "no_rope_layers": [1, 1, 0, 0],
        "kv_source_layers": [0, 1, 2, 2],
    },
    "nemotron3_5_asr": {"default_prompt_id": 1},
    "mellum": {"layer_types": _WINDOW_AND_FULL},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"layer_types": _WINDOW_AND_FULL},
    "mimi": {"upsample_groups": 64, "num_filters": 4},
    "muse_spark_audio": {"hidden_sizes": (16, 16, 32, 64), "depths": (1, 1, 1, 1)},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "musicgen": {"": {**_MUSIC, "decoder": {"model_type": "musicgen_decoder"}}},
    "musicgen_melody": {"": {**_MUSIC, "decoder": {"model_type": "musicgen_melody_decoder"}}},
    "musicgen_decoder": {"vocab_size": 128},
    "musicgen_melody_decoder": {"vocab_size": 128},
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "eos_token_id": 2,
        "ple_layer_ids": [1],
        "split_ngram_parts": 1,
        "ngram_vocab_size_base": 64,
    },
    "perception_lm": {"vision_config": _small_vision},
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2},
    "qwen3_omni_moe:Qwen3OmniMoeTalkerForConditionalGeneration": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 210},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 210},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "speech-encoder-decoder": {"": {"encoder": {"model_type": "wav2vec2"}, "decoder": _DECODER}},
    "step3p5": {"layer_types": _WINDOW_AND_FULL, "sliding_window": 24},
    "vibevoice_acoustic_tokenizer": _CODEC,
    "vibevoice_acoustic_tokenizer_decoder": _CODEC,
    "vibevoice_acoustic_tokenizer_encoder": _CODEC,
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vision-encoder-decoder": {"": {"encoder": {"model_type": "vit"}, "decoder": _DECODER}},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "use_mamba_kernels": False,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 24},
}
