"""What the routers are asked before anything is measured."""

import pytest
from moekit.moe.discovery import expert_layers
from moekit.scripts.options import CompressOptions
from moekit.scripts.planning import try_planner

from ..moe.samples import fresh_case

ARGUMENTS = {"model": "m", "method": "ean", "grouping": "adaptive", "experts": 4}


def test_adaptive_counts_do_not_go_with_routers_of_groups():
    layers = expert_layers(fresh_case("deepseek_v3")[0])
    assert layers[0].router_constraints.num_groups > 1
    with pytest.raises(ValueError, match="adaptive counts experts one by one"):
        try_planner(CompressOptions(**ARGUMENTS), layers)
    try_planner(CompressOptions(**ARGUMENTS | {"grouping": "uniform"}), layers)
    try_planner(CompressOptions(**ARGUMENTS | {"method": "m-smoe"}), layers)  # redirects, keeps the groups


def test_adaptive_counts_go_with_other_routers():
    try_planner(CompressOptions(**ARGUMENTS), expert_layers(fresh_case("qwen3_moe")[0]))
