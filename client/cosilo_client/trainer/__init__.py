"""The trainer: a process of its own that trains on the site's images, and the daemon's link to it.

`jobs`, `channel`, `process` and `link` are the daemon's side and import no torch; `worker`, `workshop`, `training` and
`device` run in the trainer process.
"""

from cosilo_client.trainer.jobs import EvaluateJob, FailureCode, Progress, Result, TrainerFailed, TrainJob
from cosilo_client.trainer.link import TrainerLink
from cosilo_client.trainer.process import TrainerConfig

__all__ = [
    "EvaluateJob",
    "FailureCode",
    "Progress",
    "Result",
    "TrainJob",
    "TrainerConfig",
    "TrainerFailed",
    "TrainerLink",
]
