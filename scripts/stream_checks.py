"""What `moekit compress --stream` needs of memory and disk, counted before any work."""

import psutil
from torch import Tensor

from ..compress.fidelity import CHUNK_ELEMENTS
from ..moe.discovery import expert_layers
from ..moe.layer_stream import LayerStream
from .prepare import Job
from .staging import Staging
from .verify import PROBES

FLOAT = 4
"""Bytes of a number that flows, at most."""
LAYER_COPIES = 2
"""Experts are fused from single tensors while they are loaded, so a layer is there twice for a while."""
LOGITS = 4
"""Of two models, as float32, and as logarithms."""
FIDELITY_CHUNKS = 5
"""Of log-probabilities at a time, while two models are compared."""
KERNELS = 500_000_000
"""That oneDNN makes on CPUs for matrices of half precision, one for each number of tokens, and keeps."""
MARGIN = 1.2
"""What allocators waste."""


def check_memory(stream: LayerStream, job: Job) -> None:
    """Refuse a limit that the work does not fit into.

    Args:
        stream: Without weights.
        job: With the limit, such as 4GB; no limit by default.

    Raises:
        ValueError: Says how much is needed, and for what.
    """
    limit = job.options.memory_limit
    if limit is None:
        return
    largest = max(_bytes(stream.state_dict(index)) for index in range(len(stream)))
    parts = {
        "one decoder layer while it is loaded": LAYER_COPIES * largest,
        "what lies outside of the layers": _bytes(stream.state_dict(None)),
        "a batch of text": _batch_bytes(stream, job),
        "Python and libraries": psutil.Process().memory_info().rss,
        "kernels": KERNELS if stream.device.type == "cpu" and stream.dtype.itemsize < FLOAT else 0,
    }
    needed = int(MARGIN * sum(parts.values()))
    if needed > size_in_bytes(limit):
        shown = ", ".join(f"{name} {size:,}" for name, size in parts.items())
        raise ValueError(
            f"--memory-limit {limit} is too small: {needed:,} bytes are needed ({shown}, and a fifth that is "
            "wasted); give that at least, or a smaller --batch-size"
        )


def reserve_disk(staging: Staging, job: Job, *, model_bytes: int, block_bytes: int) -> None:
    """Refuse to begin when the disk has no room for the result and for what flows from layer to layer.

    Args:
        staging: Where both go; what an earlier run has left there is counted as there.
        job: Whose texts flow.
        model_bytes: Of all tensors, in the result's type.
        block_bytes: Of what a layer hands on for one block of text.

    Raises:
        DiskFullError: Too little room.
    """
    blocks = len(job.texts.calibration)
    # The original's and the result's, or enough of the latter to verify it.
    blocks += 2 * len(job.texts.held_out) if job.options.report else PROBES
    # What a layer reads stays until all that it gives is there.
    needed = model_bytes + 2 * blocks * block_bytes
    staging.reserve(max(0, needed - sum(p.stat().st_size for p in staging.work.rglob("*") if p.is_file())))


def size_in_bytes(text: str) -> int:
    """Of a size such as 500MB, in powers of ten."""
    unit = {"K": 3, "M": 6, "G": 9, "T": 12}[text.strip()[-2].upper()]
    return int(float(text.strip()[:-2]) * 10**unit)


def _batch_bytes(stream: LayerStream, job: Job) -> int:
    """Of what the experts read, hold and give, and of the logits."""
    tokens = job.options.batch_size * job.texts.calibration.seq_len
    judged = tokens if job.options.report else PROBES * job.texts.calibration.seq_len
    chunks = FIDELITY_CHUNKS * FLOAT * CHUNK_ELEMENTS if job.options.report else 0
    layers = expert_layers(stream.model)
    each = max(layer.top_k * (2 * layer.hidden_size + 3 * layer.experts()[0].width) for layer in layers)
    vocabulary = stream.model.config.get_text_config().vocab_size
    return max(FLOAT * tokens * each, FLOAT * LOGITS * judged * vocabulary + chunks)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
