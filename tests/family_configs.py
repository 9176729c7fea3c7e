"""Tiny configs of any model family: the family's own default config, with every size in it made small."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from typing import Any

from family_overrides import OVERRIDES
from transformers import PretrainedConfig

VOCAB = 256
TEXT_TOKENS = range(3, 190)  # ids from which prompts are drawn; 0 is padding, 1 begins, 2 ends
SPECIAL_TOKENS = range(200, VOCAB)  # ids of placeholders for images, audio, ...
WINDOW = 24  # of sliding windows and attention chunks
HIDDEN = 64
MOST_LAYERS = 6


def _at_most(most: int) -> Any:
    return lambda size: min(size, most)


# What a whole number becomes, by the first pattern that fits its name. A function gets the default.
_SIZES: list[tuple[str, Any]] = [
    (r"vocab_size|num_embeds$", lambda size: min(size, VOCAB)),
    (r"codebook_size$", _at_most(128)),  # often a power of 2
    (r"^(num_)?(n_)?(key_value_heads|kv_heads|kv_n_heads)$", _at_most(2)),
    (r"(key_value_heads|kv_heads)$", _at_most(2)),
    (r"(^|_)n(um)?_heads?$|attention_heads$|num_key_heads$|num_value_heads$|_heads$|n_head$", _at_most(4)),
    (r"^index_topk$|^index_block_size$", _at_most(8)),  # tokens that an indexer selects: fewer than a prompt has
    (r"experts?_per_tok|^moe_k$|top_?k$|_topk$|moe_top_?k|topk_blocks|top_k_experts", _at_most(2)),
    (r"(num_(local_)?|n_routed_|moe_num_)experts$", _at_most(4)),
    (r"^(n_group|topk_group)$", _at_most(1)),
    (r"shared_experts$", _at_most(1)),
    (r"layers?$|^depth$|^num_blocks$|_depth$|num_res_blocks", _at_most(2)),
    (r"first_k_dense|num_dense", _at_most(1)),
    (r"rope_head_dim$|head_dim$|head_size$|^d_kv$|^d_head$|^dim_head$|^kv_channels$|nope_head_dim$", _at_most(16)),
    (r"^rotary_dim$", _at_most(8)),
    (r"lora_rank$|_rank$|lowrank$", _at_most(16)),
    (r"sliding_window|attention_chunk_size|window_size$|local_attention$|index_kpool", _at_most(WINDOW)),
    (r"position|^n_ctx$|max_seq|seq_len$|context_length", _at_most(512)),
    (r"intermediate|ffn|^d_ff$|^dff$|^dim_ff$|mlp_dim|linear_units", _at_most(96)),
    (r"", _at_most(HIDDEN)),
]
_KEPT = re.compile(
    r"sampling_rate|sample_rate|chunk_size_feed_forward|patch|stride|kernel|image_size|num_mel_bins|_per_second|seed"
)
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
_COMPUTED = ("layer_types", "layers_block_type")  # lists that may be properties
_TAKES_PARTS = hasattr(PretrainedConfig, "sub_configs_defaults")  # whether parts may be configs, not only dictionaries
# Sizes that some families neither declare nor compute.
_MISSING = {"num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}


def tiny_config(name: str, config_class: Any) -> Any:
    """A small config of the family ``name``: one layer of each kind, at least two, and heads of 16 channels."""
    overrides = OVERRIDES.get(name, {})
    default = config_class(**copy.deepcopy(overrides.get("", {})))
    return _shrink(default, overrides, _TokenIds())


class _TokenIds:
    """Hands out the ids of :data:`SPECIAL_TOKENS`; a name has the same in all parts of a config."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        name = re.sub("_index$", "_id", name)
        usual = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
        return usual[name] if name in usual else self.ids.setdefault(name, SPECIAL_TOKENS[len(self.ids)])


def _declared(config_class: Any) -> dict[str, Any]:
    """The arguments of a config class and their defaults (``None`` for what is computed from others)."""
    if dataclasses.is_dataclass(config_class):
        return {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(config_class)
            if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        }
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _value(config: Any, name: str, default: Any = None) -> Any:
    """An attribute, also where layers differ in it: then the one that most layers have."""
    return vars(config)[name] if name in vars(config) else getattr(config, name, default)


def _shrink(config: Any, overrides: dict[str, Any], token: _TokenIds) -> Any:
    overrides = {**OVERRIDES.get(config.model_type, {}), **overrides}
    defaults = _declared(type(config))
    parts = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    defaults |= {name: None for name in parts if name not in defaults}
    picks = _layers(config, defaults, token)
    kwargs: dict[str, Any] = {}
    for name, given in defaults.items():
        value = _value(config, name, given)
        if name in picks:
            kwargs[name] = picks[name]
        elif isinstance(value, PretrainedConfig):
            prefix = name + "."
            below = {path.removeprefix(prefix): each for path, each in overrides.items() if path.startswith(prefix)}
            part = _shrink(value, below, token)
            kwargs[name] = part if _TAKES_PARTS else part.to_dict()
        elif given is not None or (name == "rope_parameters" and value is not None):
            kwargs[name] = _small(name, value, token)
        elif value is None and name in _MISSING:
            kwargs[name] = _MISSING[name]
    if "kv_lora_rank" in defaults:  # latent attention has no groups
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    elif defaults.get("num_key_value_heads", 0) is None and _value(config, "num_key_value_heads"):
        kwargs["num_key_value_heads"] = min(2, kwargs.get("num_attention_heads", 2))
    if "patch_size" in defaults:
        kwargs |= _small_images(config, kwargs)
    if "per_layer_config" in picks:
        per_layer = picks["per_layer_config"].items()
        kwargs["per_layer_config"] = {
            i: {name: _small(name, value, token) for name, value in layer.items()} for i, layer in per_layer
        }
    given = {path: value for path, value in overrides.items() if path and "." not in path}
    kwargs.update({name: value() if callable(value) else copy.deepcopy(value) for name, value in given.items()})
    return type(config)(**kwargs)


def _small_images(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Four patches an image; windows are of pixels here, and keep their size."""
    result = {}
    image, patch = kwargs.get("image_size"), kwargs.get("patch_size")
    if isinstance(image, int) and isinstance(patch, int):
        result["image_size"] = 2 * patch
    elif isinstance(image, (list, tuple)) and isinstance(patch, (list, tuple)):
        result["image_size"] = type(image)(2 * size for size in patch)
    if "window_size" in kwargs:
        result["window_size"] = _value(config, "window_size")
    return result


def _layers(config: Any, defaults: dict[str, Any], token: _TokenIds) -> dict[str, Any]:
    """How many layers there are to be, and everything that has one entry per layer: one layer of each kind."""
    count_name = next((name for name in _COUNTS if name in defaults), None)
    count = _value(config, count_name) if count_name else None
    if not isinstance(count, int) or count < 2:
        return {}
    values = {name: _value(config, name) for name in defaults}
    values = {name: value for name, value in values.items() if isinstance(value, (list, tuple))}
    per_layer = {int(i): each for i, each in (config.to_dict().get("per_layer_config") or {}).items()}
    indices = {name: value for name, value in values.items() if _lists_layers(name, value, count)}
    lists = {name: value for name, value in values.items() if len(value) == count and name not in indices}
    computed = [getattr(config, name, None) for name in _COMPUTED if name not in lists]
    computed = [
        value
        for value in computed
        if isinstance(value, (list, tuple)) and len(value) == count and value not in lists.values()
    ]
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(str([value[i] for value in (*lists.values(), *computed)] + [per_layer.get(i)]), i)
    if len(kinds) == 1:
        chosen = [0, 1]
    elif computed:  # from the number of the layer: only the first layers keep theirs
        chosen = list(range(max(2, min(MOST_LAYERS, max(kinds.values()) + 1))))
    else:
        chosen = sorted(kinds.values())[:MOST_LAYERS]
    picks: dict[str, Any] = {str(count_name): len(chosen)}
    for name, value in values.items():
        if name in lists:
            picks[name] = type(value)(_small(name, value[i], token) for i in chosen)
        elif name in indices:
            picks[name] = type(value)([chosen.index(i) for i in value if i in chosen] or [len(chosen) - 1])
    if per_layer:
        picks["per_layer_config"] = {chosen.index(i): each for i, each in per_layer.items() if i in chosen}
    return picks


def _lists_layers(name: str, value: Any, count: int) -> bool:
    """Whether a value is a list of numbers of layers."""
    if not re.search(r"layers?$|idxs$|indexes$|indices$|layer_ids$", name):
        return False
    return len(set(value)) == len(value) > 0 and all(isinstance(each, int) and 0 <= each < count for each in value)


def _small(name: str, value: Any, token: _TokenIds) -> Any:
    if name == "rope_parameters":
        return _rope(value)
    if type(value) is int:
        if re.search(r"_token_(id|index)$", name):
            return token(name) if value >= 0 else value
        if value < 2 or _KEPT.search(name):
            return value
        return next(size for pattern, size in _SIZES if re.search(pattern, name))(value)
    if isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
        return type(value)(_small(name, each, token) for each in value)
    return value


def _rope(value: Any) -> Any:
    """Rotary parameters for half a head of 8 channels."""
    if not isinstance(value, dict):
        return value
    small = {}
    for key, each in value.items():
        if isinstance(each, dict):
            small[key] = _rope(each)
        elif key == "mrope_section":
            parts = [part * 8 // sum(each) for part in each]
            small[key] = [8 - sum(parts[1:]), *parts[1:]]
        elif key in ("long_factor", "short_factor"):
            small[key] = each[:8]
        else:
            small[key] = each
    return small
