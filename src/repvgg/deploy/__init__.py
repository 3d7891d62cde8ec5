"""Out of PyTorch and into use."""
