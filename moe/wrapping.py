"""Modules around a Transformers model that are trained in its place."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


class WrapsModel(nn.Module):
    """Shows accelerate, FSDP and DeepSpeed what they ask a model for."""

    @property
    def plain(self) -> PreTrainedModel:
        """The model; each kind of wrapper says where it is."""
        raise NotImplementedError

    @property
    def config(self) -> Any:
        """The plain model's."""
        return self.plain.config

    @property
    def _no_split_modules(self) -> Any:
        return self.plain._no_split_modules

    def get_input_embeddings(self) -> nn.Module:
        """The plain model's."""
        return self.plain.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The plain model's; accelerate has to see whether they are tied."""
        return self.plain.get_output_embeddings()

    def tie_weights(self) -> None:
        """Tie what the plain model ties."""
        self.plain.tie_weights()
