"""The tasks by name."""

from __future__ import annotations

from edge_sdk.protocol.fields import Task
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


def task_of(name: Task) -> TaskRules:
    return TASKS[name]
