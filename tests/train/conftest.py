# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the training tests."""

import pytest
from small_run import write_books


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """A folder with one book and its tokenizer."""
    folder = tmp_path_factory.mktemp("books")
    write_books(folder)
    return folder
