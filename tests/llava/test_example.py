"""The program of examples/ for checkpoints of LLaVA's own code, loaded by its own loader."""

import os
import subprocess
import sys
from pathlib import Path

from films import write_film
from llava_checkpoint import write_llava_checkpoint

PROGRAM = Path(__file__).parents[2] / "examples" / "generate_llava.py"


def test_it_answers_from_a_checkpoint_and_a_video(tmp_path):
    checkpoint = write_llava_checkpoint(tmp_path / "checkpoint", tmp_path / "hub")
    film = write_film(tmp_path / "film.mp4", 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(PROGRAM), str(checkpoint), str(film), "What?"]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "compressing; the last call was compressed" in ran.stdout
    assert "frames 32, patches 23328 -> " in ran.stdout and "tokens 6272 -> 627" in ran.stdout
