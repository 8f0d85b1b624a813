"""How a matrix of logits is cut so that only a small piece exists at a time."""

# N rows, C columns

from collections.abc import Iterator

import torch

TILE_ROWS = 256
"""Rows of one tile of whole rows: 50 MB a side at V = 49,152 and 156 MB at 151,936, in single precision.

Each tile reads the weights three times and adds to the gradient, so few rows are slow. One step of KL at
V = 151,936, D = 1,024, N = 512, one thread: 7.5 s with 55 rows, 5.9 with 110, 5.0 with 171, 4.3 with 256.
"""
COLUMN_TILE_ELEMENTS = 2**21
"""Logits of one tile where columns may be cut too: 8 MB a side. From 2**19 to 2**22 products are as fast."""
COLUMN_TILE_ROWS = 4096
"""Most rows of such a tile."""
BLOCK_ELEMENTS = {"cpu": 2**18}
"""Logits that are worked on at once between the matrix products, by device type; elsewhere the whole tile.

One MB stays in a core's own cache: at V = 49,152 a step takes 2 to 11 % longer with 2**20, and as long with
2**16.
"""


def tiles(
    num_rows: int, num_columns: int, *, whole_rows: bool, tile_elements: int | None
) -> list[tuple[slice, slice]]:
    """Cut N x C into tiles of nearly equal size, one column range after the other.

    Args:
        num_rows: N; without any there are no tiles.
        num_columns: C.
        whole_rows: Whether a tile has all columns.
        tile_elements: Of one tile at most, but at least one row or column; ``None`` for what was measured.

    Raises:
        ValueError: ``tile_elements`` is below 1.
    """
    if tile_elements is not None and tile_elements < 1:
        raise ValueError(f"tile_elements={tile_elements} is not at least 1; None takes what was measured")
    if whole_rows:
        columns = num_columns
        rows = TILE_ROWS if tile_elements is None else tile_elements // columns
    else:
        rows = min(num_rows, COLUMN_TILE_ROWS, tile_elements or COLUMN_TILE_ROWS)
        columns = (tile_elements or COLUMN_TILE_ELEMENTS) // max(rows, 1)
    row_slices = list(even_slices(num_rows, rows))
    return [(r, c) for c in even_slices(num_columns, columns) for r in row_slices]


def blocks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Rows of a tile that are worked on together."""
    most = BLOCK_ELEMENTS.get(device.type, num_rows * num_columns)
    return even_slices(num_rows, most // max(num_columns, 1))


def even_slices(size: int, most: int) -> Iterator[slice]:
    """Cut a range into as few slices as there can be of at most ``most``, none much smaller than others."""
    count = -(-size // max(most, 1))
    for i in range(count):
        yield slice(i * size // count, (i + 1) * size // count)
