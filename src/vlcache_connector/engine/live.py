"""How the live model is reached, in one place.

vLLM hands a connector its configuration and, later, the page tensors, but not the model. The worker-side constructor
runs after the model was loaded and before vLLM freezes the heap, so the garbage collector still knows every object:
the model is the one module of a known class that contains the very attention layers named in the engine's static
forward context. Nothing is patched; of one model runner an attribute is set (`give_encoder_connector`).
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
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


def positions_buffer() -> torch.Tensor | None:
    """Zeros in the shape [3, tokens] and with the strides of the model runner's rope positions, of which it hands the
    first ones to the model: compiled code takes the strides for granted. None where they are not where we know them.
    Must be called from within a hook of the worker.
    """
    runner = _caller_with("model_runner").model_runner
    for place in ("mrope_positions.gpu", "model_state.rope_state.positions"):  # V1, V2
        with suppress(AttributeError):
            return torch.zeros_like(attrgetter(place)(runner))
    return None


def give_encoder_connector(vllm_config: "VllmConfig") -> None:
    """Let the model runner of this process use the encoder connector, which was created after it.

    vLLM's V1 runner looks for the connector in every step, the V2 runner only when it is built. Must be called from
    within a hook of the worker, which is found on the call stack.
    """
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.ec_connector import get_ec_connector

        runner = _caller_with("model_runner").model_runner
        runner.ec_connector = get_ec_connector(vllm_config, runner.encoder_cache)


def encode_again(request_id: str, index: int) -> None:
    """Run the encoder for one media item of a scheduled request, as if the scheduler had asked for it.

    Only for the case that a promised embedding turns out to be unreadable in the middle of a step. Must be called
    from within a hook of the model runner, which is found on the call stack.
    """
    inputs = {request_id: [index]}
    runner = _caller_with("_execute_mm_encoder", "model_state")
    if hasattr(runner, "model_state"):  # V2
        runner.model_state.execute_mm_encoder(inputs)
        return
    runner._execute_mm_encoder(
        SimpleNamespace(scheduled_encoder_inputs=inputs, ec_manager_metadata=None, free_encoder_mm_hashes=[])
    )


def _caller_with(*attributes: str) -> Any:
    """The nearest of `callers` that has one of these attributes. Raises `UnsupportedModelError`."""
    for caller in callers():
        if any(hasattr(caller, attribute) for attribute in attributes):
            return caller
    raise UnsupportedModelError(f"nothing on the call stack has {' or '.join(attributes)}, as vLLM 0.32 would")


def callers() -> Iterator[Any]:
    """The objects whose methods are on the call stack, the nearest first."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        caller = frame.f_locals.get("self")
        if caller is not None:
            yield caller
        frame = frame.f_back
