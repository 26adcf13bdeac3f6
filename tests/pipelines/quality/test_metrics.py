"""PSNR and SSIM against slow, literal versions of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tilewise.pipelines.quality.metrics import psnr, ssim


def clips(seed: int = 0, noise: float = 0.1, shape: tuple[int, ...] = (2, 17, 14, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.random(shape)
    return a, np.clip(a + noise * rng.standard_normal(shape), 0, 1)


def literal_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al.'s formula, window by window."""
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    window /= window.sum()
    scores = []
    for frame_a, frame_b in zip(a, b, strict=True):
        x = 0.299 * frame_a[..., 0] + 0.587 * frame_a[..., 1] + 0.114 * frame_a[..., 2]
        y = 0.299 * frame_b[..., 0] + 0.587 * frame_b[..., 1] + 0.114 * frame_b[..., 2]
        values = []
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
        scores.append(np.mean(values))
    return float(np.mean(scores))


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_matches_the_formula(noise):
    a, b = clips(noise=noise)
    assert ssim(a, b) == pytest.approx(literal_ssim(a, b), abs=1e-10)


def test_psnr_matches_the_definition():
    a, b = clips()
    assert psnr(a, b) == pytest.approx(10 * math.log10(1 / np.mean((a - b) ** 2)))


def test_psnr_of_one_grey_level_in_bytes():
    a = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr(a, a + np.uint8(1)) == pytest.approx(20 * math.log10(255))


def test_bytes_and_floats_agree():
    a, b = (np.round(clip * 255).astype(np.uint8) for clip in clips())
    assert psnr(a, b) == pytest.approx(psnr(a / 255, b / 255))
    assert ssim(a, b) == pytest.approx(ssim(a / 255, b / 255))


def test_identical_clips():
    a, _ = clips()
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1.0)


def test_more_noise_scores_lower():
    scores = [(psnr(*clips(noise=n)), ssim(*clips(noise=n))) for n in (0.01, 0.05, 0.2)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refuses_what_it_cannot_compare(metric):
    a, b = clips()
    with pytest.raises(ValueError, match="differ in shape"):
        metric(a, b[:1])
    with pytest.raises(ValueError, match="int64"):
        metric(a.astype(np.int64), b.astype(np.int64))
    with pytest.raises(ValueError, match="empty"):
        metric(a[:0], b[:0])


def test_ssim_refuses_small_frames_and_other_ranks():
    a, b = clips(shape=(1, 10, 20, 3))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(a, b)
    with pytest.raises(ValueError, match=r"\(T, H, W, 3\)"):
        ssim(a[0], b[0])
