"""Training: recipes (plain data), augmentation, the loop, evaluation."""
