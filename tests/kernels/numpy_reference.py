"""Attention and its gradients in float64 NumPy, from the textbook, sharing nothing with the package."""

import numpy as np


def attention(q, k, v, seen, g):
    """(out, dq, dk, dv) of `b n h k` arrays; seen: bool `[b n m]`; g: cotangent of out."""
    q, k, v, g = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, g))
    scale = 1 / np.sqrt(q.shape[-1])
    s = np.where(seen[:, None], q @ k.swapaxes(2, 3) * scale, -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    out = p @ v
    ds = p * (g @ v.swapaxes(2, 3) - (g * out).sum(-1, keepdims=True))
    grads = ds @ k * scale, ds.swapaxes(2, 3) @ q * scale, p.swapaxes(2, 3) @ g
    return tuple(x.transpose(0, 2, 1, 3) for x in (out, *grads))


def bound(q, k, v, exact):
    """Largest allowed error of (out, dq, dk, dv) for bfloat16 inputs.

    The output: probabilities and result are rounded once each, 2^-9 of the largest value (docs of
    flash_attention). Gradients: 2^-6 of the largest entry. (A query with one visible key has a gradient of zero in
    exact arithmetic; there the rounding of the output shows, as in any kernel with bfloat16 probabilities.)
    """
    size = [np.abs(np.asarray(x, np.float64)).max() for x in (q, k, v)]
    out, *grads = exact
    return [2**-8 * (size[2] + np.abs(out).max())] + [2**-6 * np.abs(x).max() for x in grads]
