"""A whole testbed of emulated boards on one machine."""
