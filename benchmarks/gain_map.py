"""The gain map of a run of `moekit compress --until-collapse-risk`, as a picture for the docs.

moekit compress scripts/bundled --method ean --until-collapse-risk 0.05 --out smaller
python benchmarks/gain_map.py smaller
"""

import json
from pathlib import Path

import tyro
from moekit.compress.gain_map import GainMap, GainStep, gain_figure
from moekit.moe.figure_style import figure_png


def main(run: tyro.conf.Positional[Path], picture: Path = Path("docs/figures/gain_map.png")) -> None:
    """Draw it.

    Args:
        run: Folder that the command made.
        picture: To write.
    """
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))["descent"]["gain_map"]
    steps = [GainStep(**step) for step in facts.pop("steps")]
    picture.write_bytes(figure_png(gain_figure(GainMap(**facts, steps=steps)), 110))


if __name__ == "__main__":
    tyro.cli(main)
