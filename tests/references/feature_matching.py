"""Rewards, whitening and baselines by their definitions, for one context, in numpy with loops."""

from __future__ import annotations

import numpy as np


def whiten(phi: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """(Sigma^+)^(1/2) vector with Sigma = 1/n sum_j phi_j phi_j^T, by a d x d eigendecomposition. phi: [n, d]."""
    n = len(phi)
    sigma = sum(np.outer(f, f) for f in phi) / n
    values, vectors = np.linalg.eigh(sigma)
    keep = values > 1e-10 * values.max()
    root = (vectors[:, keep] / np.sqrt(values[keep])) @ vectors[:, keep].T
    return root @ vector


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def terms(phi: np.ndarray, psi: np.ndarray, whitening: str) -> tuple[np.ndarray, np.ndarray]:
    """T1 and T2 of (7), (9), (49), (51), (52): [n] each."""
    n = len(phi)
    if whitening != "none":
        white = [whiten(phi, f) for f in phi]
        target = whiten(phi, psi)
    else:
        white, target = list(phi), psi
    t1, t2 = np.zeros(n), np.zeros(n)
    for j in range(n):
        if whitening in ("variant_i", "variant_ii"):
            t1[j] = 2 * cosine(white[j], target)
        elif whitening == "variant_iii":
            t1[j] = 2 * white[j] @ target / np.linalg.norm(target)
        else:
            t1[j] = 2 * white[j] @ target
        for other in range(n):
            if other != j:
                product = cosine(white[j], white[other]) if whitening == "variant_ii" else white[j] @ white[other]
                t2[j] += 2 / (n - 1) * product
    return t1, t2


def rloo_baseline(phi: np.ndarray, psi: np.ndarray, alpha: float) -> np.ndarray:
    """(93): the mean reward of the other samples, their diversity terms computed without sample j."""
    n = len(phi)
    baseline = np.zeros(n)
    for j in range(n):
        for i in range(n):
            if i != j:
                diversity = sum(2 / (n - 2) * phi[k] @ phi[i] for k in range(n) if k not in (i, j))
                baseline[j] += (2 * phi[i] @ psi - alpha * diversity) / (n - 1)
    return baseline


def cfm(phi: np.ndarray, psi: np.ndarray) -> float:
    """|psi|^2 - 2 mean_j phi_j.psi + mean over ordered pairs i != j of phi_i.phi_j."""
    n = len(phi)
    pairs = [phi[i] @ phi[j] for i in range(n) for j in range(n) if i != j]
    return float(psi @ psi - 2 * np.mean([f @ psi for f in phi]) + np.mean(pairs))
