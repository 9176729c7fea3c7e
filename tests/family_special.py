"""Inputs of the families that text alone does not run: speech, codebooks, images that a model cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from family_inputs import (
    BATCH,
    PROMPT,
    SOURCE,
    TARGET,
    Inputs,
    arguments,
    generator,
    noise,
    pixels,
    sequence_to_sequence,
    tokens,
    vocabulary,
)
from torch import Tensor


def _features(make: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Inputs]:
    """An encoder that reads what ``make(config)`` gives, and a decoder that reads text."""
    return lambda model: sequence_to_sequence(model, **make(model.config))


def _with(make: Callable[[Any], dict[str, Any]], always: bool = False) -> Callable[[Any], Inputs]:
    """Text together with what ``make(config)`` gives, at the first call or at each."""

    def build(model: Any) -> Inputs:
        result = Inputs(tokens(BATCH, PROMPT, end=vocabulary(model)))
        more = make(model.config)
        result.always, result.once = (more, {}) if always else ({}, more)
        return result

    return build


def _codebooks(count: Callable[[Any], int], last: bool = True) -> Callable[[Any], Inputs]:
    """Several tokens at each position: ``[B, T, C]``, or ``[B * C, T]``."""

    def build(model: Any) -> Inputs:
        channels = count(model.config)
        shape = (BATCH, PROMPT, channels) if last else (BATCH * channels, PROMPT)
        return Inputs(tokens(*shape, end=60), rows=1 if last else channels)

    return build


def _dia(model: Any) -> Inputs:
    result = sequence_to_sequence(model)
    result.ids = tokens(BATCH, TARGET, model.config.decoder_config.num_channels, seed=2, end=60)
    return result


def _musicgen(model: Any) -> Inputs:
    result = sequence_to_sequence(model)
    result.rows = model.decoder.num_codebooks
    result.ids = tokens(BATCH * result.rows, TARGET, seed=2, end=60)
    return result


def _moshi(model: Any) -> Inputs:
    codes = {
        name: (tokens(BATCH, model.num_codebooks, PROMPT, seed=seed, end=60), -1)
        for seed, name in enumerate(("user_audio_codes", "moshi_audio_codes"))
    }
    return Inputs(tokens(BATCH, PROMPT), along=codes)


def _depth_decoder(name: str, count: Callable[[Any], int], size: Callable[[Any], int]) -> Callable[[Any], Inputs]:
    """One step of a model of frames: as many tokens as there are codebooks."""

    def build(model: Any) -> Inputs:
        hidden = noise(BATCH, size(model.config)) if "backbone" in name else noise(BATCH, 1, size(model.config))
        books = count(model.config)
        return Inputs(tokens(BATCH, books // 2, end=60), once={name: hidden}, new_tokens=books // 4)

    return build


def _assistant(model: Any) -> Inputs:
    """A draft model that reads the keys and values of another model instead of a cache."""
    text = model.config.get_text_config()
    shared = {}
    for layer_type in set(text.layer_types):
        layer = text.per_layer_config[layer_type] if hasattr(text, "per_layer_config") else text
        shape = (BATCH, layer.num_key_value_heads, PROMPT, layer.head_dim)
        shared[layer_type] = (noise(*shape, seed=7), noise(*shape, seed=8))
    always = {
        "inputs_embeds": noise(BATCH, 1, 2 * model.config.backbone_hidden_size),
        "shared_kv_states": shared,
        "position_ids": torch.full((BATCH, 1), PROMPT),
    }
    return Inputs(tokens(BATCH, 1), mask_name=None, always=always, generates_ids=False)


def _rag(model: Any) -> Inputs:
    documents = model.config.n_docs
    result = sequence_to_sequence(model)
    result.always |= {
        "context_input_ids": tokens(BATCH * documents, SOURCE, seed=3),
        "context_attention_mask": torch.ones(BATCH * documents, SOURCE, dtype=torch.long),
        "doc_scores": noise(BATCH, documents),
    }
    return result


def _instruct_blip(*frames: int) -> Callable[[Any], Inputs]:
    def build(model: Any) -> Inputs:
        config = model.config
        images = config.num_query_tokens * (frames[0] if frames else 1)
        result = Inputs(tokens(BATCH, PROMPT))
        names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
        placeholder = next(value for name in names if (value := getattr(config, name, None)) is not None)
        result.ids = torch.cat([torch.full((BATCH, images), placeholder), result.ids], 1)
        result.once = {"pixel_values": pixels(config.vision_config, *frames)}
        if "qformer_input_ids" in arguments(model.forward):
            result.once["qformer_input_ids"] = tokens(BATCH, 5, seed=9)
        return result

    return build


def _idefics(model: Any) -> Inputs:
    seen = torch.ones(BATCH, PROMPT, 1, dtype=torch.long)
    images = {"pixel_values": pixels(model.config.vision_config, 1)}
    return Inputs(tokens(BATCH, PROMPT), always=images, along={"image_attention_mask": (seen, 1)})


def _kosmos(model: Any) -> Inputs:
    places = torch.zeros(BATCH, PROMPT, dtype=torch.long)
    places[:, 10 : 10 + model.config.latent_query_num] = 1
    once = {"pixel_values": pixels(model.config.vision_config)}
    return Inputs(tokens(BATCH, PROMPT), once=once, along={"image_embeds_position_mask": (places, 1)})


def _encoder_only(name: str, make: Callable[[Any], Tensor]) -> Callable[[Any], Inputs]:
    """A model without a decoder, whose ``generate`` labels what its encoder reads."""
    return lambda model: Inputs(make(model.config), name, mask_name=None)


def _frames(config: Any) -> Tensor:
    encoder = getattr(config, "encoder_config", config)
    return noise(BATCH, 96, getattr(encoder, "input_dim", None) or encoder.num_mel_bins)


def _stacked_frames(config: Any) -> Tensor:
    return noise(BATCH, 96, 4 * config.encoder_config.num_mel_bins)


def _talker(model: Any) -> Inputs:
    """A model that speaks what another one thinks: it reads hidden states."""
    config = model.config
    if "thinker_reply_part" in arguments(model.forward):
        ids = tokens(BATCH, PROMPT)
        always = {"thinker_reply_part": noise(BATCH, 60, config.embedding_size)}
        once = {"input_text_ids": ids, "inputs_embeds": noise(*ids.shape, config.embedding_size)}
        return Inputs(ids, once=once, always=always)
    embeds = noise(BATCH, PROMPT, config.text_config.hidden_size)
    return Inputs(tokens(BATCH, PROMPT), always={"generation_step": 0}, along={"inputs_embeds": (embeds, 1)})


def _prompt_of_speech(model: Any) -> Inputs:
    """Text that ends where speech begins."""
    ids = tokens(BATCH, PROMPT, end=vocabulary(model))
    ids[:, -1] = model.config.audio_bos_token_id
    return Inputs(ids)


def _kyutai(model: Any) -> Inputs:
    result = _codebooks(lambda c: c.num_codebooks + 1)(model)
    result.generates, result.generates_ids = {"input_values": noise(BATCH, 1, 20 * model.config.frame_size)}, False
    return result


def _second_codebook(config: Any) -> dict[str, Any]:
    return {"generation_steps": 1}


def _voice(config: Any) -> dict[str, Any]:
    return {"input_features": noise(BATCH, config.decoder_config.feature_size, 64)}


def _realtime(model: Any) -> Inputs:
    audio = model.config.audio_config
    frames = noise(BATCH, audio.num_mel_bins, PROMPT * model.config.audio_length_per_tok)
    ids = tokens(BATCH, PROMPT)
    prompt = {"input_ids": ids[:, : PROMPT - 12], "input_features": frames}
    return Inputs(ids, along={"input_features": (frames, 2)}, generates=prompt, generates_ids=False)


def _question(model: Any) -> Inputs:
    always = {"pixel_values": pixels(model.config.vision_config), "input_ids": tokens(BATCH, SOURCE)}
    result = Inputs(tokens(BATCH, TARGET, seed=2), "decoder_input_ids", "decoder_attention_mask", always=always)
    result.generates_ids, result.encoder = False, True
    return result


def _robot(model: Any) -> Inputs:
    config = model.config
    always = {
        "state": noise(BATCH, config.max_state_dim),
        "noise": noise(BATCH, config.chunk_size, config.max_action_dim),
        "timestep": torch.full((BATCH,), 0.5),
        "pixel_values": pixels(config.vlm_config.vision_config, 1),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    }
    return Inputs(tokens(BATCH, PROMPT), always=always, generates_ids=False)


def _units(model: Any) -> Inputs:
    embeds = noise(BATCH, SOURCE, model.config.hidden_size)
    return sequence_to_sequence(model, inputs_embeds=embeds)


def _characters(model: Any) -> Inputs:
    result = _units(model)
    counts = torch.full((BATCH, SOURCE), 2)
    result.always |= {"char_input_ids": tokens(BATCH, 2 * SOURCE), "char_count_per_id": counts}
    result.always["attention_mask"] = torch.ones(BATCH, SOURCE, dtype=torch.long)
    return result


def _seamless(model: Any) -> Inputs:
    result = sequence_to_sequence(model)
    result.generates = {**result.always, "generate_speech": False}
    return result


def _mllama(model: Any) -> Inputs:
    """An image of one tile, that cross-attention reads: the text has no placeholders."""
    vision = model.config.vision_config
    seen = torch.ones(BATCH, PROMPT, 1, vision.max_num_tiles, dtype=torch.long)
    tiles = torch.zeros(BATCH, 1, vision.max_num_tiles, dtype=torch.long)
    tiles[..., 0] = 1
    once = {
        "pixel_values": pixels(vision, 1, vision.max_num_tiles),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": tiles,
    }
    return Inputs(tokens(BATCH, PROMPT), once=once, along={"cross_attention_mask": (seen, 1)}, images=True)


def _patches(config: Any) -> dict[str, Any]:
    size = config.vision_config.patch_embed_hidden_size
    positions = torch.arange(1, 13).view(1, 12, 1).expand(BATCH, 12, 2)
    return {"flattened_patches": torch.cat([positions.float(), noise(BATCH, 12, size)], -1)}


def _udop(config: Any) -> dict[str, Any]:
    ids = tokens(BATCH, SOURCE)
    corners = torch.rand(BATCH, SOURCE, 2, generator=generator(3)) / 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "bbox": torch.cat([corners, corners + 0.3], -1)}


def _mel(config: Any) -> dict[str, Any]:
    """Log-mel frames ``[B, T, channels]`` of a conformer encoder."""
    encoder = getattr(config, "encoder_config", config)
    frames = noise(BATCH, 96, encoder.num_mel_bins)
    return {"input_features": frames, "attention_mask": torch.ones(BATCH, 96, dtype=torch.long)}


def _waves(config: Any) -> dict[str, Any]:
    return {"input_values": noise(BATCH, 8000)}


def _whisper(config: Any) -> dict[str, Any]:
    return {"input_features": noise(BATCH, config.num_mel_bins, 2 * config.max_source_positions)}


def _speech(config: Any) -> dict[str, Any]:
    return {"input_features": noise(BATCH, 40, config.feature_projection_input_dim)}


def _pixel_values(config: Any) -> dict[str, Any]:
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None)
    return {"pixel_values": pixels(vision)}


# By class: what text alone does not run.
SPECIAL: dict[str, Callable[[Any], Inputs]] = {
    "Blip2ForConditionalGeneration": _instruct_blip(),
    "BlipForConditionalGeneration": _with(_pixel_values, always=True),
    "BlipForQuestionAnswering": _question,
    "CanaryForConditionalGeneration": _features(_mel),
    "ClvpModelForConditionalGeneration": _with(_voice, always=True),
    "CohereAsrForConditionalGeneration": _features(_mel),
    "CsmDepthDecoderForCausalLM": _depth_decoder(
        "backbone_last_hidden_state", lambda c: c.num_codebooks, lambda c: c.backbone_hidden_size
    ),
    "CsmForConditionalGeneration": _codebooks(lambda c: c.num_codebooks),
    "DiffusionGemmaForBlockDiffusion": lambda m: Inputs(tokens(BATCH, PROMPT), canvas=m.config.canvas_length),
    "DiaForConditionalGeneration": _dia,
    "Gemma4AssistantForCausalLM": _assistant,
    "Gemma4UnifiedAssistantForCausalLM": _assistant,
    "GradiumPhononTTSForConditionalGeneration": _prompt_of_speech,
    "GraniteSpeech5ForCTC": _encoder_only("input_features", _stacked_frames),
    "IdeficsForVisionText2Text": _idefics,
    "InstructBlipForConditionalGeneration": _instruct_blip(),
    "InstructBlipVideoForConditionalGeneration": _instruct_blip(2),
    "Kosmos2ForConditionalGeneration": _kosmos,
    "KyutaiSpeechToTextForConditionalGeneration": _kyutai,
    "LasrForCTC": _encoder_only("input_features", _frames),
    "MllamaForConditionalGeneration": _mllama,
    "MoonshineForConditionalGeneration": _features(_waves),
    "MoonshineStreamingForConditionalGeneration": _features(_waves),
    "MoshiDepthDecoder": _depth_decoder("last_hidden_state", lambda c: c.num_codebooks, lambda c: c.input_size),
    "MoshiForConditionalGeneration": _moshi,
    "MusicgenForCausalLM": _codebooks(lambda c: c.num_codebooks, last=False),
    "MusicgenForConditionalGeneration": _musicgen,
    "MusicgenMelodyForCausalLM": _codebooks(lambda c: c.num_codebooks, last=False),
    "MusicgenMelodyForConditionalGeneration": _musicgen,
    "OmniASRForCTC": _encoder_only("input_values", lambda c: noise(BATCH, 1, 8000)),
    "PI0ForConditionalGeneration": _robot,
    "ParakeetForCTC": _encoder_only("input_features", _frames),
    "NemotronAsrStreamingForRNNT": _features(_mel),
    "Nemotron3_5AsrForRNNT": _features(_mel),
    "ParakeetForRNNT": _features(_mel),
    "ParakeetForTDT": _features(_mel),
    "PPFormulaNetForConditionalGeneration": _features(_pixel_values),
    "Pix2StructForConditionalGeneration": _features(_patches),
    "PocketTTSForConditionalGeneration": _prompt_of_speech,
    "Qwen2_5OmniTalkerForConditionalGeneration": _talker,
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": _with(_second_codebook, always=True),
    "Qwen3OmniMoeTalkerForConditionalGeneration": _talker,
    "RagTokenForGeneration": _rag,
    "SeamlessM4TForSpeechToText": _features(_speech),
    "SeamlessM4TForSpeechToSpeech": _features(_speech),
    "SeamlessM4TModel": _seamless,
    "SeamlessM4TTextToUnitForConditionalGeneration": _units,
    "SeamlessM4Tv2ForSpeechToSpeech": _features(_speech),
    "SeamlessM4Tv2Model": _seamless,
    "SeamlessM4Tv2TextToUnitForConditionalGeneration": _characters,
    "SeamlessM4Tv2ForSpeechToText": _features(_speech),
    "Speech2TextForConditionalGeneration": _features(
        lambda c: {"input_features": noise(BATCH, 40, c.input_feat_per_channel)}
    ),
    "SpeechEncoderDecoderModel": _features(_waves),
    "SpeechT5ForSpeechToText": _features(_waves),
    "UdopForConditionalGeneration": _features(_udop),
    "VisionEncoderDecoderModel": _features(_pixel_values),
    "VoxtralRealtimeForConditionalGeneration": _realtime,
    "WhisperForConditionalGeneration": _features(_whisper),
}
