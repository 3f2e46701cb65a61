"""The folder that all parity tests read, made once."""

import pytest
from reference_folder import build_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    return build_reference(tmp_path_factory.mktemp("reference"))
