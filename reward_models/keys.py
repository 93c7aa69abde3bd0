"""The key of a judge's server, which must not get into files that are published."""

from __future__ import annotations

import os

API_KEY = "REWARD_MODEL_API_KEY"
KEY_ADVICE = f"a key does not belong into settings, which are kept and published: put it into {API_KEY}."


def authorization(api_key: str | None) -> dict[str, str]:
    """Headers of a request: the key given, else that of the environment, else none."""
    key = api_key or os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}
