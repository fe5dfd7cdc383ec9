"""The tasks by name."""

from __future__ import annotations

import math

from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.base import TaskRules
from edge_sdk.tasks.classify import Classify
from edge_sdk.tasks.multilabel import Multilabel
from edge_sdk.tasks.regress import Regress
from edge_sdk.tasks.tokens import Tokens

TASKS: dict[Task, TaskRules] = {
    "classify": Classify(),
    "multilabel": Multilabel(),
    "regress": Regress(),
    "tokens": Tokens(),
}

AT_ONCE = 100  # examples that a model answers without training
MOST_OUTPUTS = 2**22  # of an exit that answers them: 16 MiB; a text has K at each of its places


def task_of(name: Task) -> TaskRules:
    return TASKS[name]


def answered_at_once(spec: ModelSpec) -> int:
    """How many examples go through a model together when it is only asked."""
    an_example = math.prod(task_of(spec.task).output_shape(spec))
    return max(1, min(AT_ONCE, MOST_OUTPUTS // an_example))
