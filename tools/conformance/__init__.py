"""Whether a device follows docs/protocol.md: vectors, and a scripted coordinator."""
