"""Where time and memory go, and how near that is to what the machine can do."""
