"""What the documented scripts use of vLLM, which is not installed here, with the behaviour that its source states."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlgen_stats.toolkit.extraction import capture_residual, generate

VERSION = "0.11.0"


class SamplingParams:
    """vLLM's names and defaults of what the requests set; another name is a TypeError, as in vLLM."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 16,
        seed: int | None = None,
        stop: list[str] | None = None,
        stop_token_ids: list[int] | None = None,
    ) -> None:
        self.temperature, self.top_p, self.max_tokens, self.seed = temperature, top_p, max_tokens, seed
        self.stop, self.stop_token_ids = stop or [], stop_token_ids or []


class LLM:
    """Completes token ids with transformers; stores hidden states of prompts where it is set up to."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        speculative_config: dict[str, Any] | None = None,
        kv_transfer_config: dict[str, Any] | None = None,
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.layer_ids: list[int] = []
        if speculative_config is not None and kv_transfer_config is not None:
            assert speculative_config["method"] == "extract_hidden_states"
            assert speculative_config["num_speculative_tokens"] == 1
            assert not enable_chunked_prefill  # vLLM refuses it
            assert not enable_prefix_caching  # or tokens of a prefix read before are missing
            assert kv_transfer_config["kv_connector"] == "ExampleHiddenStatesConnector"
            self.layer_ids = speculative_config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
            self.storage = Path(kv_transfer_config["kv_connector_extra_config"]["shared_storage_path"])
            self.storage.mkdir(parents=True)

    def generate(self, prompts: list[dict[str, list[int]]], params: Any) -> list[SimpleNamespace]:
        """One output a prompt, in order."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        return [self._complete(number, *one) for number, one in enumerate(zip(ids, each, strict=True))]

    def _complete(self, number: int, ids: list[int], asked: SamplingParams) -> SimpleNamespace:
        drawn = {"greedy": True} if asked.temperature == 0 else {"seeds": [asked.seed or 0], "top_p": asked.top_p}
        one = generate(self.model, self.tokenizer, [ids], max_new_tokens=asked.max_tokens, **drawn)[0]
        tokens: list[int] = []
        text, reason = "", "length"
        for token in one.token_ids:
            tokens.append(token)
            if token == self.tokenizer.eos_token_id or token in asked.stop_token_ids:
                reason = "stop"
                break
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            ends = [text.index(string) for string in asked.stop if string in text]
            if ends:  # the text ends before the stop string, the tokens after it
                text, reason = text[: min(ends)], "stop"
                break
        output = SimpleNamespace(text=text, token_ids=tokens, finish_reason=reason)
        return SimpleNamespace(
            outputs=[output], kv_transfer_params=self._store(number, ids) if self.layer_ids else None
        )

    @torch.inference_mode()
    def _store(self, number: int, ids: list[int]) -> dict[str, str]:
        """Layer id 0 is the embedding, i the residual stream after i blocks; the final norm is never applied."""
        n_blocks = self.model.config.num_hidden_layers
        with capture_residual(self.model, n_blocks - 1) as last:
            states = self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        states = [*states[:n_blocks], last.value]
        kept = torch.stack([states[layer_id][0] for layer_id in self.layer_ids], dim=1)
        file = self.storage / f"{number}-request.safetensors"
        save_file({"hidden_states": kept.contiguous(), "token_ids": torch.tensor(ids)}, file)
        return {"hidden_states_path": str(file)}


def modules() -> dict[str, ModuleType]:
    """Entries of sys.modules."""
    names = ["vllm", "vllm.distributed", "vllm.distributed.kv_transfer"]
    names += ["vllm.distributed.kv_transfer.kv_connector", "vllm.distributed.kv_transfer.kv_connector.v1"]
    found = {name: ModuleType(name) for name in names}
    vars(found["vllm"]).update(LLM=LLM, SamplingParams=SamplingParams, __version__=VERSION)
    vars(found[names[-1]]).update(example_hidden_states_connector=SimpleNamespace(load_hidden_states=load_file))
    return found
