"""What a network costs, how long it takes, and on what machine that was measured."""
