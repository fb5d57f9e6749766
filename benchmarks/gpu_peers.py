"""Other trainers' own training steps on a GPU, where their packages are installed; in the same process as ours, on the same rows.

Their logging, plotting and data packages are no part of a step: modules of that kind that are not installed are stood in for by
empty ones, so that a machine without a network needs nothing but the trainers themselves.
"""

# pyright: reportMissingImports=false
# The packages are optional.

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from itertools import count
from typing import Any

import torch
from torch import Tensor

NOT_OF_A_STEP = (
    "wandb", "circuitsvis", "nnsight", "datasets", "umap", "babe", "nltk", "plotly", "plotly_express",
    "transformers_stream_generator", "zstandard", "eindex", "dotenv",
)  # fmt: skip
Step = Callable[[Tensor], object]
STEPS = 1000
"""Length of the training that they are configured with [steps]."""


class _Nothing:
    """Whatever is asked of a module that stands in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes anything."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A decorator leaves what it decorates; any other call gives nothing again."""
        return args[0] if args and callable(args[0]) else _Nothing()

    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _StandIns(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] in NOT_OF_A_STEP:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__dict__["__version__"] = "0"
        module.__dict__["__getattr__"] = _attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing."""


def _attribute(name: str) -> type[_Nothing]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Nothing


def peers(d_in: int, width: int, batch: int, l0: float, rows: Tensor) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Each installed trainer by name, and what makes its step: JumpReLU SAEs of SAELens and dictionary_learning, TopK of
    sparsify.

    All run under bfloat16 autocast, with TF32 for what stays float32, which is their best.
    """
    sys.meta_path.append(_StandIns())  # after all others: what is installed is used
    makers = {"sae_lens": _saelens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify}
    for package, make in makers.items():
        if importlib.util.find_spec(package) is not None:
            yield package, lambda make=make: make(d_in, width, batch, l0, rows)


def _saelens(d_in: int, width: int, batch: int, l0: float, rows: Tensor) -> Step:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, LoggingConfig, SAETrainer  # noqa: PLC0415
    from sae_lens.config import SAETrainerConfig  # noqa: PLC0415

    device = str(rows.device)
    of_sae = JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=width, device=device, normalize_activations="expected_average_only_in")
    sae, endless = JumpReLUTrainingSAE(of_sae), (rows for _ in count())
    config = SAETrainerConfig(
        total_training_samples=STEPS * batch, train_batch_size_samples=batch, logger=LoggingConfig(log_to_wandb=False),
        lr_end=1e-5, device=device, autocast=True,
    )  # fmt: skip
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=endless)
    trainer.activation_scaler.estimate_scaling_factor(d_in, endless, 4)
    with torch.no_grad():
        pre = sae.encode_with_hidden_pre(trainer.activation_scaler.scale(rows[:512]))[1]
        sae.threshold.fill_(float(pre.flatten().topk(max(1, int(l0 * 512))).values[-1].clamp(min=1e-3)))

    def step(x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def _dictionary_learning(d_in: int, width: int, batch: int, l0: float, rows: Tensor) -> Step:
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: PLC0415

    trainer = JumpReluTrainer(
        steps=STEPS, activation_dim=d_in, dict_size=width, layer=0, lm_name="none", seed=0, target_l0=l0, warmup_steps=100,
        sparsity_warmup_steps=200, device=str(rows.device),
    )  # fmt: skip
    with torch.no_grad():
        pre = trainer.ae.encode(rows[:512], output_pre_jump=True)[1]
        trainer.ae.threshold.fill_(float(pre.flatten().topk(max(1, int(l0 * 512))).values[-1]))
    number = count()

    def step(x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            trainer.update(next(number), x)

    return step


def _sparsify(d_in: int, width: int, batch: int, l0: float, rows: Tensor) -> Step:
    from schedulefree import ScheduleFreeWrapper  # noqa: PLC0415
    from sparsify import SparseCoder, SparseCoderConfig  # noqa: PLC0415
    from sparsify.sign_sgd import SignSGD  # noqa: PLC0415

    config = SparseCoderConfig(num_latents=width, k=max(1, int(l0)), activation="topk")
    sae = SparseCoder(d_in, config, device=str(rows.device), dtype=torch.float32)
    optimiser = ScheduleFreeWrapper(SignSGD([{"params": sae.parameters(), "lr": 5e-3 / (width / 2**14) ** 0.5}]), momentum=0.95)
    optimiser.train()

    def step(x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = sae(x, total_variance=(x - x.mean(0)).pow(2).sum()).fvu
        loss.backward()
        if sae.cfg.normalize_decoder:
            sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        if sae.cfg.normalize_decoder:
            sae.set_decoder_norm_to_unit_norm()

    return step
