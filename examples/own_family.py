"""A model family of your own: any torch modules, cut into stages with an exit behind each.

    PYTHONPATH=examples edge-coordinator emulate --import own_family --model perceptron
    PYTHONPATH=examples edge-sdk plan --import own_family --model perceptron --data digits

The coordinator and every device name the module with --import. A stage and an exit must have the
same tensors whatever deeper stages exist, because a weak device builds only the first ones.
"""

import math

from torch import nn

from edge_sdk.models import ModelSpec, StagedModel, register_family


def build(spec: ModelSpec) -> StagedModel:
    """spec.exit stages; `--option width=96` is spec.options["width"]."""
    width = int(spec.options.get("width", 64))
    inputs = math.prod(spec.input_shape)
    stages: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())]
    stages += [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(1, spec.exit)]
    return StagedModel(stages, [nn.Linear(width, spec.num_classes) for _ in stages])


register_family("perceptron", build)
