"""Record what each MoE layer does while the model runs; padding never counts.

The experts' forward is wrapped for the time of the recording: it is called with every choice as a token of
its own and weight 1, by whatever implementation is active, so the outputs of single experts are seen without
computing anything twice, and are then weighted and added as before.
"""

# T tokens, K active experts, S = T * K choices, E logical experts, D hidden (model) width

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .discovery import expert_layers
from .layer import ExpertLayer
from .statistics import LayerStatistics, RoutingStatistics


class _Mask:
    """The attention masks of the running forward: which of a layer's tokens count."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}

    def remember(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        self.inputs = kwargs

    def of(self, layer_name: str, num_tokens: int) -> Tensor | None:
        """``[T]`` bool, or ``None`` when every token counts."""
        in_decoder = "decoder_input_ids" in self.inputs and ".decoder." in f".{layer_name}"
        mask = self.inputs.get("decoder_attention_mask" if in_decoder else "attention_mask")
        if mask is None or mask.ndim != 2:
            return None
        # With a key-value cache the mask also covers the past; only the last columns are being computed.
        columns = num_tokens // mask.shape[0]
        mask_T = mask[:, -columns:].flatten().bool() if columns else mask.new_empty(0).bool()
        return mask_T if mask_T.numel() == num_tokens else None


class _LayerRecorder:
    """Adds up one layer's statistics on the layer's own device."""

    def __init__(self, layer: ExpertLayer, mask: _Mask) -> None:
        self.layer = layer
        self.mask = mask
        self.sums = LayerStatistics.zeros(layer.num_experts, layer.hidden_size, layer.top_k)
        device = next(layer.block.parameters()).device
        for name, tensor in self.sums.tensors.items():
            setattr(self.sums, name, tensor.to(device))
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add_logits(self, logits_TE: Tensor) -> None:
        """Gram matrix and entropy of the router logits."""
        mask_T = self.mask.of(self.layer.name, logits_TE.shape[0])
        logits_TE = logits_TE.detach().float()
        logits_TE = logits_TE if mask_T is None else logits_TE[mask_T.to(logits_TE.device)]
        self.sums.logit_gram += (logits_TE.T @ logits_TE).double()
        self.entropy += torch.special.entr(logits_TE.softmax(-1)).sum().double()

    @torch.no_grad()
    def add_choices(self, ids_TK: Tensor, weights_TK: Tensor, outputs_TKD: Tensor) -> None:
        """Everything that is summed over the tokens of an expert."""
        num_experts, sums = self.layer.num_experts, self.sums
        num_tokens = ids_TK.shape[0]
        mask_T = self.mask.of(self.layer.name, num_tokens)
        # A weight of 0 is a choice that was not served (over capacity); ids from E on have no weights.
        real_TK = (weights_TK != 0) & (ids_TK < num_experts)
        if mask_T is not None:
            mask_T = mask_T.to(ids_TK.device)
            real_TK = real_TK & mask_T.unsqueeze(1)
            num_tokens = int(mask_T.sum())
        sums.num_tokens += num_tokens

        bins_TK = torch.where(real_TK, ids_TK, num_experts)
        chosen_TE = torch.zeros(len(ids_TK), num_experts + 1, device=ids_TK.device).scatter_(1, bins_TK, 1.0)
        chosen_TE = chosen_TE[:, :num_experts]
        sums.coactivation += (chosen_TE.T @ chosen_TE).round().long()
        bins_S, outputs_SD = bins_TK.flatten(), outputs_TKD.detach().flatten(0, 1)
        norms_S = torch.linalg.vector_norm(outputs_SD, dim=-1, dtype=torch.float32).double()
        weights_S = weights_TK.detach().flatten().double()
        ones_S = torch.ones_like(bins_S)

        def by_expert(values: Tensor) -> Tensor:
            out = values.new_zeros(num_experts + 1, *values.shape[1:])
            return out.index_add_(0, bins_S, values)[:num_experts]

        sums.counts += by_expert(ones_S)
        sums.routing_weight_sums += by_expert(weights_S)
        sums.output_norm_sums += by_expert(norms_S)
        sums.gated_output_norm_sums += by_expert(norms_S * weights_S)
        sums.output_sums += by_expert(outputs_SD.float()).double()
        highest_E = norms_S.new_zeros(num_experts + 1).scatter_reduce_(0, bins_S, norms_S, "amax")
        sums.max_output_norm = torch.maximum(sums.max_output_norm, highest_E[:num_experts])

    def finish(self) -> LayerStatistics:
        """The sums, on the CPU."""
        for name, tensor in self.sums.tensors.items():
            setattr(self.sums, name, tensor.cpu())
        self.sums.router_entropy_sum = float(self.entropy)
        return self.sums


@contextmanager
def record_routing(
    model: PreTrainedModel, layers: list[ExpertLayer] | None = None
) -> Iterator[RoutingStatistics]:
    """Record the routing of everything that `model` computes inside the context.

    The statistics are filled when the context ends. Positions whose ``attention_mask`` (for a decoder behind
    an encoder: ``decoder_attention_mask``) is 0 do not count; with a key-value cache only new tokens do.
    The model's output is the same up to the rounding of a different order of addition.

    Args:
        model: Any supported model, merged ones included (statistics are by logical expert).
        layers: The layers to record; all by default.

    Yields:
        Statistics by layer name. Layers that never ran (a vision tower on text) are left out.

    *Departs from the idea of one pass* for Llama-4, whose experts see a scaled input: its "ungated" outputs
    are those of the scaled input.
    """
    layers = expert_layers(model) if layers is None else layers
    statistics = RoutingStatistics()
    mask = _Mask()
    recorders = [_LayerRecorder(layer, mask) for layer in layers]
    handle = model.register_forward_pre_hook(mask.remember, with_kwargs=True)
    with ExitStack() as stack:
        stack.callback(handle.remove)
        for recorder in recorders:
            stack.enter_context(recorder.layer.observe_logits(recorder.add_logits))
            stack.enter_context(recorder.layer.observe_outputs(recorder.add_choices))
        yield statistics
    for recorder in recorders:
        if recorder.sums.num_tokens:
            statistics.layers[recorder.layer.name] = recorder.finish()
