"""What an MoE layer is: find it, read it, route with it, record it, rebuild it, save it.

Importing this package registers the moekit checkpoint form with Transformers, so that a plain
``AutoModelForCausalLM.from_pretrained`` loads it.
"""

from .activations import neuron_activations
from .checkpoint import MoekitConfig, MoekitQuantizer, save_checkpoint, update_expert_count
from .data import TokenBlocks, check_tokenizer, split_blocks, token_blocks
from .discovery import UnsupportedModelError, expert_layers
from .documents import Document, load_documents
from .footprint import Footprint, footprint
from .layer import ExpertLayer, Routing
from .recording import record_routing
from .router import RouterConstraints
from .samples import InputSamples, LayerSample, record_inputs
from .statistics import LayerStatistics, RoutingStatistics
from .trainer import ExpertSafeCheckpoints, MoETrainer
from .weights import ExpertWeights

__all__ = [
    "Document",
    "ExpertLayer",
    "ExpertSafeCheckpoints",
    "ExpertWeights",
    "Footprint",
    "InputSamples",
    "LayerSample",
    "LayerStatistics",
    "MoETrainer",
    "MoekitConfig",
    "MoekitQuantizer",
    "RouterConstraints",
    "Routing",
    "RoutingStatistics",
    "TokenBlocks",
    "UnsupportedModelError",
    "check_tokenizer",
    "expert_layers",
    "footprint",
    "load_documents",
    "neuron_activations",
    "record_inputs",
    "record_routing",
    "save_checkpoint",
    "split_blocks",
    "token_blocks",
    "update_expert_count",
]
