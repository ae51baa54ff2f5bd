import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# Several workers that each start a thread per core would fight over the cores; and the milliseconds of one thread are
# those of the process, to which other work on the machine does not add.
torch.set_num_threads(1)

# Ultralytics would install what an export could use besides, and look for newer versions of itself.
os.environ.update(YOLO_AUTOINSTALL="false", YOLO_OFFLINE="true")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is measured in milliseconds is measured again where other work on the machine was in the way."""
    for item in items:
        if item.get_closest_marker("clock"):
            item.add_marker(pytest.mark.flaky(reruns=4))
