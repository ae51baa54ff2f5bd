"""Random small networks: exact conversion, storage, merging and plans hold for every one, and it is left as it was.

40 networks; CONVSPLIT_NETWORKS in the environment draws more or fewer.
"""

from __future__ import annotations

import os
import random

import networks
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@settings(
    max_examples=int(os.environ.get("CONVSPLIT_NETWORKS", "40")),
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
)
@given(st.randoms(use_true_random=False))
def test_any_network_is_rewritten_exactly_and_left_as_it_was(rng: random.Random) -> None:
    case = networks.drawn(rng)
    assume(networks.runs(case))
    networks.check(case)
