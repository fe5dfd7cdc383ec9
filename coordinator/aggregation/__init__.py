"""From updates to one model: means, robust rules, late updates, the server's step."""
