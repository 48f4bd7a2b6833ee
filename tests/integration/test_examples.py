"""The examples run, and what they print is what they promise."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def _run(name: str, folder: Path, *arguments: str) -> str:
    paths = os.pathsep.join(p for p in sys.path if p)
    store = {"UNSHARP_STORE": str(folder / "store")}
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | store,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in source] == []


def test_quickstart_api(tmp_path: Path):
    lines = _run("quickstart_api.py", tmp_path).splitlines()
    rows = {words[0]: [float(w) for w in words[1:]] for words in map(str.split, lines[1:])}
    assert set(rows) == {"original", "forgotten", "retrained"}
    retain, forget, _, tow, _ = rows["forgotten"]
    assert retain > 95
    assert forget < rows["original"][1]
    assert tow > rows["original"][3]
    assert rows["retrained"][3] == 100


def test_sam_in_your_loop(tmp_path: Path):
    out = _run("sam_in_your_loop.py", tmp_path)
    states = dict(re.findall(r"(\S+\.(?:weight|bias)) +(moved|stands still)", out))
    assert {name for name, state in states.items() if state == "moved"} == {"5.weight", "5.bias"}
    assert len(states) == 6
    # 1797 digits: seven batches of two micro-batches and one of five digits, in four epochs.
    assert "BatchNorm counted 60 batches" in out
    assert float(re.findall(r"accuracy ([\d.]+)", out)[0]) > 0.9


def test_custom_method(tmp_path: Path):
    rows = re.findall(r"rule +(\w+): .* forget loss ([\d.]+), (\d+) passes", _run("custom_method.py", tmp_path))
    assert [row[0] for row in rows] == ["none", "sam"]
    assert int(rows[1][2]) == 2 * int(rows[0][2])


@pytest.mark.slow
def test_deletion_request(tmp_path: Path):
    out = _run("deletion_request.py", tmp_path, str(tmp_path / "request"))
    assert out.startswith("unsharp forget --model checkpoint.pt")
    answer = tmp_path / "request" / "answer"
    metrics = json.loads((answer / "metrics.json").read_text(encoding="utf-8"))
    documented = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").partition("## metrics.json")[2]
    assert [key for key in metrics if f"`{key}`" not in documented] == []
    assert metrics["gap"] is not None
    assert metrics["n"]["forget"] == 30
    assert metrics["retain_accuracy"] > 95
    for path in answer.iterdir():
        assert b"person-0010" not in path.read_bytes(), f"{path.name} names a forgotten sample"
    assert (answer / "model.safetensors").is_file()


def _put_language_models(place: Path) -> None:
    """What the page's commands for language models find: small models, and texts in the parts of TOFU."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    import language_models as lm

    from unsharp.language import models

    words = lm.tokenizer()
    for name in ("tofu", "retrained"):
        models.save(place / "models" / name, lm.gpt2(len(words)), words)
    rows = [{"question": p.prompt, "answer": p.answer} for p in lm.facts(0, 8)]
    asked = [row | {"paraphrased_answer": "There", "perturbed_answer": ["Here"]} for row in rows[:3]]
    parts = {"forget05": rows[:3], "retain95": rows[3:], "forget05_perturbed": asked}
    (place / "tofu.json").write_text(json.dumps(parts), encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_order(tmp_path: Path):
    shutil.copy(EXAMPLES / "grid.toml", tmp_path)
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    _put_language_models(tmp_path)
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "UNSHARP_STORE": str(tmp_path / "store")}
    for line in filter(None, blocks.splitlines()):
        command = [sys.executable, "-m", *shlex.split(line)]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{line}: {ran.stderr}"
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "runs" / "answer" / "report.html").is_file()
