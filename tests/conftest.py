"""What every test shares."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "workflow" / "scripts"

# programs that tests start find the package where the scripts do
os.environ["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
