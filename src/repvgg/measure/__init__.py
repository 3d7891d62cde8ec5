"""The measuring room: the costs of a network, the time that it takes, and the machine that this was measured on."""
