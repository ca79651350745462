"""What fuzz tests share: how many inputs each tries, and what came of one."""

from hypothesis import settings


def examples(share):
    """Give a test its share of the profile's number: 100 by default, many more under `make fuzz`."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))


def outcome(kind, function, *args, **kwargs):
    """Call a function: its result and no message, or the message of an error of this kind."""
    try:
        return function(*args, **kwargs), None
    except kind as error:
        return None, str(error)
