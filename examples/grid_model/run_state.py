"""A training run on disk: tensors in one safetensors file, step and time in its header; written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """`state`: dictionaries of tensors by part (encoder, language, optimizer); and the numbers step and seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}/{name}": tensor.detach().clone().contiguous()
        for part, values in state.items()
        if isinstance(values, dict)
        for name, tensor in values.items()
    }
    numbers = {name: str(value) for name, value in state.items() if not isinstance(value, dict)}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata=numbers)
    unfinished.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            part, name = key.split("/", 1)
            state.setdefault(part, {})[name] = file.get_tensor(key)
    return state | {"step": int(header["step"]), "seconds": float(header["seconds"])}
