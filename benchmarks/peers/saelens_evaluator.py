"""SAELens' own evaluator on given tokens: a process in SAELens' environment that prints one JSON line.

Tokens come from a file instead of a data set: `run_evals` asks its store for batches of tokens and for nothing else.
"""

# pyright: reportMissingImports=false
# The package is in an environment of its own (peers/launch.py).

import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler


class GivenTokens:
    """What `run_evals` uses of an ActivationsStore."""

    def __init__(self, tokens: torch.Tensor, batch: int) -> None:
        """All blocks [blocks ctx], of which `batch` come at a time, from the first on."""
        self._tokens, self.store_batch_size_prompts, self.context_size = tokens, batch, tokens.shape[1]
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        """Start over."""
        self._next = 0

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        """The next blocks."""
        self._next += batch_size
        return self._tokens[self._next - batch_size : self._next]


def main(request: dict) -> None:
    """Evaluate each SAE of the request: {"model", "tokens", "batch", "saes": {name: {"folder", "hook"}}}."""
    torch.set_num_threads(1)
    tokens = torch.from_numpy(np.load(request["tokens"])).long()
    batches = len(tokens) // request["batch"]
    found = {}
    for name, sae_request in request["saes"].items():
        sae = SAE.load_from_disk(sae_request["folder"])
        sae.cfg.metadata.hook_name = sae_request["hook"]
        # float32, for transformers 5 takes the files' own format, and losses in bfloat16 are means of rounded numbers.
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        model = load_model("AutoModelForCausalLM", request["model"], "cpu", options, [sae_request["hook"]])
        store, config = GivenTokens(tokens, request["batch"]), get_eval_everything_config(request["batch"], batches, batches)
        metrics, _ = run_evals(sae, store, model, ActivationScaler(), config)  # type: ignore[arg-type]
        found[name] = {key: value for group in metrics.values() for key, value in group.items()}
    versions = SimpleNamespace(**{name: version(name) for name in ("sae-lens", "transformers", "torch")})
    print(json.dumps({"versions": vars(versions), "metrics": found}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
