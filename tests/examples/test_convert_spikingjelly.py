"""The example runs as its page says, and both networks of it begin to learn the same."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "convert_spikingjelly.py"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_it_prints_the_report_the_losses_and_both_speeds(monkeypatch, capsys):
    run(monkeypatch, "--steps", "1", "--time_steps", "2", "--batch", "2", "--size", "8")
    output = capsys.readouterr().out
    assert "20 converted, 20 of them fused; 0 left\n" in output
    losses = re.findall(r"^(?:SpikingJelly|converted): loss (\d+\.\d{4}) of step 1$", output, re.MULTILINE)
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert "sew_resnet18, T = 2, batch 2, 8x8, " in output
    assert len(re.findall(r"best +\d+\.\d ms, median +\d+\.\d ms, +\d+\.\d images/s$", output, re.MULTILINE)) == 2
    assert re.search(r"^ +speedup: best \d+\.\d\d, median \d+\.\d\d$", output, re.MULTILINE)


def test_a_wrong_argument_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--steps", "0")
    assert caught.value.code == 2
    assert "steps, time_steps, batch and size must be at least 1" in capsys.readouterr().err


def test_the_page_shows_what_its_code_prints(capsys):
    page = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 10
    exec(compile(code, "docs/convert.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    shown = [line.strip() for line in page.partition(code)[2].splitlines() if line.startswith("    ")]
    shown = [line for line in shown if line != "…" and not line.startswith("python ")]
    assert len(shown) >= 4
    assert [line for line in printed if line in shown] == shown
