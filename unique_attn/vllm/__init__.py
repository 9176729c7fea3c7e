"""Page-sparse attention as a backend of vLLM. Nothing here is imported by ``import unique_attn``.

vLLM finds :func:`unique_attn.vllm.plugin.register` by its entry point, in every process that it starts, and uses the
backend where it is asked for::

    LLM(model, attention_config={"backend": "CUSTOM"}, additional_config={"unique_attn": {"budget": 1024}})

:mod:`~unique_attn.vllm.settings` reads the second argument, :mod:`~unique_attn.vllm.layout` says where keys, values and
page index are inside of a block of vLLM's cache, :mod:`~unique_attn.vllm.rows` cuts a batch into rows that decode and
rows of prompts, :mod:`~unique_attn.vllm.dense` attends to all keys, and :mod:`~unique_attn.vllm.versions` is all that
differs between versions of vLLM. What vLLM calls is ``unique_attn/vllm/backend.py``, which alone needs vLLM to be
imported.
"""
