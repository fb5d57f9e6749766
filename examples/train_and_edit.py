"""Train an SAE on a layer of a language model, look at a text through it, and switch one of its latents off.

python examples/train_and_edit.py                       # the bundled model, half a minute on a CPU
python examples/train_and_edit.py gpt2 --layer 8        # another model
"""

import argparse
from itertools import islice

import torch

import everyscope
from everyscope.text.config import TextConfig
from everyscope.text.corpora import read_documents

PROMPT = "def read_lines(path):\n    with open(path) as file:\n        return file"


def rows_of(model: everyscope.LanguageModel, site: str, num_documents: int) -> torch.Tensor:
    """Activations [rows, d_in] at `site` on some files of Python's standard library, without their first tokens (BOS)."""
    documents = islice(read_documents(TextConfig(source="standard_library")), num_documents)
    return torch.cat([everyscope.capture(model, site, document.text[:2000])[0, 1:] for document in documents])


def main(name: str, layer: int, num_documents: int, num_passes: float) -> None:
    """Train, save, load, show what a prompt's tokens activate, and what one latent is for."""
    model, site = everyscope.load_language_model(name), f"resid_post.{layer}"
    rows = rows_of(model, site, num_documents)

    config = everyscope.SaeConfig(width=8 * rows.shape[1], target_l0=20)
    saes = everyscope.train_saes(
        rows, config, preset="fast", num_passes=num_passes, batch_rows=256, site=site, model=name, seed=0
    )
    print(saes.losses[0])
    saes[0].save("runs/example_sae")
    sae = everyscope.load_sae("runs/example_sae")
    print(sae)

    tokens = everyscope.tokenize(model, PROMPT)
    with torch.no_grad(), everyscope.splice(model, sae, keep_error=True) as spliced:
        logits = model(tokens).logits[0, -1]
    strongest = spliced.latents[site][0].max(-1)
    for token, activation, latent in zip(tokens.strings[0][1:], strongest.values[1:], strongest.indices[1:], strict=True):
        print(f"{token!r:14} latent {latent:5d} at {activation:6.2f}")

    latent = int(strongest.indices[-1])

    def off(f: torch.Tensor) -> torch.Tensor:
        return f * (torch.arange(f.shape[-1]) != latent)

    with torch.no_grad(), everyscope.splice(model, sae, edit_latents=off, keep_error=True):
        without = model(tokens).logits[0, -1]
    change = (without.log_softmax(0) - logits.log_softmax(0)).topk(3, largest=False)
    print(f"without latent {latent}, less likely next: {[model.tokenizer.decode([token]) for token in change.indices.tolist()]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--passes", type=float, default=4)
    options = parser.parse_args()
    main(options.model, options.layer, options.documents, options.passes)
