"""The masks under which a causal model is trained: what its chunks would see when generating with a cache.

Drawn in latent frames (chunk = 3, independent first frame, window = 6); all arguments are latent frames:

    first_frame=True      window=6         teacher_forcing (clean | noisy, chunk = 1)
      #......              #......           #.. ...
      ####...              ####...           ##. ...
      ####...              ####...           ### ...
      ####...              ####...           ... #..
      #######              .######           #.. .#.
      #######              .######           ##. ..#
      #######              .######
"""

from kernels_pallas.mask import Mask, Rows


def chunks(
    frames: int,
    chunk: int,
    tokens: int,
    *,
    window: int | None = None,
    sink: int = 0,
    first_frame: bool = False,
) -> Mask:
    """Chunks see themselves and the chunks before them, within the window.

    Args:
      tokens: of a latent frame. window: frames visible, counted back from the end of the query's chunk, the
        sink included. first_frame: the first frame is a chunk of its own (the image a video starts from).
    """
    if not first_frame:
        in_tokens = None if window is None else window * tokens
        return Mask.block_causal(frames * tokens, chunk * tokens, in_tokens, sink * tokens)
    rows = []
    for start in [0, *range(1, frames, chunk)]:
        stop = min(start + chunk, frames) if start else 1
        first = 0 if window is None else max(0, stop - (window - sink))
        keys = ((0, min(sink, stop) * tokens), (first * tokens, stop * tokens))
        rows.append(Rows(start * tokens, stop * tokens, keys))
    return Mask(frames * tokens, frames * tokens, tuple(rows))


def teacher_forcing(
    frames: int, chunk: int, tokens: int, *, window: int | None = None, sink: int = 0
) -> Mask:
    """The clip twice in one sequence, clean and then noisy: a noisy chunk sees the clean chunks before it (within the
    window, as in `chunks`) and itself; the clean half is block-causal. Both halves have positions 0..frames-1."""
    n = frames * tokens
    clean = chunks(frames, chunk, tokens, window=window, sink=sink).rows
    noisy = []
    for start in range(0, frames, chunk):
        stop = min(start + chunk, frames)
        first = 0 if window is None else max(0, start + chunk - (window - sink))
        past = ((0, min(sink, start) * tokens), (min(first, start) * tokens, start * tokens))
        noisy.append(
            Rows(n + start * tokens, n + stop * tokens, (*past, (n + start * tokens, n + stop * tokens)))
        )
    return Mask(2 * n, 2 * n, clean + tuple(noisy))
