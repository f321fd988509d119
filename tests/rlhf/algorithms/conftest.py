import math

import pytest


@pytest.fixture(params=[math.nan, 1e9, -1e9, math.inf], ids=["nan", "1e9", "-1e9", "inf"])
def poison(request) -> float:
    """What may lie in masked slots."""
    return request.param
