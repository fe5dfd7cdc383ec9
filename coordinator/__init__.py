"""The coordinator: rounds, methods, weight generation. Imports edge_sdk, never the other way."""
