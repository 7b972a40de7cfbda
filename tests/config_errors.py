"""What the configuration tests share: how a refusal is looked at."""

from collections.abc import Callable
from typing import Any

import pytest

from trm_fast.config import ConfigError


def message(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The text of the ConfigError that the call raises, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 300
    return text
