"""What the student is taught: targets from the teacher, and three losses."""

from training.losses.centering import Center, Centering, SinkhornKnopp, Targets, make_centering, sinkhorn
from training.losses.terms import chosen_patches, cross_entropy, dino_loss, ibot_loss, koleo_loss

__all__ = [
    "Center",
    "Centering",
    "SinkhornKnopp",
    "Targets",
    "chosen_patches",
    "cross_entropy",
    "dino_loss",
    "ibot_loss",
    "koleo_loss",
    "make_centering",
    "sinkhorn",
]
