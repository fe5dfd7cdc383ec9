"""Small things that every other room uses."""
