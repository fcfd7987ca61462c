"""Online Deep Clustering (Zhan et al., CVPR 2020) in plain PyTorch."""

__version__ = "1.0.0"
