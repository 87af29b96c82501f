"""Layer adapters: how the live decoder of one model family is driven layer by layer.

A new family is one module with a class that has the shape of `exec.model.LayerStack` plus the two class methods of
`Family`, and one row here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from vlcache_connector.exec.model import LayerStack

FAMILIES: dict[str, tuple[str, str]] = {  # architecture -> (module, class)
    "Qwen2_5_VLForConditionalGeneration": ("vlcache_connector.engine.models.qwen2_5_vl", "Qwen25VLStack"),
    "Qwen3VLForConditionalGeneration": ("vlcache_connector.engine.models.qwen3_vl", "Qwen3VLStack"),
}


class Family(Protocol):
    """What is asked of an adapter class before there is a live model."""

    @classmethod
    def embedding_width(cls, hf_config: Any) -> int:
        """Elements per token of the encoder's output, as vLLM's encoder cache holds it."""
        ...

    @classmethod
    def attach(cls, model: "torch.nn.Module", positions: "torch.Tensor | None") -> "LayerStack":
        """The adapter of a live model. `positions`: see `live.positions_buffer`. Raises `UnsupportedModelError`."""
        ...


def family_of(architectures: list[str]) -> Family | None:
    """The adapter class of the first known architecture."""
    for name in architectures:
        if name in FAMILIES:
            module, cls = FAMILIES[name]
            family: Family = getattr(import_module(module), cls)
            return family
    return None
