"""The commands. No logic of their own: each parses its words (tyro), makes one call and prints what it returns."""

from repvgg.cli.entry import main as main
