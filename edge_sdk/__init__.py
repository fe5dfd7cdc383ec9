"""edge-sdk: the device side of federated learning on unequal edge devices.

Importing this package loads nothing heavy; torch comes with `edge_sdk.trainer` and
`edge_sdk.models` only.
"""

__version__ = "0.1.0"
