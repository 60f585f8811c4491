"""Training: recipes, data, a loop that can be stopped and resumed exactly, and stock-against-fused comparison."""

from .config import TrainConfig
from .errors import UserError
from .loop import Stop, Trainer, check_fits, complete

__all__ = ["Stop", "TrainConfig", "Trainer", "UserError", "check_fits", "complete"]
