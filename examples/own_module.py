"""A torch module of your own, as you have it, cut into stages by the names of its modules.

    PYTHONPATH=examples edge-coordinator emulate --import own_module --model blocks --data digits
    PYTHONPATH=examples edge-sdk plan --import own_module --model blocks --data digits

An exit stands behind each cut; behind the last one the module's own head is the exit. `names` lets
--init read weights of the module by its own names.
"""

from torch import Tensor, nn

from edge_sdk.models import ModelSpec, StagedModel, register_family
from edge_sdk.models.from_module import from_module, module_names

CUTS = ("block1", "block2", "block3")  # or "auto:3", at about equal operations


class Blocks(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU())
        self.block2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block3 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.1))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean((2, 3)))


def build(spec: ModelSpec) -> StagedModel:
    module = Blocks(spec.input_shape[0], spec.num_classes)
    about = {"input_shape": spec.input_shape, "num_classes": spec.num_classes, "exit": spec.exit}
    return from_module(module, CUTS, **about)


register_family("blocks", build, names=lambda spec: module_names(build(spec)))
