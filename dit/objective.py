"""The objectives, chosen by `kind`; the convention they share is in dit/convention.py."""

from typing import Annotated

from pydantic import Field

from dit.convention import Objective, Prediction, Quantity, broadcast_t, weights
from dit.ddpm import DDPM
from dit.flow import FlowMatching

ObjectiveConfig = Annotated[FlowMatching | DDPM, Field(discriminator="kind")]

__all__ = [
    "DDPM",
    "FlowMatching",
    "Objective",
    "ObjectiveConfig",
    "Prediction",
    "Quantity",
    "broadcast_t",
    "weights",
]
