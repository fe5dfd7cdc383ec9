"""What the server puts where clients lack stages: weights generated from those of others."""
