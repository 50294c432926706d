"""What scripts do to parameters and gradients after ``prepare`` (base.py says how)."""

from habits import averages, gradients, penalties, reading, surgery, writing
from habits.base import HABITS, NEED_GRADIENTS

__all__ = ["HABITS", "NEED_GRADIENTS", "averages", "gradients", "penalties", "reading", "surgery", "writing"]
