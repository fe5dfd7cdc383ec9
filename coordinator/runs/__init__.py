"""One run from its first round to its exported model."""
