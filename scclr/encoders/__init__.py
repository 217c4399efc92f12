"""Encoders: images [B, C, H, W] to representations h [B, feature_dim]. One family per file."""
