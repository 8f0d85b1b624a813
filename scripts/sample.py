"""Cut a small sample of a domain-labelled corpus: how the bundled model's `sample.jsonl` was made.

python -m moekit.scripts.sample --data valid.jsonl.gz --out sample.jsonl --domains prose pydoc tasks
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..moe.documents import load_documents


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Take the first documents of each domain up to a number of characters."""

    data: str
    """Text with domains."""
    out: Path
    domains: tuple[str, ...]
    """Which domains, in this order."""
    characters: int = 60_000
    """At most, of each domain."""


def main(config: SampleConfig) -> None:
    """Write one JSON object a line."""
    left = dict.fromkeys(config.domains, config.characters)
    lines = []
    for document in load_documents(config.data):
        if len(document.text) <= left.get(document.domain, 0):
            left[document.domain] -= len(document.text)
            lines.append(json.dumps({"domain": document.domain, "text": document.text}, ensure_ascii=False))
    if unused := sorted(d for d in left if left[d] == config.characters):
        raise ValueError(f"{config.data} has no documents of {unused}")
    config.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(SampleConfig))
