"""What holds for all tests."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run without coverage, which would make them slower still."""
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker("no_cover")
