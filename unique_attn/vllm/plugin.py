"""What vLLM calls in each of its processes, whether the backend is used there or not."""

from __future__ import annotations

import logging

from unique_attn.vllm import versions

#: What ``attention_config={"backend": "CUSTOM"}`` stands for once the plugin is registered.
BACKEND = "unique_attn.vllm.backend.UniqueBackend"

logger = logging.getLogger("unique_attn")


def register() -> None:
    """Make the backend known to vLLM as ``CUSTOM``; entry point of the group ``vllm.general_plugins``.

    Imports no more of vLLM than its list of backends, touches no device, and may be called again. What it cannot do, in
    an unknown vLLM or beside another plugin that has the name, it says in one warning: models that do not ask for the
    backend must not notice it.
    """
    try:
        taken = versions.register_backend(BACKEND)
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning("unique_attn is not available in this vLLM, whose list of backends is another: %s", error)
        return
    if taken is not None:
        logger.warning(
            "the attention backend CUSTOM of vLLM is %s already, so it is not that of unique_attn: name the plugins "
            "that you want in VLLM_PLUGINS",
            taken,
        )
