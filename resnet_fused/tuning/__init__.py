"""Choices by measurement on the user's device: `tune`, `use_tuned`, and what they report.

sites        what one training step asks for, as problems       candidates  what may run each of them
law          is it right                                        race        is it clearly faster
measure      one problem after another, under a time limit      steps       is the whole step faster
ranks        one table for all ranks                            session     `tune`
"""

from .measure import Measured
from .race import Spread, Timer
from .ranks import digest, use_tuned
from .report import TuneReport
from .session import tune

__all__ = ["Measured", "Spread", "Timer", "TuneReport", "digest", "tune", "use_tuned"]
