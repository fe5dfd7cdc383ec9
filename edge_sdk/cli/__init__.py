"""`edge-sdk`: one file a command."""
