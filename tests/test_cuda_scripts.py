"""The programs for a machine with a GPU, as far as one without goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.slow
def test_the_benchmark_runs_in_small_on_a_cpu(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPTS / "bench_cuda.py"), "--device", "cpu", "--small", "--out", "found.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["part"] for row in found["rows"]} == {"steps", "pairs", "views", "probe"}
    assert all(0 < row["least"] <= row["seconds"] <= row["most"] for row in found["rows"])
    assert all(row["share"] > 0 for row in found["rows"] if "share" in row)
    assert found["machine"]["device"] == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [["bash", "check_cuda.sh"], [sys.executable, "bench_cuda.py"]])
def test_without_a_gpu_one_line_says_so(program: list[str], tmp_path: Path) -> None:
    line = [program[0], str(SCRIPTS / program[1])]
    environment = {**os.environ, "PYTHON": sys.executable, "SCCLR_TEST_DEVICE": "cuda", "OUT": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    said = (done.stdout + done.stderr).splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("no CUDA device here")
    assert list(tmp_path.iterdir()) == []
