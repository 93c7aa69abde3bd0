"""The one error of this package."""


class RewardModelError(ValueError):
    """A reward model's name, its options or its inputs cannot be used; says what was expected and what to do."""
