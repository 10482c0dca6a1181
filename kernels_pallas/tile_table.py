"""Tiles with the fewest static cycles a pair of tokens, at head_dim 128, among those measured.

`python -m tests.bench.search_tiles` writes this file. (generation, kernel): (block_q, block_k, chunk[, form]).
Searched with libtpu 0.0.42.1 (JAX 0.10.2). With 0.0.50.1 (JAX 0.12) fixed_max was searched again, with the same result.
"""

TABLE = {
    ("v5e", "fixed_max"): (2048, 1024, 512),
    ("v5e", "cached"): (4736, 1280, 256),
    ("v5e", "stale_max"): (1024, 1024, 512),
    ("v5e", "backward"): (1024, 1024, 512, "rows"),
    ("v5p", "fixed_max"): (2048, 1024, 512),
    ("v5p", "cached"): (4736, 1280, 256),
    ("v5p", "stale_max"): (1024, 1024, 512),
    ("v5p", "backward"): (1024, 1024, 512, "rows"),
    ("v6e", "fixed_max"): (2048, 1024, 512),
    ("v6e", "cached"): (4736, 1280, 256),
    ("v6e", "stale_max"): (1024, 1024, 1024),
    ("v6e", "backward"): (1024, 1024, 512, "columns"),
    ("tpu7x", "fixed_max"): (2048, 1024, 512),
    ("tpu7x", "cached"): (4736, 1280, 256),
    ("tpu7x", "stale_max"): (1024, 1024, 1024),
    ("tpu7x", "backward"): (1024, 1024, 512, "columns"),
}
