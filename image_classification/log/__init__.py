"""The log of a run, and the only console output of the trainer."""

from image_classification.log.logger import Logger, Verbosity
from image_classification.log.machine import GpuMonitor, run_metadata
from image_classification.log.records import default_metadata
from image_classification.log.views import Progress

__all__ = ["GpuMonitor", "Logger", "Progress", "Verbosity", "default_metadata", "run_metadata"]
