"""lm-eval on compressed checkpoints with local tasks, and the same figures computed without it.

    python3 -m venv lmeval && lmeval/bin/pip install -c constraints.txt "lm_eval[hf]" .
    python benchmarks/lm_eval_check.py --lm-eval-python lmeval/bin/python --data valid.jsonl.gz

The bundled model, and what `moekit compress` makes of it in the stock form and in its own, answer the
questions of the tasks domain (exact match of what is generated) and read prose (bits per byte). The stock
form is loaded by plain `lm_eval`; moekit's after `import moekit.moe`. Nothing is fetched. Bits per byte and
answers must equal ours to 1e-4. Writes `benchmarks/results/lm_eval_check.json`.
"""

import json
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from compress_quality import MARKERS
from moekit.compress import task_accuracy
from moekit.compress.generation import split_questions
from moekit.moe import load_documents
from moekit.scripts import cli
from moekit.scripts.prepare import bundled_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

RUN = "import moekit.moe; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
"""`lm_eval` for checkpoints in moekit's form."""
LENGTH = 256
ALLOWED = 1e-4


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate with lm-eval."""

    lm_eval_python: str
    """Of the environment in which lm_eval and moekit are installed."""
    data: str
    """Text with the domains prose and tasks."""
    questions: int = 100
    texts: int = 20
    results: Path = Path("benchmarks/results/lm_eval_check.json")


def write_tasks(config: EvalConfig, folder: Path) -> tuple[list[Any], list[str]]:
    """Two tasks as lm-eval reads them (JSON is YAML); returns what they ask."""
    documents = load_documents(config.data)
    asked = [document for document in documents if document.domain == "tasks"][: config.questions]
    texts = [document.text for document in documents if document.domain == "prose"][: config.texts]
    rows = {
        "moekit_answers": [
            {"question": question.prompt, "answer": question.answer}
            for question in split_questions(asked, MARKERS["tasks"])
        ],
        "moekit_prose": [{"text": text} for text in texts],
    }
    ways = {
        "moekit_answers": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",  # not rendered: a text that looks like a list would become one
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 32},
            "metric_list": [{"metric": "exact_match", "ignore_case": False, "ignore_punctuation": False}],
            "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}]}],
        },
        "moekit_prose": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, way in ways.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        task = {"task": name, "test_split": "test", **data, **way}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return asked, texts


def by_lm_eval(config: EvalConfig, model: Path, tasks: Path, *, own_form: bool) -> dict[str, float]:
    """What `lm_eval` says."""
    start = ["-c", RUN] if own_form else ["-m", "lm_eval"]
    given = f"pretrained={model},dtype=float32,max_length={LENGTH},add_bos_token=False"
    words = ["--model", "hf", "--model_args", given, "--tasks", "moekit_answers,moekit_prose"]
    words += ["--include_path", str(tasks), "--output_path", str(tasks / "out"), "--batch_size", "1"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache")}
    command = [config.lm_eval_python, *start, *words, "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"lm_eval failed: {done.stderr[-4000:]}")
    newest = max((tasks / "out").rglob("results*.json"), key=lambda path: path.stat().st_mtime_ns)
    results = json.loads(newest.read_text(encoding="utf-8"))["results"]
    return {
        "answers": results["moekit_answers"]["exact_match,stripped"],
        "bits per byte": results["moekit_prose"]["bits_per_byte,none"],
    }


@torch.no_grad()
def by_moekit(model: Path, asked: list[Any], texts: list[str]) -> dict[str, float]:
    """The same, with transformers and moekit alone."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    bits, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        # As lm-eval reads: from the end-of-text token on, and the last window as long as the others.
        ids = torch.cat([torch.tensor([tokenizer.eos_token_id]), ids])
        for start in range(1, len(ids), LENGTH):
            targets = ids[start : start + LENGTH]
            end = start + len(targets)
            read = ids[max(0, end - LENGTH - 1) : end - 1]
            logits = loaded(input_ids=read[None]).logits[0, -len(targets) :].float()
            found = logits.log_softmax(-1).gather(-1, targets[:, None])
            bits -= float(found.double().sum()) / math.log(2)
        size += len(text.encode("utf-8"))
    right = task_accuracy(loaded, tokenizer, asked, answer_marker=MARKERS["tasks"])
    return {"answers": sum(right) / len(right), "bits per byte": bits / size}


def main(config: EvalConfig) -> None:
    """Compress, evaluate, compare."""
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked, texts = write_tasks(config, folder)
        models = {"original": bundled_folder()}
        for form in ("stock", "moekit"):
            models[form] = folder / form
            words = ["--experts", "8", "--form", form, "--no-report", "--out", str(folder / form)]
            assert cli.main(["compress", str(bundled_folder()), *words]) == 0
        for name, model in models.items():
            theirs = by_lm_eval(config, model, folder, own_form=name == "moekit")
            ours = by_moekit(model, asked, texts)
            rows[name] = {"lm-eval": theirs, "moekit": ours}
            print(name, rows[name], flush=True)
    config.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        for figure, ours in row["moekit"].items():
            if abs(row["lm-eval"][figure] - ours) > ALLOWED:
                raise SystemExit(f"{figure} of {name}: {row['lm-eval'][figure]} and {ours}")


if __name__ == "__main__":
    main(tyro.cli(EvalConfig))
