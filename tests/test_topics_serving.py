"""A server that is started for a while; `tests/test_serve.py` asks one that starts."""

import sys

import pytest

from helpers.topics.serving import served


def test_a_command_that_serves_nothing_is_an_error_with_its_own_words():
    with pytest.raises(RuntimeError, match="no server: .*nonsense"), \
            served(sys.executable, "-c", "import sys; sys.exit('nonsense')"):
        pass


def test_a_server_that_never_answers_is_ended(tmp_path):
    with pytest.raises(RuntimeError, match="no server"), \
            served(sys.executable, "-c", "import time; time.sleep(60)", patience=0.5):
        pass
