"""What every refusal must be: a UserError of one line that ends a sentence and names its words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compress.errors import UserError


def refused(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message, message
