"""``W = U V + S``: experts as a product of low rank and a few whole rows."""

from .decompose import Factors, decompose
from .factorise import factorise_layer, low_rank_rows
from .row_pruning import RowPruner, RowPruning
from .schedule import kept_share

__all__ = [
    "Factors",
    "RowPruner",
    "RowPruning",
    "decompose",
    "factorise_layer",
    "kept_share",
    "low_rank_rows",
]
