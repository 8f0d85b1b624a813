"""Every MoE family that can be built small: one adapter contract, proved on the model itself."""

import pytest
import torch

from moekit.moe import expert_layers

from .families import FAMILIES, tiny_inputs
