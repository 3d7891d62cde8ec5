"""Timing of models, convolutions and memory."""
