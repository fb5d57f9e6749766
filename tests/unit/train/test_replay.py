"""What is recorded depends on tensors alone, so that a replay is the step itself."""

import os
from importlib.util import find_spec

import pytest
import torch

from everyscope.sae.config import SaeConfig
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.presets import fast, fast_transcoder
from everyscope.train.replay import MOST, TRIES, Replay
from everyscope.train.training_group import TargetSide, TrainingGroup

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="Triton is not installed, or a CUDA device is there, where tests/gpu replays real graphs",
)
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    from everyscope.sae.bf16_gpu import GpuBfloat16

STEPS = 9


class Again:
    """A recorder that calls the function as it was when recorded, with results always in the same memory."""

    def __init__(self, group: TrainingGroup) -> None:
        self.group, self.replayed = group, 0

    def record(self, function, *arguments):
        before = {name: tensor.clone() for name, tensor in self.group.tensors().items()}
        numbers, losses = function(*arguments)
        for name, tensor in self.group.tensors().items():
            tensor.copy_(before[name])
        self.group._engine.refresh()

        def again() -> None:
            known = self.group.num_steps_done
            vars(self.group)["num_steps_done"] = vars(self.group._engine)["_step"] = None
            numbers.copy_(function(*arguments)[0])  # any use of a step's number fails
            self.group.num_steps_done = known
            self.replayed += 1

        return again, (numbers, losses)


def stepped(is_recorded: bool, are_transcoders: bool) -> tuple[TrainingGroup, list[list[float]], int]:
    changes = {"driven_share": 0.8, "revive_steps": 2, "largest_row": 2.0}
    recipe = (fast_transcoder(8) if are_transcoders else fast(8)).model_copy(update=changes)
    configs = [SaeConfig(width=width, target_l0=2, preset=recipe, skip=are_transcoders) for width in (7, 11)]
    mean = torch.linspace(-1, 1, 8).double().numpy()
    target = TargetSide(8, Normalisation(2.0, -mean, norm_limit=30.0, largest_row=2.0)) if are_transcoders else None
    group = TrainingGroup(configs, 8, Normalisation(3.0, mean, norm_limit=20.0), STEPS, target=target)
    group._engine = group._replayable = GpuBfloat16(group.saes)  # interpreted
    recorder = Again(group)
    group._replay = Replay(recorder if is_recorded else None)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        x = torch.randn(6, 8, generator=generator) * 3 + torch.from_numpy(mean)
        losses = group.step(x, x.flip(1).abs() if are_transcoders else None)
        seen.append([float(number) for loss in losses for number in (loss.reconstruction, loss.l0, loss.pairs)])
    return group, seen, recorder.replayed


@needs_interpreter
@pytest.mark.parametrize("are_transcoders", [False, True])
def test_a_replayed_run_has_the_bits_of_one_that_is_not(are_transcoders):
    plain, wanted, none = stepped(is_recorded=False, are_transcoders=are_transcoders)
    group, seen, replayed = stepped(is_recorded=True, are_transcoders=are_transcoders)
    assert none == 0
    assert replayed >= 3
    assert seen == wanted
    assert all(torch.equal(tensor, group.tensors()[name]) for name, tensor in plain.tensors().items())


class Doubling:
    def __init__(self, limit: int = 10**9) -> None:
        self.recorded, self.limit = 0, limit

    def record(self, function, *arguments):
        if self.recorded == self.limit:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        result = torch.empty_like(arguments[0])
        return lambda: result.copy_(function(*arguments)), result


def test_each_key_and_shape_has_a_recording_of_its_own():
    recorder = Doubling()
    replay = Replay(recorder)
    for step in range(TRIES + 2):
        for factor in (2, 3):
            for rows in (1, 4):
                x = torch.full((rows,), float(step))
                assert torch.equal(replay.run(factor, lambda x, factor=factor: factor * x, x), factor * x)
    assert recorder.recorded == 4


def test_a_replay_takes_all_its_arguments():
    recorder = Doubling()
    replay = Replay(recorder)
    for step in range(TRIES + 3):
        pair = torch.full((2,), float(step)), torch.full((2,), 10.0 * step)
        assert torch.equal(replay.run(0, lambda x, y: x - y, *pair), pair[0] - pair[1])
    assert recorder.recorded == 1


def test_what_cannot_be_recorded_runs_as_it_is(capsys):
    replay = Replay(Doubling(limit=0))
    for _ in range(TRIES + 3):
        assert replay.run(0, lambda x: 2 * x, torch.ones(1)) == 2
    assert capsys.readouterr().err.count("not replayed as CUDA graphs") == 1


def test_recordings_beyond_the_most_are_not_made():
    recorder = Doubling()
    replay = Replay(recorder)
    for key in range(MOST + 2):
        for _ in range(TRIES + 1):
            assert replay.run(key, lambda x: 2 * x, torch.ones(1)) == 2
    assert recorder.recorded == MOST
