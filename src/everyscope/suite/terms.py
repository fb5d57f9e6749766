"""What the words of tables, tips, report and help mean, each with its unit: the one dictionary of them. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One word."""

    title: str
    """How tables call it."""
    unit: str
    """Its unit in brackets, 1 for a share; empty for what is no number."""
    means: str
    """What it means, in a sentence or two."""

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title


TERMS: dict[str, Term] = {
    "sae": Term("SAE", "", "A sparse autoencoder: it writes an activation as a sum of few of its many latents’ directions."),
    "transcoder": Term("Transcoder", "", "An SAE that reads the MLP’s input and predicts its output."),
    "latent": Term("Latent", "", "One direction of an SAE, and the nonnegative number by which a token’s activation has it."),
    "site": Term("Site", "", "Where in the model an SAE reads: a kind, such as the residual stream, and a layer."),
    "width": Term("Width", "latents", "How many latents an SAE has."),
    "l0": Term("L0", "latents", "How many latents are active on a token, on average. Fewer are easier to read."),
    "fvu_usual": Term("FVU", "1", "Fraction of variance unexplained: 0 is perfect, 1 is as good as the mean activation."),
    "fvu": Term("Plain FVU", "1", "FVU with massive tokens counted, which a few of them can decide."),
    "fvu_pca_usual": Term("PCA", "1", "FVU of as many principal components as L0: an SAE should leave less unexplained."),
    "delta_loss": Term(
        "Delta loss", "nats/token", "Rise of the language model’s loss when the reconstruction takes the activation’s place."
    ),
    "loss_recovered": Term(
        "Loss recovered", "1", "1 where the reconstruction costs nothing, 0 where it costs as much as the mean activation."
    ),
    "kl": Term("KL", "nats/token", "Divergence of the model’s predictions with the reconstruction from those without."),
    "cosine": Term("Cosine", "1", "Mean cosine between activation and reconstruction."),
    "l2_ratio": Term("Norm ratio", "1", "Mean of the reconstruction’s norm over the activation’s: under 1 where it shrinks."),
    "mse": Term("Squared error", "units²", "Mean squared distance of reconstruction and activation, in raw units."),
    "fvu_uncentred": Term("FVU about zero", "1", "Squared error over squared activations: a large mean flatters it."),
    "reconstruction_bias": Term("Reconstruction bias", "1", "Under 1 where reconstructions are systematically too short."),
    "dead_fraction": Term("Dead latents", "1", "Share of latents that fire on no token that was read."),
    "dense_fraction": Term("Dense latents", "1", "Share of latents that fire on more than a tenth of the tokens."),
    "loss_clean": Term("Loss, untouched", "nats/token", "The language model’s loss as it is."),
    "loss_spliced": Term("Loss, spliced", "nats/token", "Its loss with the reconstruction in the activation’s place."),
    "loss_mean_ablated": Term("Loss, mean instead", "nats/token", "Its loss with the mean in the activation’s place."),
    "loss_zero_ablated": Term("Loss, zero instead", "nats/token", "Its loss with zeros in the activation’s place."),
    "alive": Term("Alive", "latents", "Latents that fire on some token of the text that was described."),
    "labels": Term("Labels", "latents", "Latents with a label: a rule found by statistics, or a language model’s words."),
    "canonical": Term("Canonical ★", "", "The SAE to take where only one of a site and width can be: by its L0."),
    "massive": Term("Massive token", "", "A token whose activation has many times the median norm; kept out of FVU."),
    "frequency": Term("Frequency", "1", "Share of tokens on which a latent fires."),
    "held_out_frequency": Term("Held-out frequency", "1", "The same, on documents that no SAE was trained on."),
    "max_activation": Term("Highest activation", "raw units", "The largest value a latent took on the text read."),
    "mean_activation": Term("Mean while firing", "raw units", "Its mean over the tokens on which it fires."),
    "entropy": Term("Token entropy", "nats", "How many different tokens it fires on: 0 for one alone."),
    "predictability": Term(
        "Predicted by the token", "1", "How well the current token alone tells whether it fires; 0.5 is guessing, 1 is certain."
    ),
    "nearest": Term("Nearest", "1", "Highest cosine of its decoder row with another one of the same SAE."),
    "detection": Term(
        "Detection", "1", "Balanced accuracy with which the label tells in which windows the latent fires; 0.5 is guessing."
    ),
    "fuzzing": Term(
        "Fuzzing", "1", "Balanced accuracy with which the label tells the tokens it fires on from other ones; 0.5 is guessing."
    ),
    "null": Term("Shuffled labels", "1", "The same score of labels of other latents: what a label without meaning would reach."),
    "quality": Term("Quality", "1", "Detection minus that of shuffled labels: strong from 0.25, weak from 0.1, else poor."),
    "interval": Term("Interval", "", "Where the number would lie, 95 times of 100, had other documents been drawn."),
    "logits": Term("Makes likelier", "logits", "Tokens whose logits the latent’s direction raises most, by the logit lens."),
    "phi": Term("Phi", "1", "Correlation of two latents’ firing over tokens: 1 where both always fire together."),
    "dot": Term("Dot", "", "Before a label: full is strong, half is weak, hollow is poor, dotted is no label."),
}
"""By name, as metrics.json and latents.parquet have it where they have it."""
