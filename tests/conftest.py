"""What every test may ask for."""

from __future__ import annotations

import pytest

from onnxopt.passbase import Context
from tests.helpers import evaluate


@pytest.fixture
def context() -> Context:
    """A pass's context with nothing but the runtime behind it."""
    return Context(evaluate=evaluate)
