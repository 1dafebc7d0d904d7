"""Generated data sets with a known answer: points, signals, volumes and videos."""

from diffcore.training.data.generated.balls import Balls, MovingBalls
from diffcore.training.data.generated.sines import Sines
from diffcore.training.data.generated.two_moons import TwoMoons

__all__ = ["Balls", "MovingBalls", "Sines", "TwoMoons"]
