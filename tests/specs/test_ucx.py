"""UCX's settings: ours by default, the user's where there are any."""

from __future__ import annotations

from hexgen2.specs.ucx import UCX_DEFAULTS, set_ucx_defaults


def test_what_the_user_has_set_stays() -> None:
    environment = {"UCX_TCP_TX_SEG_SIZE": "8k", "HOME": "/"}
    set_ucx_defaults(environment)
    assert environment == {**UCX_DEFAULTS, "UCX_TCP_TX_SEG_SIZE": "8k", "HOME": "/"}
