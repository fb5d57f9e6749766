"""What must hold on a CUDA device. Where there is none all runs on the CPU, which shows that these tests still run."""

import pytest
import torch

from everyscope.activations.harvest import fill
from everyscope.activations.shards.writer import on_host
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.presets import fast
from everyscope.sae.trainable import fold
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import SUBLAYERS, sites_of
from everyscope.sites.splice import splice
from everyscope.train.replay import Replay
from everyscope.train.training_group import TrainingGroup

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPE = SaePreset(
    learning_rate=1e-3, learning_rate_warmup_steps=0, sparsity_warmup_steps=0, bandwidth=0.1, initial_threshold=0.1
)


def trained(device: str, steps: int) -> TrainingGroup:
    generator = torch.Generator().manual_seed(0)
    group = TrainingGroup([SaeConfig(width=96, sparsity_coefficient=1e-3, preset=RECIPE)], 32, Normalisation(5.0), steps, device)
    for _ in range(steps):
        group.step(torch.randn(128, 32, generator=generator))
    return group


def test_a_group_trains_on_the_device_as_on_the_cpu():
    # Short, for Adam without momentum turns rounding of a small gradient into a full step.
    ours, theirs = trained(DEVICE, 3), trained("cpu", 3)
    for name, tensor in theirs.saes[0].parameters.items():
        difference = (ours.saes[0].parameters[name].cpu() - tensor).norm() / tensor.norm().clamp(min=1e-3)
        assert difference < 1e-3, name
    assert fold(ours.saes[0], ours.normalisation).W_enc.device.type == "cpu"


def test_a_group_takes_up_its_state_on_the_device():
    group, again = trained(DEVICE, 4), trained(DEVICE, 0)
    saved = {name: tensor.cpu() for name, tensor in group.tensors().items()}
    again.restore(saved, lambda name, axis, held: saved[name], 4)
    assert again.num_steps_done == 4
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in group.tensors().items())


@pytest.mark.skipif(
    DEVICE == "cpu", reason="there is no CUDA device; tests/unit/train/test_replay.py has the same law without one"
)
def test_a_replayed_group_has_the_bits_of_one_that_is_not():
    preset = fast(32).model_copy(update={"driven_share": 0.5})
    ends = []
    for is_replayed in (True, False):
        generator = torch.Generator().manual_seed(0)
        configs = [SaeConfig(width=96, target_l0=l0, preset=preset) for l0 in (4, 8)]
        group = TrainingGroup(configs, 32, Normalisation(5.0), 40, DEVICE, products="bfloat16")
        group._engine.tensors()["crossover"].fill_(0.5)  # not measured, which would not be the same twice
        if not is_replayed:
            group._replay = Replay(None)
        for _ in range(40):
            losses = group.step(torch.randn(128, 32, generator=generator))
        assert bool(group._replay._recordings) == is_replayed
        ends.append([*group.tensors().values(), *(loss.l0 for loss in losses)])
        assert group.tensors()["engine.skipped"].sum() == 0
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_capture_and_splice_on_the_device(tiny_random_model_folder):
    model = load_language_model(ModelConfig(name=str(tiny_random_model_folder), device=DEVICE)).model
    sites = sites_of(SUBLAYERS, None, 2)
    input_ids = torch.arange(40, device=DEVICE).view(2, 20) + 6
    assert all(x.device.type == DEVICE for x in capture(model, sites, input_ids).values())
    clean = model(input_ids=input_ids, use_cache=False).logits
    with splice(model, {site: lambda x: x for site in sites}):
        assert torch.equal(model(input_ids=input_ids, use_cache=False).logits, clean)


def test_rows_reach_the_host_while_the_model_goes_on():
    """A row is copied on a stream of its own, and is what the model made even where the model's stream has work queued."""
    size, times = (8192, 40) if DEVICE == "cuda" else (64, 2)
    busy = torch.eye(size, device=DEVICE)
    made = []
    for number in range(3):
        for _ in range(times):
            busy = busy @ busy  # stays what it is, and takes its time
        rows = busy[:512, :64] * 0 + number  # not there before the products are
        made.append((rows, fill._made(rows.device)))
    for _ in range(times):
        busy = busy @ busy
    for number, (rows, event) in enumerate(made):
        with fill._beside(rows, event):
            assert (on_host(rows) == number).all()
    assert DEVICE == "cpu" or not torch.cuda.current_stream().query(), "the copies waited for what was queued behind them"
