"""Numbers that can be a network's: beyond these a config is damaged, and building it never ends."""

from typing import Annotated

from pydantic import Field

Size = Annotated[int, Field(gt=0, le=2**24)]  # of a layer
Depth = Annotated[int, Field(gt=0, le=1000)]  # layers
