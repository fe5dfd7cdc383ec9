"""A llama that knows one text learns another by LoRA beside its frozen weights, and then writes.

python examples/llama_adapters.py runs/llama
"""

import argparse
import json.decoder
import sys
from pathlib import Path

import numpy as np

from coordinator.cohorts.population import Population
from coordinator.methods.registry import make_config
from coordinator.runs.emulating import EmulateSettings, emulate
from edge_sdk.infer import EarlyExit
from edge_sdk.infer.generate import generate
from edge_sdk.protocol.messages import Adapters, ModelSpec


def main(folder: str, rounds: int = 10) -> None:
    task = {"num_classes": 128, "vocabulary": 128, "task": "tokens"}
    given, run = {"rounds": rounds, "epochs": 4, "optimizer": "adam", "lr": 5e-3}, Path(folder)
    texts = (("first", argparse, None), ("second", json.decoder, Adapters(kind="lora", rank=4)))
    for name, module, adapters in texts:
        text = np.frombuffer(Path(module.__file__).read_bytes()[:8000], np.uint8).astype(int) % 128
        x = np.lib.stride_tricks.sliding_window_view(text, 65)[::48]
        (run / name).mkdir(parents=True)
        np.savez(data := str(run / f"{name}.npz"), x=x[:, :-1], y=x[:, 1:], **task)
        spec = ModelSpec(family="llama", input_shape=(64,), exit=2, adapters=adapters, **task)
        config = make_config("fedavg-l", spec, data=data, **given)
        settings = EmulateSettings(folder=run / name, export=run / name / "onnx")
        emulate(config, Population(clients=3, groups=(0, 3), split="iid", alpha=1.0), settings)
        given["init"] = str(run / name / "model.safetensors")
    made = generate(EarlyExit.load(run / "second" / "onnx", threshold=0.5), list(b"def "), count=40)
    print(bytes(made.ids.tolist()), f"at exit {made.exits.mean():.1f} on average")


if __name__ == "__main__":
    main(sys.argv[1])
