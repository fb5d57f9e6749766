"""A mesh gives each latent and each row to exactly one rank, and sums meet everyone who should take part."""

import pytest
import torch

from everyscope.sae.mesh import ALONE, AXES, Mesh, of_all, share


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (1, 1), (7, 3), (8, 4), (3, 3), (1_000_003, 17)])
def test_shares_are_contiguous_whole_and_even(count, parts):
    shares = [share(count, parts, part) for part in range(parts)]
    assert [shares[0].start, *(each.stop for each in shares)] == [0, *(each.start for each in shares[1:]), count]
    sizes = [len(each) for each in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == -(-count // parts)


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (4, 1), (1, 3), (3, 2)])
def test_every_axis_divides_the_ranks(shards, replicas):
    meshes = [Mesh(shards, replicas, rank) for rank in range(shards * replicas)]
    assert {(mesh.shard, mesh.replica) for mesh in meshes} == {(s, r) for s in range(shards) for r in range(replicas)}
    for axis in AXES:
        groups = {tuple(mesh.members(axis)) for mesh in meshes}
        assert sorted(rank for group in groups for rank in group) == list(range(shards * replicas))
        assert all(mesh.rank in mesh.members(axis) for mesh in meshes)
    assert all(len(mesh.members("shards")) == shards and len(mesh.members("replicas")) == replicas for mesh in meshes)
    for replica in range(replicas):
        mine = [mesh.latents(10) for mesh in meshes if mesh.replica == replica]
        assert sorted(latent for each in mine for latent in each) == list(range(10))


def test_one_process_sums_nothing():
    x = torch.arange(3.0)
    for axis in AXES:
        ALONE.sum_(x, axis)
    ALONE.barrier()
    assert x.tolist() == [0, 1, 2]
    assert of_all(ALONE, torch.tensor(5)).tolist() == [5]


def test_of_all_lists_every_ranks_number(in_threads):
    big = 2**52
    got = in_threads(lambda collective: of_all(collective, torch.tensor(big + collective.mesh.rank)).tolist(), 2, 3)
    assert got == [[big + rank for rank in range(6)]] * 6
