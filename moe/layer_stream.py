"""A model of which one decoder layer is in memory at a time.

Weights come from the checkpoint's own files, by transformers' own conversion of names, and go again; what
flows from layer to layer lies in files. Each layer is run by the model's own forward, so masks, positions and
everything else that a layer is given are as always.
"""

# B batch, S sequence, D hidden width

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from .layer_walk import NUMBERED, LayerWalk, NotStreamableError


class LayerStream(LayerWalk):
    """A model without weights, whose decoder layers are loaded and dropped.

    Attributes:
        model: On the meta device but for what lies outside of the layers, and the layer that is loaded.
        layers: Its decoder layers.
        path: Where they are in it, such as ``model.layers``.
        files: Where each tensor is stored, by its name there.

    Args:
        model: Built on the meta device.
        files: The checkpoint's safetensors files.
        dtype: Of the weights in memory.
        device: Where they run.
        quantizer: Of transformers, which makes ordinary weights of the stored ones, where it is needed.

    Raises:
        NotStreamableError: The expert layers are not all in one list of decoder layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: list[Path],
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantizer: Any = None,
    ) -> None:
        super().__init__(model)
        self.dtype, self.device = dtype, device
        self._mapping: Any = get_model_conversion_mapping(model, None, quantizer)
        self._quantizer = quantizer
        self.files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as handle:
                self.files |= dict.fromkeys(handle.keys(), file)
        stored = {found[1] for name in self.files if (found := NUMBERED.match(name)) is not None}
        self._stored_path = self.path if self.path in stored else _same_end(self.path, stored)

    def load_outside(self) -> None:
        """Load everything that is in no decoder layer: embeddings, last norm, head, rotary tables.

        Raises:
            NotStreamableError: Something was not in the files.
        """
        self._load(lambda name: not name.startswith(f"{self._stored_path}."))
        self.model.tie_weights()
        for module in self.model.modules():
            _fill_buffers(self.model, module, self.device)
        lost = [name for name in _on_meta(self.model) if not name.startswith(f"{self.path}.")]
        if lost:
            raise NotStreamableError(f"the checkpoint's files lack {lost[0]!r}")

    def load(self, index: int) -> None:
        """Load a decoder layer.

        Raises:
            NotStreamableError: Something of it was not in the files.
        """
        self._load(lambda name: name.startswith(f"{self._stored_path}.{index}."))
        if lost := _on_meta(self.layers[index]):
            raise NotStreamableError(f"the checkpoint's files lack {lost[0]!r} of decoder layer {index}")

    def push(self, index: int, inputs: Sequence[Mapping[str, Any]], hidden: "HiddenFiles") -> None:
        """Run the loaded decoder layer on all batches.

        Args:
            index: Of the layer.
            inputs: Arguments of the model, for each batch.
            hidden: What the layer reads, and where what it gives is kept.
        """
        reads: list[Tensor | None] = [None]
        for number, batch in enumerate(inputs):
            reads[0] = None if index == 0 else hidden.read(index, number).to(self.device)
            with self.only(index, lambda: reads[0]) as given:
                self.run(batch)
            hidden.write(index + 1, number, given[0])

    def drop(self, index: int) -> None:
        """Forget a decoder layer's weights; its shapes stay."""
        _empty(self.layers[index])

    def drop_all(self) -> None:
        """Forget every weight that is loaded, those outside of the layers too."""
        _empty(self.model)

    def state_dict(self, index: int | None) -> dict[str, Tensor]:
        """Tensors of a decoder layer, or of all that is outside of them, by their names in the model."""
        prefix = f"{self.path}." if index is None else f"{self.path}.{index}."
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name.startswith(prefix) != (index is None)
        }

    def _load(self, wanted: Callable[[str], bool]) -> None:
        names = [name for name in self.files if wanted(name)]
        if not names:
            return
        settings = LoadStateDictConfig(
            weight_mapping=self._mapping,
            hf_quantizer=self._quantizer,
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": self.device},
        )
        with ExitStack() as stack:  # files stay mapped no longer than they are read
            handles = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in {self.files[name] for name in names}
            }
            part = {name: handles[self.files[name]].get_slice(name) for name in names}
            info, _ = convert_and_load_state_dict_in_model(self.model, part, settings)
            del part
        if self._quantizer is not None:
            # What was remembered of the quantised layout would be written into the plain weights' names.
            self.model.__dict__.pop("_weight_conversions", None)
        if info.mismatched_keys or info.conversion_errors:
            fault = min(map(str, info.conversion_errors), default="")
            for name, stored, asked in info.mismatched_keys:
                fault = f"{name!r} has shape {list(stored)}, and the config asks for {list(asked)}"
            raise NotStreamableError(f"the checkpoint does not fit its config: {fault}")


class HiddenFiles:
    """What flows from one decoder layer to the next, a file for each batch.

    The files of a layer stay until those behind the next are whole, so that a killed run can go on.

    Args:
        folder: Of the files; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, layer: int, batch: int) -> Path:
        return self.folder / f"into-{layer}-{batch}.safetensors"

    def read(self, layer: int, batch: int) -> Tensor:
        """What a layer reads of a batch."""
        return load_file(self._path(layer, batch))["hidden"]

    def write(self, layer: int, batch: int, hidden_BSD: Tensor) -> None:
        """Keep what a layer will read of a batch."""
        save_file({"hidden": hidden_BSD.contiguous().cpu()}, self._path(layer, batch))

    def forget(self, layer: int) -> None:
        """Remove what a layer has read."""
        for path in self.folder.glob(f"into-{layer}-*.safetensors"):
            path.unlink()


def give_back_memory() -> None:
    """Return to the system what is no longer used; glibc keeps it, in pieces, layer by layer."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _empty(part: nn.Module) -> None:
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.to("meta")
    give_back_memory()


def _same_end(path: str, stored: set[str]) -> str:
    """The list's name in files that leave out or add the base model's prefix."""
    for name in stored:
        if path.endswith(f".{name}") or name.endswith(f".{path}"):
            return name
    raise NotStreamableError(f"the checkpoint's files hold no {path!r}, only {', '.join(sorted(stored))}")


def _on_meta(module: nn.Module) -> list[str]:
    return [name for name, tensor in module.state_dict().items() if tensor.device.type == "meta"]


@torch.no_grad()
def _fill_buffers(model: Any, module: nn.Module, device: torch.device) -> None:
    """Compute tables that no file holds (rotary frequencies), as transformers does after loading."""
    lost = [
        name
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.device.type == "meta" and name in module._non_persistent_buffers_set
    ]
    loaded = (p for p in module.parameters(recurse=False) if p.device.type != "meta")
    # What transformers has loaded it does not initialise again.
    if lost and all(getattr(parameter, "_is_hf_initialized", False) for parameter in loaded):
        for name in lost:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device=device)
        model._init_weights(module)
