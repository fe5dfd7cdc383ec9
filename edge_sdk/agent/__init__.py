"""The resident process of a device: link and identity, and the trainer that it starts."""
