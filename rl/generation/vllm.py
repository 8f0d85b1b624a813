"""Completions by vLLM: a server behind its OpenAI-compatible interface, or an engine in this process.

The server was run on a CPU, the engine not at all; no GPU was at hand. Two differences from
`EmbeddedGenerator`: a seed gives the same samples again only under the same load, and the log-probs come from
other kernels, so a trainer corrects for the mismatch.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from ...moe.checkpoint import save_checkpoint
from .generator import Sample, SampleRequest
from .settings import SamplingSettings

INSTALL = "vLLM is not installed: pip install 'vllm>=0.28' (its CUDA wheels pin their own torch)"


class VllmServer:
    """A running ``vllm serve``; its weights are those it was started with.

    Args:
        url: For instance ``http://localhost:8000``.
        model: The name that the server gives to its model.
        logprobs_mode: The server's own setting; see `VllmGenerator`.
        timeout: Seconds that one request may take.
        max_concurrency: Requests at a time; the server batches them.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        logprobs_mode: str = "raw_logprobs",
        timeout: float = 600.0,
        max_concurrency: int = 64,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} must begin with http:// or https://")
        self.url = url.rstrip("/") + "/v1/completions"
        self.model = model
        self.logprobs_mode = logprobs_mode
        self.timeout = timeout
        self.max_concurrency = max_concurrency

    def complete(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[list[Sample]]:
        """Ask the server for every request's samples."""
        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(lambda request: self._complete(request, settings), requests))

    def _complete(self, request: SampleRequest, settings: SamplingSettings) -> list[Sample]:
        body = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "return_token_ids": True,
            **_parameters(request, settings),
        }
        answer = self._post(body)
        choices: Any = answer.get("choices") if isinstance(answer, dict) else None
        found = len(choices) if isinstance(choices, list) else "no"
        if found != request.num_samples:
            raise ValueError(f"{self.url} returned {found} choices for n={request.num_samples}")
        return [self._sample(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(call, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode(errors="replace")
            raise ValueError(f"{self.url} refused the request ({error.code}): {said}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.url} is not a vLLM server ({error}); does `vllm serve` run?") from error

    def _sample(self, choice: dict[str, Any]) -> Sample:
        ids = choice.get("token_ids")
        if not ids:
            raise ValueError(f"{self.url} returned no token_ids; it needs vLLM 0.10.2 or later")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        return _checked_sample(ids, logprobs, choice.get("finish_reason"))


class VllmEngine:
    """An engine in this process, whose weights can be replaced. Not tested: it needs a GPU.

    Args:
        path: A stock checkpoint (the same number of experts in every layer), with its tokenizer.
        logprobs_mode: See `VllmGenerator`.
        options: Further arguments of ``vllm.LLM``.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, path: str | Path, *, logprobs_mode: str = "raw_logprobs", **options: Any) -> None:
        try:
            self.vllm: Any = import_module("vllm")
        except ImportError as error:
            raise ValueError(INSTALL) from error
        self.logprobs_mode = logprobs_mode
        self.engine: Any = self.vllm.LLM(model=str(path), logprobs_mode=logprobs_mode, **options)

    def complete(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[list[Sample]]:
        """Have the engine write every request's samples."""
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        parameters = [self.vllm.SamplingParams(**_parameters(request, settings)) for request in requests]
        answers = self.engine.generate(prompts, parameters, use_tqdm=False)
        return [[self._sample(output) for output in answer.outputs] for answer in answers]

    def load_weights(self, model: PreTrainedModel) -> None:
        """Take over a model's weights, by way of a stock checkpoint in a temporary folder.

        Raises:
            ValueError: The model has no stock form, so vLLM cannot hold it.
        """
        with TemporaryDirectory() as folder:
            if save_checkpoint(model, folder) != "stock":
                raise ValueError(
                    "vLLM holds stock models only, and this one has moekit layers: sample with "
                    "EmbeddedGenerator, or compress with form='stock'"
                )
            self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.engine.reset_prefix_cache()

    @staticmethod
    def _sample(output: Any) -> Sample:
        pairs = zip(output.token_ids, output.logprobs or [], strict=False)
        logprobs = [at_position[token].logprob for token, at_position in pairs]
        return _checked_sample(list(output.token_ids), logprobs, output.finish_reason)


class VllmGenerator:
    """Samples from vLLM; see `Generator`.

    vLLM's log-probs are log-softmax(logits) without the temperature in its mode ``raw_logprobs``; with it,
    top-k, top-p and min-p in ``processed_logprobs``. So a temperature other than 1 needs the second mode and
    no truncation; truncation, or greedy, needs the first.
    """

    def __init__(self, backend: VllmServer | VllmEngine) -> None:
        self.backend = backend

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[list[Sample]]:
        """Sample what is requested.

        Raises:
            ValueError: vLLM does not answer, or not with what was asked for, or its log-probs would not be
                log-softmax(logits / temperature).
        """
        is_scaled = settings.temperature != 1
        is_plain = not (settings.truncates or settings.greedy)
        if is_scaled and not is_plain:
            raise ValueError(
                f"temperature={settings.temperature} with greedy, top_p, top_k or min_p: vLLM has no "
                "log-probs that count the temperature alone; use temperature=1.0"
            )
        mode = "processed_logprobs" if is_scaled else "raw_logprobs"
        if (is_scaled or not is_plain) and self.backend.logprobs_mode != mode:
            raise ValueError(f"logprobs_mode={self.backend.logprobs_mode!r}: these settings need {mode!r}")
        return self.backend.complete(requests, settings)


def _parameters(request: SampleRequest, settings: SamplingSettings) -> dict[str, Any]:
    return {
        "n": request.num_samples,
        "seed": request.seed,
        "max_tokens": settings.max_new_tokens,
        "temperature": 0.0 if settings.greedy else settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "stop": list(settings.stop),
        "logprobs": 0,
        # As EmbeddedGenerator does: the text of special tokens can stop.
        "skip_special_tokens": False,
    }


def _checked_sample(ids: list[int], logprobs: list[float | None], finish_reason: Any) -> Sample:
    if len(logprobs) != len(ids):
        raise ValueError(f"vLLM returned {len(logprobs)} log-probs for {len(ids)} tokens")
    if not all(value is not None and math.isfinite(value) for value in logprobs):
        raise ValueError("vLLM returned a log-prob that is not finite: its weights hold NaN or have diverged")
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"vLLM ended a completion for an unknown reason, {finish_reason!r}")
    return Sample(tuple(ids), torch.tensor(logprobs, dtype=torch.float32), finish_reason == "stop")
