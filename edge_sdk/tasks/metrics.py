"""What each task is measured by, and how that is shown. Light: for commands that only look."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_sdk.protocol.fields import Measure, Task

ONLY_CLASSES: tuple[Task, ...] = ("classify",)
NAMES_STEP = (
    "give class_names, the list of all classes in an order that is the same on every device, or "
    "numbers"
)


@dataclass(frozen=True)
class Metric:
    """key: in a run's database and in JSON, e.g. "rmse" of "rmse_exit_1". is_share: from 0 to 1,
    and shown in per cent. is_lower_better: an error. outputs: what the K outputs are. measures: of
    an exit's confidence, the default first. has_perplexity: e^loss is told beside it. is_by_column:
    y has a column for each output, so that data cannot lack some."""

    key: str
    name: str
    outputs: str
    measures: tuple[Measure, ...]
    is_share: bool = True
    is_lower_better: bool = False
    has_perplexity: bool = False
    is_by_column: bool = False

    @property
    def head(self) -> str:
        """Of a column."""
        return f"{self.name} %" if self.is_share else self.name

    def shown(self, value: float, digits: int = 1) -> str:
        """The number without its unit, as in a column."""
        return f"{100 * value:.{digits}f}" if self.is_share else f"{value:.{digits + 3}g}"

    def said(self, value: float, digits: int = 1) -> str:
        return f"{self.shown(value, digits)} %" if self.is_share else self.shown(value, digits)

    def to_mean(self, value: float) -> float:
        """What is averaged over clients instead of it: an error's square. An F1 is averaged as it
        is, which is not that of all labels together."""
        return value**2 if self.is_lower_better else value

    def of_mean(self, mean: float) -> float:
        return math.sqrt(mean) if self.is_lower_better else mean

    def worse_by(self, value: float, than: float) -> float:
        """How much worse a value is than another; negative where it is better."""
        return value - than if self.is_lower_better else than - value


METRICS: dict[Task, Metric] = {
    "classify": Metric("accuracy", "accuracy", "classes", ("softmax", "entropy")),
    "multilabel": Metric("f1", "F1", "labels", ("sigmoid", "entropy"), is_by_column=True),
    "regress": Metric(
        "rmse",
        "RMSE",
        "values",
        ("agreement",),
        is_share=False,
        is_lower_better=True,
        is_by_column=True,
    ),
    "tokens": Metric("accuracy", "accuracy", "tokens", ("softmax", "entropy"), has_perplexity=True),
}
