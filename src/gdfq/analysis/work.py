"""How much work an analysis is, counted in images that pass the networks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Images that pass a teacher and its integer network.

    Attributes:
        teacher: Images that pass the teacher.
        student: Images that pass the integer network.
        iterations: Images that pass the teacher forward and backward.
    """

    teacher: float = 0.0
    student: float = 0.0
    iterations: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.teacher + other.teacher,
            self.student + other.student,
            self.iterations + other.iterations,
        )

    def seconds(self, teacher: float, student: float, iteration: float) -> float:
        """Return how long it takes, given the seconds of one image of each kind."""
        return self.teacher * teacher + self.student * student + self.iterations * iteration
