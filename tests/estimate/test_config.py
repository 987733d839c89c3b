import math

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.estimate import devices
from ip2p_ray.estimate.config import Prices, Speed, Workload

FREE = {
    "device_hour": 0.0,
    "storage_gb_month": 0.0,
    "put_1000": 0.0,
    "get_1000": 0.0,
    "transfer_gb": 0.0,
}


@pytest.mark.parametrize("amount", ["2", True, None, -1.0, math.inf, math.nan])
def test_a_price_is_a_finite_number(amount):
    with pytest.raises(ConfigError, match="device_hour is a finite number of at least 0, got"):
        Prices(**{**FREE, "device_hour": amount})


def test_a_currency_is_text():
    with pytest.raises(ConfigError, match="currency is text, got 5"):
        Prices(**FREE, currency=5)


@pytest.mark.parametrize("tokens", [(-500.0, 40.0), (math.nan, 40.0), (500.0, math.inf)])
def test_tokens_are_finite_and_not_negative(tokens):
    with pytest.raises(ConfigError, match="_tokens is a finite number of at least 0"):
        Workload(captions=1, prompt_tokens=tokens[0], reply_tokens=tokens[1])


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_a_speed_is_finite(seconds):
    with pytest.raises(ConfigError, match="seconds is a finite number"):
        Speed(seconds=seconds, source="given")


def test_a_utilisation_that_makes_no_speed_is_refused():
    with pytest.raises(ConfigError, match="seconds is a finite number"):
        devices.reckon("h100", 1e-320)
