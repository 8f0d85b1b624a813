"""What an MoE layer is: find it, read it, route with it, record it, rebuild it, save it.

Importing this package registers the moekit checkpoint form with Transformers, so that a plain
``AutoModelForCausalLM.from_pretrained`` loads it.
"""

from .activations import neuron_activations
from .checkpoint import (
    MoekitConfig,
    MoekitQuantizer,
    max_logit_difference,
    save_checkpoint,
    update_expert_count,
)
from .data import TokenBlocks, check_tokenizer, split_blocks, token_blocks
from .discovery import UnsupportedModelError, expert_layers
from .documents import Document, load_documents
from .dropout.analytic_router import AnalyticRouter
from .dropout.balance import load_balance_loss
from .dropout.build import ROUTERS, DropoutSpec, smoe_layers
from .dropout.callback import ActiveExpertsCallback
from .dropout.center import CenteredLoad, center_routers
from .dropout.cmoe import to_cmoe
from .dropout.convert import PARTITIONS, set_active_experts, to_smoe_dropout
from .dropout.dense_dropout import add_ffn_dropout
from .dropout.dense_ffn import DenseFFN, dense_ffns
from .dropout.densify import to_dense
from .dropout.ffn_activations import coactivation_partitions, ffn_activations
from .dropout.hash_router import HashRouter
from .dropout.layer import SMoEDropout
from .dropout.load import ExpertLoadCallback, LoadMeter, RelativeLoad
from .dropout.observe import RoutedTokens, observe_routers
from .dropout.router import SMoERouter
from .dropout.schedule import SCHEDULES, KSchedule
from .dropout.stock import to_stock
from .dropout.thor import ThorRouter, consistency_loss, thor_loss
from .dropout.trainer import DropoutTrainer
from .footprint import Footprint, footprint
from .layer import ExpertLayer, Routing
from .recording import record_routing
from .router import RouterConstraints
from .samples import InputSamples, LayerSample, record_inputs
from .statistics import LayerStatistics, RoutingStatistics
from .trainer import ExpertSafeCheckpoints, MoETrainer
from .weights import ExpertWeights

__all__ = [
    "PARTITIONS",
    "ROUTERS",
    "SCHEDULES",
    "ActiveExpertsCallback",
    "AnalyticRouter",
    "CenteredLoad",
    "DenseFFN",
    "Document",
    "DropoutSpec",
    "DropoutTrainer",
    "ExpertLayer",
    "ExpertLoadCallback",
    "ExpertSafeCheckpoints",
    "ExpertWeights",
    "Footprint",
    "HashRouter",
    "InputSamples",
    "KSchedule",
    "LayerSample",
    "LayerStatistics",
    "LoadMeter",
    "MoETrainer",
    "MoekitConfig",
    "MoekitQuantizer",
    "RelativeLoad",
    "RoutedTokens",
    "RouterConstraints",
    "Routing",
    "RoutingStatistics",
    "SMoEDropout",
    "SMoERouter",
    "ThorRouter",
    "TokenBlocks",
    "UnsupportedModelError",
    "add_ffn_dropout",
    "center_routers",
    "check_tokenizer",
    "coactivation_partitions",
    "consistency_loss",
    "dense_ffns",
    "expert_layers",
    "ffn_activations",
    "footprint",
    "load_balance_loss",
    "load_documents",
    "max_logit_difference",
    "neuron_activations",
    "observe_routers",
    "record_inputs",
    "record_routing",
    "save_checkpoint",
    "set_active_experts",
    "smoe_layers",
    "split_blocks",
    "thor_loss",
    "to_cmoe",
    "to_dense",
    "to_smoe_dropout",
    "to_stock",
    "token_blocks",
    "update_expert_count",
]
