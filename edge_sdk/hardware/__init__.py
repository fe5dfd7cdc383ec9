"""What this machine has: memory, cores, speed, board, heat and battery."""
