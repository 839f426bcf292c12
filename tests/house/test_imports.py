"""What loads which packages: a command waits for those alone that it needs."""

import subprocess
import sys

import pytest
from making_adapters import lora, write

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "sklearn",
    "scipy",
    "matplotlib",
    "pandas",
    "yaml",
    "PIL",
    "numpy",
)


def loaded_by(code, *arguments):
    """The heavy packages that are there after a program has run."""
    told = f"print('loaded', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{told}", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return set(last.split()[1:]), "\n".join(printed)


VERB = "from lora_lab.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code, end"


def test_help_and_drawing_load_no_torch():
    loaded, printed = loaded_by(VERB, "--help")
    assert "interpolate" in printed
    assert not loaded
    loaded, _ = loaded_by("import lora_lab.plots.registry")
    assert loaded <= {"numpy", "matplotlib", "PIL"}


@pytest.mark.parametrize("verb", ["inspect", "merge", "merge-folder", "prune", "convert"])
def test_files_of_adapters_are_worked_on_with_torch_alone(tmp_path, verb):
    a, b = (write(tmp_path / name, lora(seed=seed), target_modules=["q_proj"]) for seed, name in enumerate("ab"))
    ways = {
        "inspect": ["inspect", a],
        "merge": ["merge", a, b, "--method", "ties", "-o", tmp_path / "merged.safetensors"],
        "merge-folder": ["merge", a, b, "-o", tmp_path / "merged"],
        "prune": ["prune", a, "--rank", 1, "-o", tmp_path / "small.safetensors"],
        "convert": ["convert", a, "--to", "mlx", "-o", tmp_path / "converted"],
    }
    loaded, printed = loaded_by(VERB, *ways[verb])
    assert "q_proj" in printed or (tmp_path / ways[verb][-1]).exists()
    assert loaded <= {"torch", "numpy"} | ({"yaml"} if verb == "merge-folder" else set())
