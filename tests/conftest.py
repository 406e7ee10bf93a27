# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The order of the tests."""

# Minutes each: they start first, so that no worker of pytest-xdist ends long after the others.
SLOW = ['test_launchers', 'test_custom_dataset', 'test_distributed', 'test_train_all', 'test_tools']


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))
