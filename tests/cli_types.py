"""Check the types of cli/ as of lora_lab.cli, which it is installed as: mypy finds it there in a folder of links."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

with tempfile.TemporaryDirectory() as place:
    package = Path(place) / "lora_lab"
    package.mkdir()
    for path in (ROOT / "lora_lab").iterdir():
        (package / path.name).symlink_to(path)
    (package / "cli").symlink_to(ROOT / "cli")
    (Path(place) / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    cache = ["--cache-dir", str(ROOT / ".mypy_cache" / "cli")]
    sys.exit(subprocess.run([sys.executable, "-m", "mypy", *cache], cwd=place).returncode)
