"""The operator benchmark runs on a CPU, and its arms compute what they are compared with."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.py"
OPS = {
    "frame_similarity", "merge_frames", "attention_received", "plan_merge", "select_tokens",
    "plan_merge + select_tokens",
}  # fmt: skip


def test_measures_every_operator_and_finds_that_the_arms_agree(tmp_path):
    path = tmp_path / "kernels.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--device", "cpu", "--frames", "3", "10", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["ceilings"].keys() == {"copy", "matmul"} and "--quick" in result["command"]
    for frames in (3, 10):
        rows = [row for row in result["rows"] if row["frames"] == frames]
        assert {row["op"] for row in rows} == OPS
        for op in OPS:
            arms = {row["arm"]: row for row in rows if row["op"] == op}
            assert arms.keys() == {"earlytom", "naive"} | ({"sdpa"} if op == "attention_received" else set())
            assert arms["earlytom"]["provider"] == "native"
        assert all(row["median_us"] > 0 for row in rows)
        assert all(row["error"] <= 1e-4 for row in rows if row["arm"] != "sdpa")
    for op in OPS:
        assert op in done.stdout
