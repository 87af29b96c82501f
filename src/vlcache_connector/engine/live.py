"""How the live model is reached, in one place.

vLLM hands a connector its configuration and, later, the page tensors, but not the model. The worker-side constructor
runs after the model was loaded and before vLLM freezes the heap, so the garbage collector still knows every object:
the model is the one module of a known class that contains the very attention layers named in the engine's static
forward context. Nothing is patched.
"""

import gc
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from vlcache_connector.engine.models import FAMILIES
from vlcache_connector.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def find_model(vllm_config: "VllmConfig", layer_name: str) -> torch.nn.Module:
    """The loaded model that owns attention layer `layer_name`. Raises `UnsupportedModelError`."""
    attention = vllm_config.compilation_config.static_forward_context[layer_name]
    for candidate in gc.get_objects():
        # The class name is compared first: isinstance() on every object of the heap would wake lazy proxies.
        is_known = type(candidate).__name__ in FAMILIES and isinstance(candidate, torch.nn.Module)
        if is_known and any(module is attention for module in candidate.modules()):
            model: torch.nn.Module = candidate
            return model
    raise UnsupportedModelError(f"no loaded model of a known family ({sorted(FAMILIES)}) owns layer {layer_name}")


def encode_again(request_id: str, index: int) -> None:
    """Run the encoder for one media item of a scheduled request, as if the scheduler had asked for it.

    Only for the case that a promised embedding turns out to be unreadable in the middle of a step. Must be called
    from within a hook of vLLM's V1 model runner, which is found on the call stack.
    """
    output = SimpleNamespace(
        scheduled_encoder_inputs={request_id: [index]}, ec_manager_metadata=None, free_encoder_mm_hashes=[]
    )
    _calling_runner()._execute_mm_encoder(output)


def _calling_runner() -> Any:
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(type(caller), "_execute_mm_encoder"):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("no model runner with an encoder is calling")
