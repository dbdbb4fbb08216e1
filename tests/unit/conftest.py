"""Processes for the tests of the extension module.

The imports inside the fixtures keep the extension module out of tests that do not need it.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.fixtures.core_processes import Coordinator, Processes


@pytest.fixture
def processes() -> Iterator["Processes"]:
    """Starts processes that do not outlive the test."""
    from tests.fixtures.core_processes import Processes

    with Processes() as running:
        yield running


@pytest.fixture
def coordinator(processes: "Processes", tmp_path: Path) -> "Coordinator":
    """The coordinator of one attention and one FFN instance."""
    from tests.fixtures.core_processes import start_coordinator

    return start_coordinator(processes, tmp_path)


@pytest.fixture
def loop() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls a function on a thread that plays an instance's loop.

    Sessions take signals over on the main thread only, so here they leave SIGINT to pytest.
    """
    from tests.fixtures.core_processes import PATIENCE_S

    with ThreadPoolExecutor(1) as executor:
        yield lambda work: executor.submit(work).result(PATIENCE_S)
