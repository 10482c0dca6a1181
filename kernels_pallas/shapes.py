"""The real shapes: 480p video of 81 frames, as tests, AOT cases and benchmarks use them."""

from kernels_pallas.mask import Mask

HEAD_DIM = 128
FRAME = 1560  # tokens of a latent frame: 60 x 104 latents, patches of 2 x 2
FRAMES = 21  # latent frames of 81 video frames
CHUNK = 3 * FRAME  # tokens of a chunk: three latent frames
TOKENS = FRAMES * FRAME  # 32,760
CONTEXT = 18 * FRAME  # slots of the cache behind the current chunk: 28,080

FULL = Mask.full(TOKENS, TOKENS)
BLOCK_CAUSAL = Mask.block_causal(TOKENS, CHUNK)
CACHED = Mask.full(CHUNK, CHUNK)
