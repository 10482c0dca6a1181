"""The transformer of LingBot-World once more, in NumPy float64, on the published tensor names and layouts.

Shares nothing with `lingbot_jax`. With `rounded=True` it rounds to bfloat16 where the published code does under CUDA
autocast and nowhere else, so it says how large the error of that code is.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


class Sample(NamedTuple):
    """A network by its published config and tensors, and one sample, as `Network` takes them."""

    config: dict
    weights: Arrays
    latents: np.ndarray
    timestep: np.ndarray
    known: np.ndarray
    text: np.ndarray
    camera: np.ndarray


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float64."""
    return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float64)


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _patches(x: np.ndarray) -> np.ndarray:
    """[c f h w] -> [f h/2 w/2, c 2 2]: features of a token channel first."""
    c, f, h, w = x.shape
    x = x.reshape(c, f, h // 2, 2, w // 2, 2).transpose(1, 2, 4, 0, 3, 5)
    return x.reshape(f * (h // 2) * (w // 2), c * 4)


def _angles(frames: int, rows: int, columns: int, head_dim: int) -> np.ndarray:
    """Angle of every token and pair: [n head_dim/2]."""
    side = 2 * (head_dim // 6)
    grid = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    sizes = (head_dim - 2 * side, side, side)
    parts = [
        index.reshape(-1, 1) * 10000.0 ** (-np.arange(0, size, 2) / size)
        for index, size in zip(grid, sizes, strict=True)
    ]
    return np.concatenate(parts, 1)


class Network:
    """One sample through a network of the published names."""

    def __init__(self, config: dict, weights: Arrays, rounded: bool = False):
        """`config` and `weights` of a golden case; with `rounded`, weights are rounded as well."""
        self.config, self.round = config, to_bfloat16 if rounded else lambda x: x
        self.weights = {name: self.round(np.asarray(w, np.float64)) for name, w in weights.items()}
        self.eps = config.get("eps", 1e-6)

    def _wide(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.weights[f"{name}.weight"]
        return x @ weight.reshape(len(weight), -1).T + self.weights[f"{name}.bias"]

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.round(self._wide(name, self.round(x)))

    def _mlp(self, first: str, second: str, x: np.ndarray, activation) -> np.ndarray:
        return self._linear(second, activation(self._linear(first, x)))

    def _norm(self, x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.eps)

    def _heads(self, name: str, x: np.ndarray) -> np.ndarray:
        """Queries or keys: over all heads normed, then [n h k]."""
        x = self._linear(name, x)
        x = self.round(x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps))
        norm = name[:-1] + f"norm_{name[-1]}.weight"
        return self._split(self.round(x * self.weights[norm]))

    def _split(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), self.config["num_heads"], -1)

    def _rotate(self, x: np.ndarray, angles: np.ndarray) -> np.ndarray:
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return self.round(np.stack([turned.real, turned.imag], -1).reshape(x.shape))

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = np.einsum("nhk,mhk->hnm", q, k) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.round(np.einsum("hnm,mhk->nhk", weights, v).reshape(len(q), -1))

    def _block(self, name: str, x, time, text, camera, angles) -> np.ndarray:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = np.moveaxis(
            self.weights[f"{name}.modulation"] + time, 1, 0
        )
        own, cross = f"{name}.self_attn", f"{name}.cross_attn"
        y = self._norm(x) * (1 + scale_a) + shift_a
        q, k = (self._rotate(self._heads(f"{own}.{part}", y), angles) for part in "qk")
        y = self._attend(q, k, self._split(self._linear(f"{own}.v", y)))
        x = x + self._linear(f"{own}.o", y) * gate_a
        if camera is not None:
            layers = (f"{name}.cam_injector_layer1", f"{name}.cam_injector_layer2")
            hidden = self.round(camera + self._mlp(*layers, camera, _silu))
            scale, shift = (self._linear(f"{name}.cam_{part}_layer", hidden) for part in ("scale", "shift"))
            x = self.round(1 + scale) * x + shift
        y = self._norm(x) * self.weights[f"{name}.norm3.weight"] + self.weights[f"{name}.norm3.bias"]
        k, v = self._heads(f"{cross}.k", text), self._split(self._linear(f"{cross}.v", text))
        x = x + self._linear(f"{cross}.o", self._attend(self._heads(f"{cross}.q", y), k, v))
        y = self._norm(x) * (1 + scale_f) + shift_f
        return x + self._mlp(f"{name}.ffn.0", f"{name}.ffn.2", y, _gelu) * gate_f

    def __call__(self, latents, timestep, known, text, camera) -> Arrays:
        """Tokens `n d` after every block, what goes in, and the velocity `out`, `c f h w`.

        Args:
          latents, known: [c f h w]. timestep: [n], of every token. text: [length text_dim], padded.
          camera: [c f h w] or None.
        """
        _, frames, height, width = latents.shape
        rows, columns = height // 2, width // 2
        x = self._linear("patch_embedding", _patches(np.concatenate([latents, known])))
        text = self._mlp("text_embedding.0", "text_embedding.2", text, _gelu)
        half = self.config["freq_dim"] // 2
        angle = np.outer(timestep, 10000.0 ** (-np.arange(half) / half))
        time = self._wide("time_embedding.0", np.concatenate([np.cos(angle), np.sin(angle)], 1))
        time = self._wide("time_embedding.2", _silu(time))
        six = self._wide("time_projection.1", _silu(time)).reshape(len(time), 6, -1)
        found = {"context_emb": text, "e0": six, "block0_in": x}
        if camera is not None:
            layers = ("c2ws_hidden_states_layer1", "c2ws_hidden_states_layer2")
            tokens = self._linear("patch_embedding_wancamctrl", _patches(camera))
            camera = found["cam_emb"] = self.round(tokens + self._mlp(*layers, tokens, _silu))
        angles = _angles(frames, rows, columns, x.shape[1] // self.config["num_heads"])
        for i in range(self.config["num_layers"]):
            x = found[f"block{i}_out"] = self._block(f"blocks.{i}", x, six, text, camera, angles)
        shift, scale = np.moveaxis(self.weights["head.modulation"] + time[:, None], 1, 0)
        x = self._wide("head.head", self._norm(x) * (1 + scale) + shift)
        x = x.reshape(frames, rows, columns, 2, 2, -1).transpose(5, 0, 1, 3, 2, 4)
        return found | {"out": x.reshape(-1, frames, height, width)}


def velocity(sample: Sample, rounded: bool = False) -> np.ndarray:
    """What `Network` says of the sample, `f h w c`."""
    return np.moveaxis(Network(*sample[:2], rounded)(*sample[2:])["out"], 0, -1)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error over that of the values."""
    found = np.asarray(found, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
