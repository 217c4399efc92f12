"""Encoders: images [B, C, H, W] to representations h [B, feature_dim], one family per file."""
