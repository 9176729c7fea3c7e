"""What vLLM calls: the backend, which says what it can do, its metadata builder, and attention of one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from unique_attn import ops
from unique_attn.config import UniqueConfig
from unique_attn.prefill import BLOCK_K, BLOCK_Q
from unique_attn.rules import MAX_GROUP, MAX_HEAD_DIM, MAX_QUERY_TOKENS, PAGE_SIZES
from unique_attn.vllm import dense, versions
from unique_attn.vllm.layout import BlockViews, block_views, content_bytes
from unique_attn.vllm.rows import Batch, BatchCutter, DecodeRows, Rows
from unique_attn.vllm.settings import num_pages, read_settings

PREFERRED_BLOCK_SIZE = 64

# vLLM asks the class for the size of a block when no engine's config is current. So the settings of the engine that is
# being made are kept when its layers are, which is before, in the same process and thread.
_settings_of_last_engine: list[UniqueConfig] = []


def _settings() -> UniqueConfig:
    config = versions.current_config()
    if config is not None and config.model_config is not None:
        # While a drafter is made, the model of the config is that.
        models = (config.model_config, getattr(config.speculative_config, "target_model_config", None))
        layers = max(model.get_total_num_hidden_layers() for model in models if model is not None)
        _settings_of_last_engine[:] = [read_settings(config.additional_config, layers)]
    if not _settings_of_last_engine:
        raise RuntimeError("unique_attn: vLLM asked for the size of a block before it made an engine")
    return _settings_of_last_engine[0]


class UniqueBackend(AttentionBackend):
    """The backend ``CUSTOM``: page-sparse decoding, dense or sparse prompts, the page index in vLLM's own blocks.

    What it does not declare here, vLLM refuses when an engine starts.
    """

    forward_includes_kv_cache_update = True  # a step that decodes stores its tokens in the kernel that indexes them
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[UniqueAttention]:
        return UniqueAttention

    @staticmethod
    def get_builder_cls() -> type[UniqueMetadataBuilder]:
        return UniqueMetadataBuilder

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in cls.supported_dtypes or (dtype == torch.float32 and versions.is_cpu())

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 8 <= head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: Any, *more: Any, **named: Any
    ) -> str | None:
        if kv_cache_dtype not in (None, "auto") and dtype != getattr(torch, kv_cache_dtype, None):
            return f"keys and values stored as {kv_cache_dtype} for a model of {dtype}"
        return None

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major >= 8  # None on the CPU

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # rows are cut by the lengths that the host knows

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        known = versions.current_config() is not None or _settings_of_last_engine
        return [MultipleOf(max(16, _settings().page_size) if known else max(PAGE_SIZES))]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_BLOCK_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)  # those with a head's part of a block in one run

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """``spec`` with room for the index, so that vLLM's budget of memory counts it."""
        if spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise NotImplementedError(
                "unique_attn: expected keys and values with as many channels, "
                f"got {spec.head_size} and {spec.head_size_v}"
            )
        return replace(spec, state_content_bytes=content_bytes(_settings(), spec.head_size, spec.dtype))


class UniqueMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """Cuts the batch of a step into rows, once for all layers."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        threshold = self.reorder_batch_threshold
        assert threshold is not None
        if threshold > MAX_QUERY_TOKENS:
            raise ValueError(
                "unique_attn: speculative_config: expected num_speculative_tokens for which a row has at most "
                f"{MAX_QUERY_TOKENS} tokens, got rows of {threshold}"
            )
        config = read_settings(vllm_config.additional_config)
        if threshold > 1 and config.recent_pages < 1:
            raise ValueError(
                "unique_attn: additional_config['unique_attn']['recent_pages']: expected at least 1 with "
                "speculative_config, where a token would be selected for by the drafts behind it, got 0"
            )
        self._cutter = BatchCutter(
            config,
            threshold,
            kv_cache_spec.block_size,
            max(
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            ),
            device,
        )

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Batch:
        return self._cutter.cut(common_attn_metadata)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Batch:
        # Tables as wide as any that the graph will meet.
        return self._cutter.cut(replace(common_attn_metadata, max_seq_len=self.vllm_config.model_config.max_model_len))


class UniqueAttention(AttentionImpl[Batch]):
    """Attention of one layer.

    Raises:
        NotImplementedError: the layer has a feature that the ops do not have.
        TypeError, ValueError: bad settings.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **unknown: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        config = versions.current_config()
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window (leave such layers theirs: "
            'attention_config={"backend_per_kind": {"full_attention": "CUSTOM"}})': sliding_window is not None,
            "a logit softcap": bool(logits_soft_cap),
            f"attention of the type {attn_type}": attn_type != AttentionType.DECODER,
            "layers that share keys and values": kv_sharing_target_layer_name is not None,
            f"more than {MAX_GROUP} query heads per KV head": num_heads > MAX_GROUP * self.num_kv_heads,
            "a drafter that stores keys by itself, dflash or dspark (give it another attention_backend)": (
                versions.stores_keys_itself(config)
            ),
            "context parallelism": config.parallel_config.decode_context_parallel_size > 1,
            **{f"the attention argument {name}": value is not None for name, value in unknown.items()},
        }
        for feature, there in refused.items():
            if there:
                raise NotImplementedError(f"unique_attn: the attention backend does not have {feature}")
        self.config = _settings()
        self._dense_layer: bool | None = None  # not known before the first call
        self._views: tuple[Tensor, BlockViews] | None = None
        flash = versions.flash_attention(head_size)
        if flash is not None:
            self._dense = dense.flash_attention(*flash, versions.splits_for_graphs(config, flash[1]))
        elif versions.is_cpu():
            self._dense = dense.torch_attention
        else:
            raise NotImplementedError(
                "unique_attn: the attention backend needs vLLM's FlashAttention, which is missing"
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store ``key`` and ``value`` ``[N, H, D]``, index their pages, and attend with ``query`` ``[N, Hq, D]`` into
        ``output``, of its shape. ``N`` may be more than the batch has."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("unique_attn: the attention backend does not quantize its output")
        if self._dense_layer is None:
            self._dense_layer = bool(self.config.dense_layers) and (
                versions.layer_index(layer) in self.config.dense_layers
            )
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        cache = self._blocks(kv_cache)
        if self._dense_layer:
            rows = attn_metadata.everything
            self._store(key, value, cache, rows.tokens, attn_metadata.slots)
            self._dense(query[rows.tokens], cache, rows, self.scale, output[rows.tokens])
            return output
        if attn_metadata.decode is not None:
            self._decode(query, key, value, cache, attn_metadata.decode, attn_metadata.slots, output)
        if attn_metadata.prompts is not None:
            self._store(key, value, cache, attn_metadata.prompts.tokens, attn_metadata.slots)
            self._index(cache, attn_metadata.prompts)
            for rows in attn_metadata.segments:
                self._prompts(query[rows.tokens], cache, rows, output[rows.tokens])
        return output

    def _store(self, key: Tensor, value: Tensor, cache: BlockViews, tokens: slice, slots: Tensor) -> None:
        ops.append_kv(key[tokens], value[tokens], cache.k, cache.v, slots[tokens])

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: BlockViews,
        rows: DecodeRows,
        slots: Tensor,
        output: Tensor,
    ) -> None:
        tokens = slice(0, rows.num_tokens)
        count, queries, out = rows.seq_lens.shape[0], query[tokens], output[tokens]
        keys: Tensor | None = None
        values: Tensor | None = None
        if rows.places is None:
            keys, values = (x[tokens].view(count, rows.per_row, *x.shape[1:]) for x in (key, value))
        else:
            # Rows are padded at their left: such a query stands before the row's new tokens, and nobody looks at it.
            self._store(key, value, cache, tokens, slots)
            padded = query.new_zeros((count * rows.per_row, *query.shape[1:]))
            queries = padded.index_copy_(0, rows.places, queries)
            out = torch.empty_like(queries)
        config = self.config
        ops.unique_decode(
            queries.view(count, rows.per_row, self.num_heads, self.head_size),
            keys,
            values,
            cache.k,
            cache.v,
            cache.index,
            rows.block_table,
            rows.seq_lens,
            num_pages(config),
            rule=config.rule,
            page_size=config.page_size,
            spread_weight=config.spread_weight,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            scale=self.scale,
            budget_pages=rows.budget,
            index_format=config.index_format,
            slot_mapping=None if keys is None else slots[tokens],
            out=out.view(count, rows.per_row, self.num_heads, self.head_size),
        )
        if rows.places is not None:
            output[tokens] = out[rows.places]

    def _index(self, cache: BlockViews, rows: Rows) -> None:
        assert rows.start_lens is not None
        ops.page_index(
            cache.k,
            cache.index,
            rows.block_table,
            rows.start_lens,
            rows.seq_lens,
            max_new_tokens=rows.max_query_len,
            rule=self.config.rule,
            page_size=self.config.page_size,
            index_format=self.config.index_format,
        )

    def _prompts(self, q: Tensor, cache: BlockViews, rows: Rows, out: Tensor) -> None:
        if rows.key_start is None:
            self._dense(q, cache, rows, self.scale, out)
            return
        config = self.config
        out.copy_(
            ops.unique_prefill(
                q,
                cache.k,
                cache.v,
                rows.query_start,
                rows.key_start,
                rows.max_query_len,
                rows.max_seq_len,
                method=config.prefill,
                threshold=config.threshold,
                top_p=config.top_p,
                block_q=BLOCK_Q,
                block_k=BLOCK_K,
                scale=self.scale,
                block_table=rows.block_table,
            )[0]
        )

    def _blocks(self, kv_cache: Tensor) -> BlockViews:
        """Views of the layer's blocks, made once: vLLM passes the same tensor as long as it has the same memory."""
        if self._views is None or self._views[0] is not kv_cache:
            self._views = (kv_cache, block_views(kv_cache, self.config, self.head_size))
        return self._views[1]
