"""The task head of a Transformers model: its last linear map, from features to logits."""

# C classes or V vocabulary, D feature width

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

CLASSIFIERS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForTokenClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)
"""What the classes of classifiers have in their name."""


class UnsupportedStudentError(ValueError):
    """A model whose task head cannot be found, or is not one linear map."""


@dataclass(frozen=True, slots=True)
class TaskHead:
    """Where a model's logits come from."""

    name: str
    """Module path."""
    linear: nn.Linear
    """The map itself."""
    reads_tokens: bool
    """Whether it reads one feature for each token ``[B, S, D]``, not one for each example ``[B, D]``."""

    @property
    def num_features(self) -> int:
        """D."""
        return self.linear.in_features

    @property
    def num_classes(self) -> int:
        """C, or V with padded columns."""
        return self.linear.out_features


def task_head(model: PreTrainedModel) -> TaskHead:
    """Find the task head of a causal language model or a classifier.

    For language models it is the output embedding. For classifiers it is the one linear map to
    ``config.num_labels`` outputs that is not part of the base model; decoders that classify sequences apply
    it to every token and keep the last token's.

    Raises:
        UnsupportedStudentError: There is none, or more than one; says what there is.
    """
    name = type(model).__name__
    modules = {module: path for path, module in model.named_modules()}
    embeddings = model.get_output_embeddings()
    if isinstance(embeddings, nn.Linear):
        return TaskHead(modules[embeddings], embeddings, reads_tokens=True)
    if not any(kind in name for kind in CLASSIFIERS):
        raise UnsupportedStudentError(
            f"{name} is neither a language model nor a classifier ({', '.join(CLASSIFIERS)})"
        )
    base, num_labels = set(model.base_model.modules()), model.config.num_labels
    maps = {path: m for m, path in modules.items() if isinstance(m, nn.Linear) and m not in base}
    found = {path: m for path, m in maps.items() if m.out_features == num_labels}
    if len(found) != 1:
        raise UnsupportedStudentError(
            f"{name} has {len(found)} linear maps to num_labels={num_labels} outputs outside its base model, "
            f"of {sorted(maps) or 'none'}; one is needed"
        )
    ((path, linear),) = found.items()
    # The name that Transformers gives to a decoder's classifier of sequences.
    reads_tokens = "ForTokenClassification" in name or path == "score"
    return TaskHead(path, linear, reads_tokens)
