"""Statistics of BatchNorm where clients hold models of unlike width: each model has its own.

A narrow model's layers sum over fewer channels, so the mean of statistics over unlike widths is
that of no model: with it the whole model of HeteroFL had 15 % right after ten rounds, with its own
56 % (cnn, 2,000 images of Fashion-MNIST, 20 clients of which two hold all channels, Dirichlet 0.5).
So the mean is over clients of the same model, and stays while none takes part. Of an element the
whole model has the statistics of the widest model that ever held it.

They lie beside the whole model's own, in whole tensors, as "PLACE/NAME" for the model of each
place, from 1, narrow first; "held/PLACE/NAME" says which elements ever came from there. So the
server's step averages, checks and keeps them with the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from coordinator.aggregation.sliced import SlicedMean
from edge_sdk.protocol.tensors import Tensors


class ModelStatistics:
    """names: of the whole model's statistics; num_models: that have their own."""

    def __init__(self, names: Collection[str], num_models: int) -> None:
        self._names = names
        self._places = range(1, num_models + 1)

    def beside(self, whole: Mapping[str, Tensor]) -> Tensors:
        """What lies beside the whole model's tensors at first."""
        made: Tensors = {}
        for name, own, held in self._triples():
            made[own] = whole[name].clone()
            made[held] = torch.zeros(whole[name].shape, dtype=torch.bool)
        return made

    def _triples(self) -> Iterator[tuple[str, str, str]]:
        for name in self._names:
            for place in self._places:
                yield name, f"{place}/{name}", f"held/{place}/{name}"

    def own_name(self, name: str, place: int) -> str:
        """Under which a tensor of a client's model is added up; weights are all models' own."""
        return f"{place}/{name}" if name in self._names else name

    def seen_by(self, place: int, tensors: Mapping[str, Tensor]) -> Tensors:
        """The statistics that the model of this place goes on from, in whole tensors: its own, and
        where it never held any the whole model's. tensors: the whole model's and those beside."""
        return {
            name: torch.where(tensors[f"held/{place}/{name}"], tensors[f"{place}/{name}"], old)
            for name in self._names
            for old in [tensors[name]]
        }

    def settled(self, mean: SlicedMean) -> Tensors:
        """A round's result, with the whole model's statistics from those of the models."""
        made = mean.result()
        for name, own, held in self._triples():  # the widest is the last
            made[held] = made[held] | mean.owned(own)
            made[name] = torch.where(made[held], made[own], made[name])
        return made
