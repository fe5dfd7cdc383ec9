"""One peer, or a flood of them, against a coordinator with honest devices at work."""
