"""What every test shares."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "workflow" / "scripts"

# programs that tests start find the package where the scripts do
os.environ["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])

# two workers of two threads each on two cores wait for each other; tiny models need no more than one
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def quality_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run's quality.parquet, beside the jobs' files that it comes from; only to be read."""
    import quality_page

    return quality_page.quality(tmp_path_factory.mktemp("quality"))
