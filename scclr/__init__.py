"""scclr: self-supervised contrastive learning with a balance between attraction and repulsion."""

__version__ = "0.1.0"
