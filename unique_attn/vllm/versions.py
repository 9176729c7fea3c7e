"""All of vLLM that the backend stands on, and what differs there between versions: 0.29 to 0.32 were run.

Everything else in this package takes vLLM's names from here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def register_backend(path: str) -> str | None:
    """Make the class at ``path`` the backend ``CUSTOM``. Returns whose it is, if it is another plugin's already."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != path:
        return str(custom.get_path())
    register_backend(custom, path)
    _take_choices_on_cpu()
    return None


def _take_choices_on_cpu() -> None:
    """Let vLLM's CPU platform take ``CUSTOM`` where it is chosen: it uses its own backend whatever is.

    Overriding that one in vLLM's list would change layers that did not ask: of other engines in the process, and of
    other kinds in the same model. Without the choice, the platform's own method answers as before.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    own = platform.get_attn_backend_cls
    if hasattr(own, "takes_custom"):
        return

    @functools.wraps(own)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if selected_backend is not AttentionBackendEnum.CUSTOM:
            return own(selected_backend, attn_selector_config, num_heads)
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:  # as vLLM says it on CUDA
            raise ValueError(
                f"Selected backend {selected_backend} is not valid for this configuration. Reason: {reasons}"
            )
        return str(selected_backend.get_path())

    get_attn_backend_cls.takes_custom = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def current_config() -> Any:
    """The ``VllmConfig`` of the engine that is being made, None at other times."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def stores_keys_itself(config: Any) -> bool:
    """Whether the model that is being made is a drafter that puts keys into a cache outside of attention."""
    speculative = config.speculative_config
    if speculative is None or config.model_config is not speculative.draft_model_config:
        return False
    return speculative.method in ("dflash", "dspark")


def is_cpu() -> bool:
    """Whether vLLM runs on its CPU platform."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def layer_index(layer: Any) -> int:
    """The number of an attention layer in its model."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer.layer_name))


def host_lengths(common: Any) -> list[int] | None:
    """Lengths of the rows of a batch, as the host knows them without waiting for a device.

    Exact on the CPU. On CUDA exact for rows of prompts; those that verify drafts may be shorter, since what was
    accepted last is known on the device alone. None if vLLM has none.
    """
    lengths = common.seq_lens if common.seq_lens.device.type == "cpu" else common.seq_lens_cpu_upper_bound
    return None if lengths is None else lengths.tolist()


def flash_attention(head_dim: int) -> tuple[Callable[..., Any], int] | None:
    """vLLM's FlashAttention over paged keys and values, and its version for these heads; None where it is not there."""
    from vllm.v1.attention.backends import fa_utils

    if is_cpu() or not fa_utils.is_flash_attn_varlen_func_available():
        return None
    version = fa_utils.get_flash_attn_version(head_size=head_dim)
    return None if version is None else (fa_utils.flash_attn_varlen_func, int(version))


def splits_for_graphs(config: Any, flash_version: int) -> int:
    """How often FlashAttention may split a row in a CUDA graph, whose buffers must not depend on lengths; 0: as it
    likes."""
    full_graphs = config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    if flash_version != 3 or not full_graphs:
        return 0
    return int(config.attention_config.flash_attn_max_num_splits_for_cuda_graph)


def split_rows(common: Any, threshold: int) -> tuple[int, int]:
    """How many rows of a batch decode, and the tokens of those: rows of at most ``threshold`` tokens come first."""
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills

    rows, _, tokens, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
    return rows, tokens


def copy_like(tensor: Tensor, values: list[int]) -> Tensor:
    """Numbers of the host on the device of ``tensor`` as int64, without waiting for it."""
    import torch

    if tensor.device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(tensor.device, non_blocking=True)
