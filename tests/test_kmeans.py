"""k-means is deterministic, lowers its objective, and the tail-aware one serves rare samples better."""

from __future__ import annotations

import pytest
import torch

from hf_pqcache.codebook import kmeans as module
from hf_pqcache.codebook.kmeans import kmeans


def heavy_tailed(problems: int, samples: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(problems, samples, width, generator=generator)
    return x * (1 + torch.rand(problems, samples, 1, generator=generator) ** 8 * 5)


def errors(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x.double(), centroids.double()).amin(-1)


@pytest.mark.parametrize("objective", ["tail", "plain"])
def test_same_seed_same_centroids_however_the_work_is_cut(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = heavy_tailed(5, 700, 2)
    first = kmeans(x, 32, objective=objective, seed=3)  # type: ignore[arg-type]
    assert first.shape == (5, 32, 2)
    assert first.dtype == torch.float32
    assert torch.equal(first, kmeans(x, 32, objective=objective, seed=3))  # type: ignore[arg-type]
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", {"cpu": 32 * 100})
    assert torch.equal(first, kmeans(x, 32, objective=objective, seed=3))  # type: ignore[arg-type]
    assert not torch.equal(first, kmeans(x, 32, objective=objective, seed=4))  # type: ignore[arg-type]


@pytest.mark.parametrize(("objective", "power"), [("plain", 2), ("tail", 4)])
def test_more_steps_lower_the_objective(objective: str, power: int) -> None:
    x = heavy_tailed(4, 3000, 2)
    few, many = (
        errors(x, kmeans(x, 64, objective=objective, iterations=n)).pow(power).mean()  # type: ignore[arg-type]
        for n in (1, 25)
    )
    assert many < 0.9 * few


def test_tail_objective_lowers_the_rare_errors() -> None:
    x = heavy_tailed(8, 8000, 2)
    tail, plain = errors(x, kmeans(x, 64)), errors(x, kmeans(x, 64, objective="plain"))
    assert tail.flatten().quantile(0.999) < 0.9 * plain.flatten().quantile(0.999)
    assert tail.square().mean() < 1.3 * plain.square().mean()


@pytest.mark.parametrize("objective", ["tail", "plain"])
def test_separate_clusters_are_all_found(objective: str) -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).view(1, 16, 2) * 100
    x = (centers[:, :, None] + torch.randn(1, 16, 50, 2, generator=generator)).view(1, 800, 2)
    found = kmeans(x, 16, objective=objective)  # type: ignore[arg-type]
    assert errors(centers, found).max() < 1.5


def test_result_follows_shift_and_scale_of_the_samples() -> None:
    x = heavy_tailed(2, 2000, 2)
    near = float(errors(x, kmeans(x, 32)).mean())
    far = float(errors(x * 100 + 5000, kmeans(x * 100 + 5000, 32)).mean())
    assert far / 100 == pytest.approx(near, rel=0.05)


def test_every_sample_its_own_centroid_when_there_are_as_many() -> None:
    x = torch.randn(3, 32, 4, generator=torch.Generator().manual_seed(0))
    assert errors(x, kmeans(x, 32)).max() < 1e-4


def test_equal_samples_give_finite_centroids() -> None:
    for objective in ("tail", "plain"):
        found = kmeans(torch.full((2, 100, 2), 3.0), 16, objective=objective)  # type: ignore[arg-type]
        assert torch.allclose(found, torch.full_like(found, 3.0))


def test_empty_clusters_move_to_badly_served_samples() -> None:
    samples = torch.tensor([[[0.0], [1.0], [2.0], [9.0]]])
    moved = module._reseed_empty(
        torch.zeros(1, 3, 1), torch.tensor([[False, True, True]]), samples, torch.tensor([[0.0, 1.0, 4.0, 81.0]])
    )
    assert moved.flatten().tolist() == [0.0, 9.0, 2.0]


def test_progress_counts_every_problem() -> None:
    seen: list[int] = []
    kmeans(heavy_tailed(7, 100, 2), 16, progress=seen.append)
    assert sum(seen) == 7


def test_half_precision_samples_are_accepted() -> None:
    assert kmeans(heavy_tailed(2, 300, 2).half(), 16).dtype == torch.float32


def test_bad_input_names_the_way_out() -> None:
    x = torch.randn(1, 100, 2)
    with pytest.raises(ValueError, match="give at least 256"):
        kmeans(x, 256)
    with pytest.raises(ValueError, match="use one of"):
        kmeans(x, 16, objective="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float \(P, N, s\)"):
        kmeans(x[0], 16)
    with pytest.raises(ValueError, match="1 to 256"):
        kmeans(torch.randn(1, 300, 2), 257)
    with pytest.raises(ValueError, match="iterations=0"):
        kmeans(x, 16, iterations=0)
    x[0, 3, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        kmeans(x, 16)
