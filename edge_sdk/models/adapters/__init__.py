"""Small trained parts beside the layers of a frozen model: a file a kind, one that attaches."""
