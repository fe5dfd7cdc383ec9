"""`edge-coordinator`: one file a command, flags only."""
