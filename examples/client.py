"""A device in a program of your own: data from memory, and a function that hears what happens.

    edge-sdk join LINE --id pi-1 --keys keys        # once; the line is from the coordinator
    python examples/client.py tcp://HOST:5555 x.npy y.npy

x: (n, C, H, W) or (n, C, window) of float32 or uint8; y: (n,) integers from 0.
"""

import sys

import numpy as np

from edge_sdk import Client, Event


def show(event: Event) -> None:
    """Called in the thread of run(), so it must be quick."""
    print(event.kind, event.round, event.detail, flush=True)
    for result in event.exits:  # of "trained"
        print(f"  exit {result.exit}: loss {result.loss:.3f}, {event.metric} {result.metric:.2f}")


def main(coordinator: str, x_file: str, y_file: str) -> None:
    data = np.load(x_file), np.load(y_file)
    client = Client(coordinator, data=data, id="pi-1", keys="keys", on_event=show)
    client.run()  # until the coordinator's run is over, or client.stop()


if __name__ == "__main__":  # the training process imports the modules of a Client, not this program
    main(*sys.argv[1:])
