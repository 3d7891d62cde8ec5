"""The networks, their names, and their files."""
