"""Self-attention over tokens that are split across devices: Ulysses, ring, and the two combined.

Queries, keys and values are `b t p h k` with each latent frame's tokens `p` split over the mesh axis `seq`
(see `sharding`). One number chooses the method, `ulysses` = u, the size of a group of neighbours:

    u = seq   Ulysses: all-to-all gives each device every token of heads / seq heads, and back
    u = 1     ring: each device keeps its queries; keys and values travel round, results merge online
    between   Ulysses inside groups of u neighbours (a host's reach), a ring of seq / u groups beyond

Because every device holds the same part of every frame, the attention mask a device sees is the same in
every step of the ring: the global mask with all lengths divided (`local_mask`). Block-causal attention is
therefore balanced exactly, and hidden tiles are skipped by the local kernel, never by waiting for a
neighbour. (In one piece per device, the last of 8 would have 1.7 to 1.85 times the mean: tests/parallel/
test_sequence.py counts tiles.)

The ring has its own backward pass: it sends the keys and values round again and their gradients with them,
so nothing but the local inputs, the output and the log-sum-exp is kept (paper section 3.3.3 names Ulysses
only; the ring takes over where heads run out, e.g. 40 heads on 16 devices).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from kernels_pallas import tiles
from kernels_pallas.context import Context
from kernels_pallas.flash_attention import backward_segments, flash_attention
from kernels_pallas.flash_forward import flash_forward
from kernels_pallas.mask import Mask, Rows
from kernels_pallas.reference import blocked_attention
from lingbot_jax.config import ConfigError, require
from lingbot_jax.parallel.mesh import BATCH_AXES, SEQ
from lingbot_jax.parallel.sharding import check_divides


class Local(NamedTuple):
    """Attention on one device, `b n h k`.

    attention: (q, k, v, mask, context=None) -> out, differentiable; used where every key is at hand.
    forward: (q, k, v, mask) -> (out, lse [b h n] float32), lse the natural-log sum of exponentials of the
      scaled logits, -inf for a query that sees nothing.
    backward: (q, k, v, out, lse, d_out, mask) -> (dq, dk, dv), where `out` and `lse` may come from more keys
      than are given: the part of the gradient that goes through these keys.
    """

    attention: Callable[..., jax.Array]
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def local_mask(mask: Mask, frame: int, parts: int) -> Mask:
    """The mask between 1/parts of every frame's queries and 1/parts of every frame's keys (any two parts).

    Args:
      mask: between tokens `(t p)`, frames outermost. frame: tokens per frame p. parts: devices.

    Raises:
      ConfigError: a boundary of the mask lies inside a frame, so parts would differ.
    """

    def cut(edge: int) -> int:
        require(
            edge % frame == 0,
            "mask",
            edge,
            f"its boundaries must be multiples of the {frame} tokens per frame",
        )
        return edge // parts

    require(frame % parts == 0, "tokens per latent frame", frame, f"must divide over {parts} devices")
    rows = tuple(
        Rows(cut(r.start), cut(r.stop), tuple((cut(a), cut(b)) for a, b in r.keys)) for r in mask.rows
    )
    return Mask(cut(mask.n), cut(mask.m), rows)


def _finite(lse: jax.Array) -> jax.Array:
    """A query that sees no key has lse = -inf; its weights exp(-inf - lse) shall be zero, not NaN."""
    return jnp.where(jnp.isneginf(lse), 0.0, lse)


def merge(
    out: jax.Array, lse: jax.Array, more: jax.Array, more_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over two disjoint sets of keys. out `b n h k` float32, lse `b h n`."""
    total = jnp.logaddexp(lse, more_lse)

    def scaled(part, part_lse):
        return part.astype(jnp.float32) * jnp.moveaxis(jnp.exp(part_lse - _finite(total)), 1, 2)[..., None]

    return scaled(out, lse) + scaled(more, more_lse), total


def _ring_forward(local: Local, mask: Mask, send, steps: int, q, k, v):
    def step(carry, _):
        k, v, out, lse = carry
        following = send((k, v))  # travels while this step computes
        out, lse = merge(out, lse, *local.forward(q, k, v, mask))
        return (*following, out, lse), None

    out, lse = local.forward(q, k, v, mask)
    if steps > 1:
        carry = (*send((k, v)), out.astype(jnp.float32), lse)
        (k, v, out, lse), _ = jax.lax.scan(step, carry, length=steps - 2)
        out, lse = merge(out, lse, *local.forward(q, k, v, mask))
    return out.astype(q.dtype), lse


def _ring_backward(local: Local, mask: Mask, send, steps: int, q, k, v, out, lse, d_out):
    def gradients(k, v):
        found = local.backward(q, k, v, out, lse, d_out, mask)
        return tuple(g.astype(jnp.float32) for g in found)

    def step(carry, _):
        k, v, dq, dk, dv = carry
        following = send((k, v))
        dk, dv = send((dk, dv))  # to where k and v are now: needed only after this step's work
        more = gradients(k, v)
        return (*following, dq + more[0], dk + more[1], dv + more[2]), None

    carry = (*send((k, v)), *gradients(k, v)) if steps > 1 else (k, v, *gradients(k, v))
    if steps > 1:
        (k_last, v_last, dq, dk, dv), _ = jax.lax.scan(step, carry, length=steps - 2)
        dk, dv = send((dk, dv))
        more = gradients(k_last, v_last)
        dq, (dk, dv) = dq + more[0], send((dk + more[1], dv + more[2]))  # and home
    else:
        dq, dk, dv = carry[2:]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def ring(local: Local, mask: Mask, send: Callable[[Any], Any], steps: int) -> Callable[..., jax.Array]:
    """Per-device ring attention (q, k, v) -> out `b n h k`.

    Args:
      mask: between the queries of one device and the keys of any. send: moves a tree one place along the
        ring. steps: devices in the ring; 1 is plain local attention.
    """

    @jax.custom_vjp
    def attention(q, k, v):
        return _ring_forward(local, mask, send, steps, q, k, v)[0]

    def forward(q, k, v):
        out, lse = _ring_forward(local, mask, send, steps, q, k, v)
        return out, (q, k, v, out, lse)

    def backward(saved, d_out):
        return _ring_backward(local, mask, send, steps, *saved, d_out)

    attention.defvjp(forward, backward)
    return attention


@dataclasses.dataclass(frozen=True)
class SequenceAttention:
    """Attention of `b t p h k` under a mesh: a kernel for `models.attention.Attend`.

    Attributes:
      mesh: with axes data, fsdp, seq.
      heads: of the model; checked here, before anything is compiled.
      local: what runs on one device.
      ulysses: devices in a Ulysses group; -1: as many as divide the heads.
    """

    mesh: Mesh
    heads: int
    local: Local
    ulysses: int = -1

    def __post_init__(self):
        seq = self.mesh.shape[SEQ]
        if self.ulysses == -1:
            object.__setattr__(self, "ulysses", math.gcd(self.heads, seq))
        require(
            self.ulysses > 0 and seq % self.ulysses == 0,
            "ulysses",
            self.ulysses,
            f"must divide the {seq} devices of the seq axis",
        )
        require(
            self.heads % self.ulysses == 0,
            "heads",
            self.heads,
            f"must divide over a Ulysses group of {self.ulysses} devices; a smaller ulysses leaves the rest "
            "to the ring",
        )

    @property
    def rings(self) -> int:
        """Devices in a ring."""
        return self.mesh.shape[SEQ] // self.ulysses

    def __call__(
        self,
        q: Float[Array, "b t p h k"],
        k: Float[Array, "b t p h k"],
        v: Float[Array, "b t p h k"],
        mask: Mask | None,
        context: Context | None = None,
    ) -> Float[Array, "b t p h k"]:
        """Attention over all `t p` tokens, and over a cache.

        Args:
          mask: between the clip's tokens in the order (t p); None: all see all.
          context: one layer's cached keys and values `b m h k`, kept with the heads split over seq: what
            Ulysses works on, so a cache is never moved.

        Raises:
          ConfigError: batch, tokens a frame or heads that do not divide, a mask with boundaries inside a frame,
            or a context where there is a ring.
        """
        b, t, p, h, _ = q.shape
        require(h == self.heads, "heads", h, f"the mesh was prepared for {self.heads}")
        check_divides("tokens per latent frame", p, (SEQ,), self.mesh)
        check_divides("batch", b, BATCH_AXES, self.mesh)
        require(
            context is None or self.rings == 1,
            "ulysses",
            self.ulysses,
            f"must be all {self.mesh.shape[SEQ]} devices of the seq axis where attention reads a cache",
        )
        mask = local_mask(Mask.full(t * p, t * p) if mask is None else mask, p, self.rings)
        if self.mesh.size == 1:
            return self._per_device(mask, q, k, v, context)
        tokens = cached = PartitionSpec(BATCH_AXES, None, SEQ)  # third: a frame's tokens; a cache's heads
        cache = None if context is None else Context(cached, cached, PartitionSpec())
        return jax.shard_map(
            functools.partial(self._per_device, mask),
            mesh=self.mesh,
            in_specs=(tokens, tokens, tokens, cache),
            out_specs=tokens,
            check_vma=False,
        )(q, k, v, context)

    def _per_device(self, mask: Mask, q, k, v, context):
        u, seq = self.ulysses, self.mesh.shape[SEQ]
        groups = [list(range(start, start + u)) for start in range(0, seq, u)]

        def exchange(x, split, concat):
            if u == 1:
                return x
            return jax.lax.all_to_all(x, SEQ, split, concat, axis_index_groups=groups, tiled=True)

        def send(tree):
            along = [(i, (i + u) % seq) for i in range(seq)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, SEQ, along), tree)

        q, k, v = (exchange(x, 3, 2) for x in (q, k, v))  # heads apart, tokens together
        b, t, p, h, d = q.shape
        flat = (x.reshape(b, t * p, h, d) for x in (q, k, v))
        if self.rings == 1:
            out = self.local.attention(*flat, mask, context=context)
        else:
            out = ring(self.local, mask, send, self.rings)(*flat)
        return exchange(out.reshape(b, t, p, h, d), 2, 3)


# --- Attention on one device, by platform. First plain JAX, in `b h n k` order, which XLA:CPU prefers.


def _scores(q, k, mask: Mask):
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    return scores if mask.is_full else jnp.where(mask.dense(), scores, -jnp.inf)


def plain_forward(q, k, v, mask: Mask):
    scores = _scores(q, k, mask)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - _finite(lse)[..., None])
    return jnp.einsum("bhnm,bmhk->bnhk", weights, v.astype(jnp.float32)).astype(q.dtype), lse


def plain_backward(q, k, v, out, lse, d_out, mask: Mask):
    k, v, out, d_out = (x.astype(jnp.float32) for x in (k, v, out, d_out))
    weights = jnp.exp(_scores(q, k, mask) - _finite(lse)[..., None])
    through = jnp.einsum("bnhk,bmhk->bhnm", d_out, v) - jnp.einsum("bnhk,bnhk->bhn", d_out, out)[..., None]
    d_scores = weights * through / math.sqrt(q.shape[-1])
    return (
        jnp.einsum("bhnm,bmhk->bnhk", d_scores, k),
        jnp.einsum("bhnm,bnhk->bmhk", d_scores, q.astype(jnp.float32)),
        jnp.einsum("bhnm,bnhk->bmhk", weights, d_out),
    )


PLAIN = Local(blocked_attention, plain_forward, plain_backward)


def gpu_attention(q, k, v, mask: Mask, context: Context | None = None):
    """Full attention in 16 bits by cuDNN's flash kernel, anything else as on a CPU."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if half and mask.is_full and context is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return blocked_attention(q, k, v, mask, context=context)


@functools.cache  # one value per generation: it is a static argument of jitted programs
def flash_local(generation: tiles.Generation) -> Local:
    """The kernels for this generation of TPUs."""

    def choose(q, k):
        return tiles.choose(generation, q.shape[1], k.shape[1])

    def forward(q, k, v, mask: Mask):
        # The stale_max form needs no bound on the scores; a log-sum-exp that is merged has no bound known beforehand.
        return flash_forward(q, k, v, mask, choose(q, k).stale_max, form="stale_max")

    def backward(q, k, v, out, lse, d_out, mask: Mask):
        return backward_segments(q, k, v, out, lse, d_out, mask, choose(q, k).backward, None, False)

    return Local(functools.partial(flash_attention, generation=generation), forward, backward)


def local_attention(device: jax.Device) -> Local:
    """What attends on a device of this kind: the only place that chooses.

    Raises:
      ConfigError: a TPU that the kernels have no tiles for; plain attention there would be slow in silence.
    """
    if device.platform == "gpu":
        return Local(gpu_attention, plain_forward, plain_backward)
    if device.platform != "tpu":
        return PLAIN
    try:
        return flash_local(tiles.generation(device))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def attention_kernel(mesh: Mesh, heads: int, ulysses: int = -1) -> SequenceAttention:
    """The attention of a model with `heads` heads on this mesh.

    Raises:
      ConfigError: heads that do not divide over a Ulysses group, or a TPU without kernels.
    """
    return SequenceAttention(mesh, heads, local_attention(mesh.devices.flat[0]), ulysses)
