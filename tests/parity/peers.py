"""The PyTorch networks that ours are compared with; they need the extra `convert`."""

from lingbot_jax.models.config import DiTConfig


def wan_transformer(config: DiTConfig):
    """diffusers' transformer of the same sizes, with its own random initialisation. Raises ModuleNotFoundError."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn,
        num_layers=config.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )
