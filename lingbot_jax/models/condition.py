"""The conditioning half of an image-to-video model's input: which frames are given, and their latents."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lingbot_jax.models.codec import Codec


def image_condition(
    codec: Codec, video: Float[Array, "b f h w 3"], given: Int[Array, "b"]
) -> tuple[Float[Array, "b t hl wl m"], Float[Array, "b t hl wl c"]]:
    """Mask and conditioning latent of a clip whose first `given` latent frames are known.

    Frames that are not given become mid-grey (0) before encoding, as published: the conditioning latent
    holds nothing of the frames to be generated, though a codec's decoder sees both sides of the cut.

    Args:
      video: in [-1, 1], f = m * (t - 1) + 1 frames; what stands after the given ones is ignored.
      given: latent frames known of each sample, in 0..t.

    Returns:
      mask: 1 where a pixel frame is given; channel j of latent i is frame m * (i - 1) + 1 + j, and the first
        frame's mask is repeated m times. m is the codec's temporal stride.
      image: the latents of the masked video.
    """
    m, sh, sw = codec.config.stride
    batch, frames, height, width = video.shape[:4]
    t = codec.config.latent_frames(frames)
    known = jnp.arange(t) < given[:, None]  # b t
    pixels_known = jnp.concatenate([known[:, :1], jnp.repeat(known[:, 1:], m, axis=1)], axis=1)
    image = codec.encode(jnp.where(pixels_known[:, :, None, None, None], video, 0.0))
    mask = jnp.broadcast_to(known[:, :, None, None, None], (batch, t, height // sh, width // sw, m))
    return mask.astype(image.dtype), image
