"""Without the extras the command works on, and what needs one says which."""

import subprocess
import sys

import pytest

# as if the plain installation were all there is
WITHOUT = """
import sys
for name in ("datasets", "sklearn", "pandas", "shapiq", "ray"):
    sys.modules[name] = None
sys.argv[0] = "lora-lab"
from lora_lab.cli import main
main()
"""


@pytest.fixture
def plain(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_embedded_testbed_is_trained_and_analysed_without_extras(plain, tmp_path):
    made = ["train", "--task", "digits/relabel", "--steps", "2", "-o"]
    for name in ("a", "b"):
        code, _, err = plain(*made, f"{name}.safetensors", "--seed", "0" if name == "a" else "1")
        assert code == 0, err
    code, _, err = plain("interpolate", "a.safetensors", "b.safetensors", "--points", "3", "--json")
    assert code == 0, err
    assert (tmp_path / "out" / "interpolate.pdf").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["merge", "a", "b", "--method", "lego", "-o", "m"],
            "the merge by clusters of units needs sklearn, which is not installed: pip install 'lora-lab[data]'",
        ),
        (
            ["compare", "a", "b", "a", "b", "--tsne"],
            "t-SNE needs sklearn, which is not installed: pip install 'lora-lab[data]'",
        ),
        (
            ["train", "--task", "own.toml", "--steps", "1", "-o", "c"],
            "a task on data of one's own needs datasets, which is not installed: pip install 'lora-lab[data]'",
        ),
    ],
)
def test_what_needs_an_extra_says_which_in_one_line(plain, tmp_path, arguments, told):
    from making_adapters import lora, write
    from tiny_models import write_bert

    for seed, name in enumerate("ab"):
        write(tmp_path / name, lora(seed=seed), target_modules=["q_proj"])
    write_bert(tmp_path / "bert", tmp_path / "vocab.txt", ["good", "bad"])
    (tmp_path / "data.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    (tmp_path / "own.toml").write_text(
        'kind = "text-classification"\nbase = "bert"\ntext = "text"\nlabel = "label"\ndata = "data.csv"\n'
    )
    code, _, err = plain(*arguments)
    assert code == 1
    assert err.strip().splitlines()[-1].removeprefix("error: ") == told
    assert not (tmp_path / arguments[-1]).exists()
